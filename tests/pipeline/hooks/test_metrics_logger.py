"""Logging points, what they write, and that nothing is lost or written twice."""

from __future__ import annotations

import json
import logging
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
    """Keeps what it is told, and fails where it is asked to."""

    def __init__(self, fails_in: str = "", at: int = 0) -> None:
        self.fails_in, self.at = fails_in, at
        self.told: list[Any] = []

    def _fail(self, method: str, step: int | None = None) -> None:
        if self.fails_in == method and (step is None or step >= self.at):
            raise OSError(28, "No space left on device")

    def open(self, args: PipelineHookArgs) -> None:
        self._fail("open")
        self.told.append("open")

    def write(self, record: MetricsRecord) -> None:
        self._fail("write", record.global_step_id)
        self.told.append(record.global_step_id)

    def close(self) -> None:
        self._fail("close")
        self.told.append("close")


def logging_to(*sinks: ListSink, every: str = "4 steps") -> MetricsLogger:
    return MetricsLoggerConfig(every=Trigger.parse(every))(sinks=sinks)


def test_records_come_by_the_schedule() -> None:
    """One at each due step and epoch, and a partial one where the run ends between two."""
    sink = ListSink()
    make_trainer([logging_to(sink, every="5 steps | 1 epoch"), Publisher()], max_step=17)()
    assert sink.told == ["open", 5, 7, 10, 14, 15, 17, "close"]


def test_without_anything_published_the_records_are_empty() -> None:
    """A logging point is one also where there is nothing to log; the end of a run is not."""
    sink = ListSink()
    make_trainer([logging_to(sink)], max_step=6)()
    assert sink.told == ["open", 4, "close"]


def test_the_weights_are_as_without_it(tmp_path: Path) -> None:
    """Publishing and logging do not change the training."""
    logged = logged_trainer(tmp_path / "metrics.jsonl", max_epoch=2)
    plain = make_trainer(accumulate=2, max_epoch=2)
    logged()
    plain()
    assert equal(weights(logged.model), weights(plain.model))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a run of four epochs that nothing has interrupted."""
    path = tmp_path_factory.mktemp("straight") / "metrics.jsonl"
    logged_trainer(path, max_epoch=4)()
    return path.read_bytes()


def test_the_file_holds_what_was_published(straight: bytes, tmp_path: Path) -> None:
    """Each record has the metrics of its window, at the steps that they belong to."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(straight)
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
def test_a_stopped_and_resumed_run_writes_the_straight_file(
    steps: tuple[int, ...], straight: bytes, tmp_path: Path
) -> None:
    """Byte for byte, stopped within a window, at its end, at an epoch's end, once or often."""
    path, saved = tmp_path / "metrics.jsonl", None
    for step in steps:
        trainer = logged_trainer(path, stopping(step), max_epoch=4, resume_from=saved)
        trainer()
        assert read_metrics(path)[-1].global_step_id == step  # nothing is missing
        saved = tmp_path / f"saved{step}"
        trainer.save_checkpoint(saved)
    logged_trainer(path, max_epoch=4, resume_from=saved)()
    assert path.read_bytes() == straight


def test_a_run_with_a_later_limit_writes_its_straight_file(tmp_path: Path) -> None:
    """What a run that has reached its limit wrote at its end does not stay when it goes on."""
    path, straight = tmp_path / "metrics.jsonl", tmp_path / "straight.jsonl"
    logged_trainer(straight, accumulate=1, max_step=26)()
    saved = None
    for step in (5, 9, 26):
        trainer = logged_trainer(path, accumulate=1, max_step=step, resume_from=saved)
        trainer()
        last = read_metrics(path)[-1]
        assert (last.global_step_id, last.partial) == (step, True)
        saved = tmp_path / f"saved{step}"
        trainer.save_checkpoint(saved)
    assert path.read_bytes() == straight.read_bytes()


