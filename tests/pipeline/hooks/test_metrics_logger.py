"""Logging points and their records: none lost, none written twice."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launching import SCRIPTS, launch
from logged_run import Publisher, StopAfter, logged_trainer
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig
from robo_orchard_lab.pipeline.hooks.metrics_logger import MetricsLogger, MetricsLoggerConfig
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.sinks import (
    JsonLinesSink,
    JsonLinesSinkConfig,
    LogSinkConfig,
    MetricsFileError,
    SinkConfig,
    TrackerSinkConfig,
    read_metrics,
)
from robo_orchard_lab.pipeline.trigger import EverySeconds, EverySteps, Trigger
from tiny import equal, make_loader, make_trainer, weights

SCRIPT = SCRIPTS / "logged_run.py"


class ListSink:
    """Sink that keeps its records, and fails on request."""

    def __init__(self, fails_in: str = "", at: int = 0) -> None:
        self.fails_in, self.at = fails_in, at
        self.calls: list[Any] = []

    def _fail(self, method: str, step: int | None = None) -> None:
        if self.fails_in == method and (step is None or step >= self.at):
            raise OSError(28, "No space left on device")

    def open(self, args: PipelineHookArgs) -> None:
        self._fail("open")
        self.calls.append("open")

    def write(self, record: MetricsRecord) -> None:
        self._fail("write", record.global_step_id)
        self.calls.append(record.global_step_id)

    def close(self) -> None:
        self._fail("close")
        self.calls.append("close")


def logging_to(*sinks: ListSink, every: str = "4 steps") -> MetricsLogger:
    return MetricsLoggerConfig(every=Trigger.parse(every))(sinks=sinks)


def test_records_follow_the_trigger() -> None:
    """Each due step and epoch has a record, and the end of a run a partial one."""
    sink = ListSink()
    make_trainer([logging_to(sink, every="5 steps | 1 epoch"), Publisher()], max_step=17)()
    assert sink.calls == ["open", 5, 7, 10, 14, 15, 17, "close"]


def test_records_without_metrics_are_empty() -> None:
    """A logging point without metrics writes a record; the end of a run does not."""
    sink = ListSink()
    make_trainer([logging_to(sink)], max_step=6)()
    assert sink.calls == ["open", 4, "close"]


def test_logging_does_not_change_weights(tmp_path: Path) -> None:
    """Publishing and logging do not change the training."""
    logged = logged_trainer(tmp_path / "metrics.jsonl", max_epoch=2)
    plain = make_trainer(accumulate=2, max_epoch=2)
    logged()
    plain()
    assert equal(weights(logged.model), weights(plain.model))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the file of an uninterrupted run of four epochs."""
    path = tmp_path_factory.mktemp("uninterrupted") / "metrics.jsonl"
    logged_trainer(path, max_epoch=4)()
    return path.read_bytes()


def test_file_has_the_published_values(uninterrupted: bytes, tmp_path: Path) -> None:
    """Each record has the metrics of its window, at their steps."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(uninterrupted)
    records = read_metrics(path)
    assert [r.global_step_id for r in records] == [4, 7, 8, 12, 14, 16, 20, 21, 24, 28]
    assert not any(r.partial for r in records)
    assert [*records[1].by_step()] == [6, 7]
    assert records[1].by_step()[6].keys() == {"eval/weights/sum"}
    assert records[1].by_step()[7].keys() == {
        *("loss/total", "loss/gathered", "loss/smallest"),
        *("step", "updates", "epochs"),
    }
    assert [r.by_step()[r.global_step_id].get("epochs") for r in records] == [
        *(None, 1, None, None, 2, None, None, 3, None, 4)
    ]


def stopping(step: int) -> StopAfter:
    return StopAfter(step, lambda args: args.requests.stop("enough"))


@pytest.mark.parametrize("steps", [(1,), (4,), (5,), (7,), (14,), (3, 6), (8, 9, 10), (27,)])
def test_resumed_run_writes_the_same_file(
    steps: tuple[int, ...], uninterrupted: bytes, tmp_path: Path
) -> None:
    """The file is byte-identical after stops within a window, at its end or an epoch's end."""
    path, saved = tmp_path / "metrics.jsonl", None
    for step in steps:
        trainer = logged_trainer(path, stopping(step), max_epoch=4, resume_from=saved)
        trainer()
        assert read_metrics(path)[-1].global_step_id == step  # nothing is missing
        saved = tmp_path / f"saved{step}"
        trainer.save_checkpoint(saved)
    logged_trainer(path, max_epoch=4, resume_from=saved)()
    assert path.read_bytes() == uninterrupted


