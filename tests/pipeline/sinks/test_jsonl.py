"""A file of JSON lines that is that of an uninterrupted run, and never loses a record."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_lab.pipeline import PipelineHookArgs
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.run.durable import temporary_name
from robo_orchard_lab.pipeline.sinks import (
    JsonLinesSink,
    JsonLinesSinkConfig,
    MetricsFileError,
    read_metrics,
)


def at(step: int, epoch: int = 0) -> PipelineHookArgs:
    """A run that has come this far."""
    run = PipelineRun.standalone()
    run.progress.global_step_id = run.progress.step_id = step
    run.progress.epoch_id = epoch
    return PipelineHookArgs(run)


def record(step: int, epoch: int = 0, partial: bool = False) -> MetricsRecord:
    return MetricsRecord(epoch, step, step, (MetricValue("loss", 1 / step, step),), partial)


def write(path: Path, start: PipelineHookArgs, *records: MetricsRecord) -> None:
    sink = JsonLinesSink(path)
    sink.open(start)
    for each in records:
        sink.write(each)
    sink.close()


def steps(path: Path) -> list[int]:
    return [each.global_step_id for each in read_metrics(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_a_record_is_a_line_of_strict_json(path: Path) -> None:
    """The counters, the metrics of the step, and apart from them those of earlier steps."""
    values = (
        MetricValue("grad_norm", math.inf, 48),
        MetricValue("eval/val/accuracy", 0.5, 45),
        MetricValue("perf/eta_s", -math.inf, 50),
        MetricValue("loss/total", math.nan, 50),
    )
    write(path, at(0), MetricsRecord(1, 50, 25, values))
    (line,) = path.read_text(encoding="utf-8").splitlines()

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse) == {
        "epoch_id": 1,
        "global_step_id": 50,
        "optimizer_step_id": 25,
        "metrics": {"loss/total": "NaN", "perf/eta_s": "-Infinity"},
        "earlier": [
            {"step": 45, "metrics": {"eval/val/accuracy": 0.5}},
            {"step": 48, "metrics": {"grad_norm": "Infinity"}},
        ],
    }


@given(
    st.lists(
        st.builds(MetricValue, st.text(), st.floats(), st.integers(0, 100)),
        unique_by=lambda value: (value.name, value.step),
    ),
    st.booleans(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: list[MetricValue], partial: bool
) -> None:
    """Any names and numbers come back, exactly."""
    path = tmp_path_factory.mktemp("sink") / "metrics.jsonl"
    written = MetricsRecord(3, 100, 50, tuple(values), partial)
    write(path, at(0), written)
    (read,) = read_metrics(path)
    counters = (read.epoch_id, read.global_step_id, read.optimizer_step_id, read.partial)
    assert counters == (3, 100, 50, partial)
    assert str(read.by_step()) == str(  # nan is not nan
        {step: dict(sorted(found.items())) for step, found in written.by_step().items()}
    )


def test_each_record_is_there_at_once(path: Path) -> None:
    """Who reads the file while a run writes it sees every record."""
    sink = JsonLinesSink(path)
    sink.open(at(0))
    for step in (1, 2, 3):
        sink.write(record(step))
        assert steps(path) == [*range(1, step + 1)]
    sink.close()


def test_a_resumed_run_goes_on_from_its_step(path: Path) -> None:
    """Records after the step are set aside in a file beside it; no file is ever overwritten."""
    write(path, at(0), record(5), record(10), record(15))
    write(path, at(10), record(15), record(20))
    write(path, at(5), record(10))
    assert steps(path) == [5, 10]
    beside = [path.with_name(f"metrics.aside-{number}.jsonl") for number in (1, 2)]
    assert [steps(file) for file in beside] == [[15], [10, 15, 20]]
    assert {*path.parent.iterdir()} == {path, *beside}


def test_a_new_run_sets_all_aside(path: Path) -> None:
    """A run that begins anew begins with an empty file, also ahead of an evaluation at step 0."""
    write(path, at(0), MetricsRecord(0, 0, 0, ()), record(5))
    path.with_name(temporary_name(path.name)).touch()  # of a run that was killed while it wrote
    write(path, at(0))
    assert steps(path) == []
    aside = path.with_name("metrics.aside-1.jsonl")
    assert steps(aside) == [0, 5]
    assert {*path.parent.iterdir()} == {path, aside}


def test_partial_records_are_those_of_runs_that_went_on(path: Path) -> None:
    """A record that was written because a run ended is set aside, at the step itself as before."""
    write(path, at(0), record(5), record(8, partial=True))
    write(path, at(8), record(10))
    assert steps(path) == [5, 10]
    assert [each.partial for each in read_metrics(path)] == [False, False]
    write(path, at(10), record(12, partial=True))
    write(path, at(20), record(25))
    assert steps(path) == [5, 10, 25]


def test_a_record_of_an_epoch_that_has_not_ended_is_set_aside(path: Path) -> None:
    """Of two records at one step, that of the epoch's end is after a save within the epoch."""
    write(path, at(0), record(7, epoch=0), record(7, epoch=1))
    write(path, at(7, epoch=0))
    assert [each.epoch_id for each in read_metrics(path)] == [0]