def test_data_without_a_length(tmp_path: Path) -> None:
    """Where the end of an epoch is seen late, a resumed run writes the straight file as well."""

    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(make_loader())

    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    order = DataOrder(fast_forward=True)
    logged_trainer(straight, loader=Unsized(), max_epoch=3)()
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
    assert resumed.read_bytes() == straight.read_bytes()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder with a run that was stopped and saved within a window, and its file."""
    trainer = logged_trainer(tmp_path / "metrics.jsonl", stopping(10), max_epoch=4)
    trainer()
    trainer.save_checkpoint(tmp_path / "saved")
    return tmp_path


def finish(folder: Path) -> bytes:
    """Go on from what was saved, to the end."""
    path = folder / "metrics.jsonl"
    logged_trainer(path, max_epoch=4, resume_from=folder / "saved")()
    return path.read_bytes()


def test_a_killed_run_that_is_resumed_writes_the_straight_file(
    begun: Path, straight: bytes
) -> None:
    """Killed after it has logged more than was saved, and in the middle of a line."""
    killed = launch(SCRIPT, "killed", begun, processes=1, fails=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    path = begun / "metrics.jsonl"
    assert read_metrics(path)[-1].global_step_id == 16
    path.write_bytes(path.read_bytes()[:-5])
    assert finish(begun) == straight


def test_a_full_disk_does_not_end_the_run(begun: Path, straight: bytes) -> None:
    """The file is reported once and dropped, and a later run can go on with it."""
    full = launch(SCRIPT, "full", begun, processes=1)
    assert full.stderr.count("MetricsLogger drops 'file', which failed with OSError") == 1
    path = begun / "metrics.jsonl"
    assert path.stat().st_size <= 1000
    assert read_metrics(path)[-1].global_step_id < 28
    assert finish(begun) == straight


def test_two_ranks_write_one_file(tmp_path: Path) -> None:
    """The file has the means of both, and both know alike that someone logs."""
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
def test_a_sink_that_fails_is_reported_once(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """It gets no more records, the others get all, and the training goes on to its end."""
    failing, other = ListSink(where, at=8), ListSink()
    logger = MetricsLoggerConfig(every=EverySteps(4))(sinks={"disk": failing, "other": other})
    trainer = make_trainer([logger, Publisher()], max_step=16)
    trainer()
    assert trainer.progress.global_step_id == 16
    assert other.told == ["open", 4, 8, 12, 16, "close"]
    assert failing.told == ["open", *([4, "close"] if where == "write" else [4, 8, 12, 16])]
    errors = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert [entry.getMessage() for entry in errors] == [
        "MetricsLogger drops 'disk', which failed with OSError: [Errno 28] No space left on "
        "device; training continues without it"
    ]


def test_a_sink_that_can_not_be_opened_is_an_error() -> None:
    """Ahead of the first step, with the names of hook and sink; the others are closed again."""
    other = ListSink()
    logger = MetricsLoggerConfig()(sinks={"other": other, "disk": ListSink("open")})
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_trainer([logger], max_step=3)()
    assert "MetricsLogger could not open 'disk'" in caught.value.__notes__
    assert other.told == ["open", "close"]


def test_a_file_of_something_else_is_an_error_at_the_start(tmp_path: Path) -> None:
    """The run does not begin, and the file is left as it is."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("step,loss\n", encoding="utf-8")
    trainer = logged_trainer(path, max_epoch=1)
    with pytest.raises(MetricsFileError, match="is no record of metrics"):
        trainer()
    assert trainer.progress.global_step_id == 0
    assert path.read_text(encoding="utf-8") == "step,loss\n"


def test_sinks_are_closed_when_training_fails(tmp_path: Path) -> None:
    """The error is the training's own, and the file has what was logged until then."""

    def fail(args: PipelineHookArgs) -> None:
        raise RuntimeError("out of luck")

    sink, path = ListSink(), tmp_path / "metrics.jsonl"
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer([logging_to(sink), Publisher(), StopAfter(6, fail)], max_step=9)()
    assert sink.told == ["open", 4, "close"]
    with pytest.raises(RuntimeError, match="out of luck"):
        logged_trainer(path, StopAfter(6, fail), max_epoch=1)()
    assert [r.global_step_id for r in read_metrics(path)] == [4]
    reopened = JsonLinesSink(path)
    reopened.open(PipelineHookArgs())  # not locked any more
    reopened.close()


def test_nobody_logs_once_the_run_is_over() -> None:
    """The board's listener is removed with the loop."""
    trainer = make_trainer([logging_to(ListSink())], max_step=3)
    seen: list[bool] = []
    trainer.hooks.on_step.before(lambda args: seen.append(args.metrics.is_logged))
    trainer()
    assert seen == [True] * 3
    assert not trainer.metrics.is_logged


def test_its_configuration_survives_a_file() -> None:
    """With sinks as a list and by names, each of a kind of its own."""
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


def test_sinks_without_names_are_told_apart() -> None:
    """They are named for their kinds, and numbered."""
    logger = MetricsLoggerConfig(sinks=[LogSinkConfig()])(sinks=[ListSink(), ListSink()])
    assert [*logger.sinks] == ["LogSink", "ListSink", "ListSink 2"]


def test_two_sinks_of_one_name_are_refused() -> None:
    """The error says which name it is."""
    with pytest.raises(PipelineConfigError, match="MetricsLogger: two of its sinks are named 'a'"):
        MetricsLoggerConfig(sinks={"a": LogSinkConfig()})(sinks={"a": ListSink()})


def test_a_missing_package_is_told_with_hook_and_field() -> None:
    """When the hook is built, with the command that installs it."""
    sinks = {"online": TrackerSinkConfig(trackers=["clearml"])}
    error = r"MetricsLogger\.sinks\['online'\]: TrackerSink\.trackers names .* pip install clearml"
    with pytest.raises(PipelineConfigError, match=error):
        MetricsLoggerConfig(sinks=sinks)()


def test_a_schedule_that_can_not_be_read_is_refused() -> None:
    """The error names the field and what could stand there."""
    with pytest.raises(ValueError, match=r"every[\s\S]*can't read '50 stps' as a schedule"):
        MetricsLoggerConfig(every="50 stps")


def test_the_logging_points_are_made_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """A hook that is told of requests sees who asked."""
    asked: list[str] = []
    hooks = PipelineHooks("watch")
    hooks.on_loop.before(
        lambda args: args.requests.listen(lambda request: asked.append(request.by))
    )
    make_trainer([hooks, logging_to(ListSink())], max_step=8)()
    assert asked == ["MetricsLogger"] * 2


def test_what_is_no_sink_is_refused_when_built() -> None:
    """The error says what a sink has."""
    with pytest.raises(PipelineConfigError, match=r"MetricsLogger\.sinks: a sink has open"):
        MetricsLoggerConfig()(sinks=[object()])