def test_extended_run_writes_the_same_file(tmp_path: Path) -> None:
    """The partial record of the first end is replaced when the run continues."""
    path, uninterrupted = tmp_path / "metrics.jsonl", tmp_path / "uninterrupted.jsonl"
    logged_trainer(uninterrupted, accumulate=1, max_step=26)()
    saved = None
    for step in (5, 9, 26):
        trainer = logged_trainer(path, accumulate=1, max_step=step, resume_from=saved)
        trainer()
        last = read_metrics(path)[-1]
        assert (last.global_step_id, last.partial) == (step, True)
        saved = tmp_path / f"saved{step}"
        trainer.save_checkpoint(saved)
    assert path.read_bytes() == uninterrupted.read_bytes()


def test_data_without_a_length(tmp_path: Path) -> None:
    """A resumed run writes the same file if the end of an epoch is detected late."""

    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(make_loader())

    uninterrupted, resumed = tmp_path / "uninterrupted.jsonl", tmp_path / "resumed.jsonl"
    order = DataOrder(fast_forward=True)
    logged_trainer(uninterrupted, loader=Unsized(), max_epoch=3)()
    trainer = logged_trainer(resumed, stopping(7), loader=Unsized(), max_epoch=3)
    trainer()
    trainer.save_checkpoint(tmp_path / "saved")
    logged_trainer(
        resumed,
        loader=Unsized(),
        max_epoch=3,
        resume_from=tmp_path / "saved",
        data_order=order,
    )()
    assert resumed.read_bytes() == uninterrupted.read_bytes()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Return a folder with a run saved within a window, and its file."""
    trainer = logged_trainer(tmp_path / "metrics.jsonl", stopping(10), max_epoch=4)
    trainer()
    trainer.save_checkpoint(tmp_path / "saved")
    return tmp_path


def finish(folder: Path) -> bytes:
    """Resume the saved run to its end."""
    path = folder / "metrics.jsonl"
    logged_trainer(path, max_epoch=4, resume_from=folder / "saved")()
    return path.read_bytes()


def test_killed_run_writes_the_same_file(begun: Path, uninterrupted: bytes) -> None:
    """A run killed after later records, or within a line, resumes with the same file."""
    killed = launch(SCRIPT, "killed", begun, processes=1, fails=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    path = begun / "metrics.jsonl"
    assert read_metrics(path)[-1].global_step_id == 16
    path.write_bytes(path.read_bytes()[:-5])
    assert finish(begun) == uninterrupted


def test_full_disk_does_not_end_the_run(begun: Path, uninterrupted: bytes) -> None:
    """The file and the lost records are reported once; a later run can continue the file."""
    full = launch(SCRIPT, "full", begun, processes=1)
    path = begun / "metrics.jsonl"
    assert full.stderr.count(f"MetricsLogger: writing 'file' to {path} failed; the run con") == 1
    assert full.stderr.count("records of steps 12 to 28 were not written: 'file'") == 1
    assert path.stat().st_size <= 1000
    assert read_metrics(path)[-1].global_step_id < 28
    assert finish(begun) == uninterrupted


def test_two_ranks_write_one_file(tmp_path: Path) -> None:
    """The file has the means of both ranks, and both know about logging points."""
    launch(SCRIPT, "ranks", tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["logged"] for rank in ranks] == [[True] * 6] * 2
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r.global_step_id, r.partial) for r in records] == [(4, False), (6, True)]
    for window, found in zip((slice(0, 4), slice(4, 6)), records, strict=True):
        losses = [loss for rank in ranks for loss in rank["losses"][window]]
        metrics = {value.name: value.value for value in found.values}
        assert metrics["loss/total"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert metrics["loss/smallest"] == min(losses)
    assert ranks[0]["losses"] != ranks[1]["losses"]


@pytest.mark.parametrize("where", ["write", "close"])
def test_failing_sink_is_reported_once(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """A failing sink is reported with the lost records; the others and the training continue."""
    failing, other = ListSink(where, at=8), ListSink()
    logger = MetricsLoggerConfig(every=EverySteps(4))(sinks={"disk": failing, "other": other})
    trainer = make_trainer([logger, Publisher()], max_step=16)
    trainer()
    assert trainer.progress.global_step_id == 16
    assert other.calls == ["open", 4, 8, 12, 16, "close"]
    assert failing.calls == ["open", *([4, "close"] if where == "write" else [4, 8, 12, 16])]
    errors = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    expected = [
        "MetricsLogger: writing 'disk' failed; the run continues, and writes the records later: "
        "OSError: [Errno 28] No space left on device",
        "MetricsLogger: 3 records of steps 8 to 16 were not written: 'disk'",
    ]
    if where == "close":
        expected = [
            "MetricsLogger drops 'disk', which failed with OSError: [Errno 28] No space left on "
            "device; training continues without it"
        ]
    assert [entry.getMessage() for entry in errors] == expected


def test_unopenable_sink_is_an_error() -> None:
    """The error comes before the first step, with hook and sink; other sinks are closed."""
    other = ListSink()
    logger = MetricsLoggerConfig()(sinks={"other": other, "disk": ListSink("open")})
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_trainer([logger], max_step=3)()
    assert "MetricsLogger could not open 'disk'" in caught.value.__notes__
    assert other.calls == ["open", "close"]


def test_foreign_file_is_refused_at_the_start(tmp_path: Path) -> None:
    """The run does not begin, and the file is not changed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("step,loss\n", encoding="utf-8")
    trainer = logged_trainer(path, max_epoch=1)
    with pytest.raises(MetricsFileError, match="is no record of metrics"):
        trainer()
    assert trainer.progress.global_step_id == 0
    assert path.read_text(encoding="utf-8") == "step,loss\n"