@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_a_torn_last_line_is_set_aside(path: Path, cut: int) -> None:
    """What a crash left of a line goes to the file beside; the one ahead of it stays."""
    write(path, at(0), record(5), record(10))
    whole = path.read_bytes()
    end = whole.index(b"\n") + 1
    path.write_bytes(whole[: end + cut])
    assert steps(path) == [5]
    write(path, at(10), record(15))
    assert steps(path) == [5, 15]
    beside = path.with_name("metrics.aside-1.jsonl")
    assert beside.read_bytes() == whole[end : end + cut]


def test_zeros_after_a_crash_are_set_aside(path: Path) -> None:
    """Some file systems leave zeros where the last line was to be."""
    write(path, at(0), record(5))
    with path.open("ab") as file:
        file.write(b"\0" * 20)
    write(path, at(5), record(10))
    assert steps(path) == [5, 10]


def test_only_the_line_end_is_missing(path: Path) -> None:
    """A whole record without its line end stays, and the next one gets a line of its own."""
    write(path, at(0), record(5))
    path.write_bytes(path.read_bytes().rstrip())
    write(path, at(5), record(10))
    assert steps(path) == [5, 10]
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    "text",
    [
        "loss,step\n0.5,1\n",
        "hello",
        "{}\n",
        '{"loss": 1.0}\n',
        '{"epoch_id": 0, "global_step_id": 1, "optimizer_step_id": 1, "metrics": 5}\n{}\n',
        '{"epoch_id": 0, "global_step_id": true, "optimizer_step_id": 1, "metrics": {}}\n{}\n',
        '{"epoch_id": 0, "global_step_id": 1, "optimizer_step_id": 1, "metrics": {}, "x": 1}\n{}\n',
        '{"epoch_id": 0, "global_step_id": 1, "optimizer_step_id": 1, "metrics": {"x": NaN}}\n{}\n',
        "\n\n",
        "[" * 100_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_file_of_something_else_is_refused(path: Path, text: str) -> None:
    """The error names the line and what to do, and the file is left as it is."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MetricsFileError, match=r"line \d of .*metrics\.jsonl is no record .* move"):
        JsonLinesSink(path).open(at(5))
    assert path.read_text(encoding="utf-8") == text
    assert [*path.parent.iterdir()] == [path]


HOLD = """
import sys
from robo_orchard_lab.pipeline import PipelineHookArgs
from robo_orchard_lab.pipeline.sinks import JsonLinesSink

sink = JsonLinesSink(sys.argv[1])
sink.open(PipelineHookArgs())
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that has the file open until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_two_runs_do_not_share_a_file(path: Path, another_process: subprocess.Popen[str]) -> None:
    """While a run writes a file, another one is refused; when it was killed, no longer."""
    with pytest.raises(MetricsFileError, match=r"another process is writing .* a path of its own"):
        JsonLinesSink(path).open(at(0))
    another_process.kill()
    another_process.wait()
    write(path, at(0), record(5))
    assert steps(path) == [5]


def test_a_link_stays_a_link(tmp_path: Path, path: Path) -> None:
    """Where the path is a link, the file that it leads to is written and replaced."""
    real = tmp_path / "elsewhere" / "real.jsonl"
    real.parent.mkdir()
    path.symlink_to(real)
    write(path, at(0), record(5), record(10))
    write(path, at(5))
    assert path.is_symlink()
    assert steps(real) == [5]
    assert steps(real.with_name("real.aside-1.jsonl")) == [10]


def test_folders_are_made(tmp_path: Path) -> None:
    """The path may lead through folders that are not there yet."""
    path = tmp_path / "runs" / "1" / "metrics.jsonl"
    sink = JsonLinesSinkConfig(path=str(path))()
    sink.open(at(0))
    sink.close()
    assert path.read_bytes() == b""