def test_sinks_are_closed_when_training_fails(tmp_path: Path) -> None:
    """The training's error propagates, and the file has the earlier records."""

    def fail(args: PipelineHookArgs) -> None:
        raise RuntimeError("out of luck")

    sink, path = ListSink(), tmp_path / "metrics.jsonl"
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer([logging_to(sink), Publisher(), StopAfter(6, fail)], max_step=9)()
    assert sink.calls == ["open", 4, "close"]
    with pytest.raises(RuntimeError, match="out of luck"):
        logged_trainer(path, StopAfter(6, fail), max_epoch=1)()
    assert [r.global_step_id for r in read_metrics(path)] == [4]
    reopened = JsonLinesSink(path)
    reopened.open(PipelineHookArgs())  # unlocked again
    reopened.close()


def test_listener_is_removed_after_the_run() -> None:
    """The board's listener is removed with the loop."""
    trainer = make_trainer([logging_to(ListSink())], max_step=3)
    seen: list[bool] = []
    trainer.hooks.on_step.before(lambda args: seen.append(args.metrics.is_logged))
    trainer()
    assert seen == [True] * 3
    assert not trainer.metrics.is_logged


def test_config_round_trips() -> None:
    """Sinks of several kinds round-trip as a list and as a mapping."""
    kinds: list[SinkConfig[Any]] = [
        JsonLinesSinkConfig(path="a.jsonl"),
        LogSinkConfig(names=["loss/*"]),
        TrackerSinkConfig(project="mine"),
    ]
    options: list[Any] = [kinds, dict(zip("abc", kinds, strict=True)), []]
    for sinks in options:
        config = MetricsLoggerConfig(every=EverySteps(100) | EverySeconds(600), sinks=sinks)
        for form in ("json", "yaml", "toml"):
            loaded = MetricsLoggerConfig.from_str(config.to_str(form), form)
            assert loaded == config
            assert [*map(type, loaded().sinks.values())] == [
                kind.class_type for kind in (sinks.values() if isinstance(sinks, dict) else sinks)
            ]


def test_unnamed_sinks_get_distinct_names() -> None:
    """Sinks are named by their class and numbered."""
    logger = MetricsLoggerConfig(sinks=[LogSinkConfig()])(sinks=[ListSink(), ListSink()])
    assert [*logger.sinks] == ["LogSink", "ListSink", "ListSink 2"]


def test_duplicate_sink_names_are_refused() -> None:
    """The error names the duplicate."""
    with pytest.raises(PipelineConfigError, match="MetricsLogger: two sinks are named 'a'"):
        MetricsLoggerConfig(sinks={"a": LogSinkConfig()})(sinks={"a": ListSink()})


def test_missing_package_error_names_hook_and_field() -> None:
    """The error at construction has the command to install the package."""
    sinks = {"online": TrackerSinkConfig(trackers=["clearml"])}
    error = r"MetricsLogger\.sinks\['online'\]: TrackerSink\.trackers names .* pip install clearml"
    with pytest.raises(PipelineConfigError, match=error):
        MetricsLoggerConfig(sinks=sinks)()


def test_invalid_trigger_is_refused() -> None:
    """The error names the field and the alternatives."""
    with pytest.raises(ValueError, match=r"every[\s\S]*can't read '50 stps' as a trigger"):
        MetricsLoggerConfig(every="50 stps")


def test_log_requests_name_the_hook(caplog: pytest.LogCaptureFixture) -> None:
    """A listener for requests sees the hook's name."""
    requested_by: list[str] = []
    hooks = PipelineHooks("watch")
    hooks.on_loop.before(
        lambda args: args.requests.listen(lambda request: requested_by.append(request.by))
    )
    make_trainer([hooks, logging_to(ListSink())], max_step=8)()
    assert requested_by == ["MetricsLogger"] * 2


def test_invalid_sink_is_refused() -> None:
    """The error lists the methods of a sink."""
    with pytest.raises(PipelineConfigError, match=r"MetricsLogger\.sinks: expected an object with"):
        MetricsLoggerConfig()(sinks=[object()])


def damaged(path: Path, damage: str) -> bytes:
    """Damage the second of three lines, or the file; return its good lines."""
    lines = path.read_bytes().splitlines(keepends=True)
    good = lines[0] + lines[2]
    if damage == "byte":
        lines[1] = lines[1].replace(b":", b"\xff", 1)
    elif damage == "type":
        lines[1] = lines[1].replace(b'"metrics": ', b'"metrics": 5, "more": ', 1)
    elif damage == "torn":
        lines[1] = lines[1][:20] + b"\n"
    elif damage == "newline":
        lines[1] = b"\n" + lines[1][1:]
    else:
        lines, good = [bytes(range(256)) * 4], b""
    path.write_bytes(b"".join(lines))
    return good


@pytest.mark.parametrize("damage", ["byte", "type", "torn", "newline", "everything"])
def test_damaged_file_stops_no_resume(
    damage: str, begun: Path, uninterrupted: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged lines are moved with a warning, and the other records stay and continue."""
    path = begun / "metrics.jsonl"
    path.write_bytes(b"".join(uninterrupted.splitlines(keepends=True)[:3]))
    good = damaged(path, damage)
    before = path.read_bytes()
    written = finish(begun)
    assert written.startswith(good)
    assert uninterrupted.endswith(written.removeprefix(good))
    assert "is no record of metrics" in caplog.text
    moved = "metrics.jsonl.unreadable-1" if damage == "everything" else "metrics.aside-1.jsonl"
    assert set((begun / moved).read_bytes().splitlines()) >= (
        set(before.splitlines()) - set(good.splitlines())
    )


def test_lost_records_are_reported(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A resume warns if the file ends before the last record of the checkpoint."""
    path = begun / "metrics.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    finish(begun)
    assert (
        f"MetricsLogger: 'file' to {path} ends at step 4, but the resumed run had a record of step "
        "8: the records after step 4 are lost" in caplog.text
    )


def test_records_are_durable_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is flushed to the disk between its last record and the first file of a save."""
    flushed: list[str] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    trainer = logged_trainer(
        tmp_path / "metrics.jsonl", SaveCheckpointConfig()(), max_epoch=1, run_folder=tmp_path
    )
    monkeypatch.setattr(os, "fsync", seen)
    trainer()
    assert flushed.index("metrics.jsonl") < flushed.index("manifest.json")
