"""Metrics file: equal to an uninterrupted run's, and no record is lost."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_lab.pipeline import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.run.durable import temporary_name
from robo_orchard_lab.pipeline.sinks import (
    JsonLinesSink,
    JsonLinesSinkConfig,
    MetricsFileError,
    read_metrics,
)
from robo_orchard_lab.pipeline.sinks.jsonl import to_line


def at(step: int, epoch: int = 0) -> PipelineHookArgs:
    """Return hook arguments of a run at this step and epoch."""
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


def test_record_is_line_of_strict_json(path: Path) -> None:
    """A line has the counters, the metrics of the step, and earlier steps separately."""
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
def test_written_records_are_read(
    tmp_path_factory: pytest.TempPathFactory, values: list[MetricValue], partial: bool
) -> None:
    """Any names and numbers are read back exactly."""
    path = tmp_path_factory.mktemp("sink") / "metrics.jsonl"
    written = MetricsRecord(3, 100, 50, tuple(values), partial)
    write(path, at(0), written)
    (read,) = read_metrics(path)
    counters = (read.epoch_id, read.global_step_id, read.optimizer_step_id, read.partial)
    assert counters == (3, 100, 50, partial)
    assert str(read.by_step()) == str(  # nan is not nan
        {step: dict(sorted(found.items())) for step, found in written.by_step().items()}
    )


def test_records_are_flushed(path: Path) -> None:
    """Every record can be read while the run is writing."""
    sink = JsonLinesSink(path)
    sink.open(at(0))
    for step in (1, 2, 3):
        sink.write(record(step))
        assert steps(path) == [*range(1, step + 1)]
    sink.close()


def test_resume_moves_later_records(path: Path) -> None:
    """Records after the resumed step move to another file; no file is overwritten."""
    write(path, at(0), record(5), record(10), record(15))
    write(path, at(10), record(15), record(20))
    write(path, at(5), record(10))
    assert steps(path) == [5, 10]
    others = [path.with_name(f"metrics.aside-{number}.jsonl") for number in (1, 2)]
    assert [steps(file) for file in others] == [[15], [10, 15, 20]]
    assert {*path.parent.iterdir()} == {path, *others}


def test_new_run_moves_all_records(path: Path) -> None:
    """A new run starts with an empty file, even with a record of step 0."""
    write(path, at(0), MetricsRecord(0, 0, 0, ()), record(5))
    path.with_name(temporary_name(path.name)).touch()  # of a run that was killed while it wrote
    write(path, at(0))
    assert steps(path) == []
    aside = path.with_name("metrics.aside-1.jsonl")
    assert steps(aside) == [0, 5]
    assert {*path.parent.iterdir()} == {path, aside}


def test_resume_moves_partial_records(path: Path) -> None:
    """Partial records move, at the resumed step as well as before."""
    write(path, at(0), record(5), record(8, partial=True))
    write(path, at(8), record(10))
    assert steps(path) == [5, 10]
    assert [each.partial for each in read_metrics(path)] == [False, False]
    write(path, at(10), record(12, partial=True))
    write(path, at(20), record(25))
    assert steps(path) == [5, 10, 25]


def test_record_of_unfinished_epoch_is_moved(path: Path) -> None:
    """The end-of-epoch record at a step is later than a save in the epoch."""
    write(path, at(0), record(7, epoch=0), record(7, epoch=1))
    write(path, at(7, epoch=0))
    assert [each.epoch_id for each in read_metrics(path)] == [0]


@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_torn_last_line_is_moved(path: Path, cut: int) -> None:
    """An incomplete last line moves to another file; the line before stays."""
    write(path, at(0), record(5), record(10))
    complete = path.read_bytes()
    end = complete.index(b"\n") + 1
    path.write_bytes(complete[: end + cut])
    assert steps(path) == [5]
    write(path, at(10), record(15))
    assert steps(path) == [5, 15]
    others = path.with_name("metrics.aside-1.jsonl")
    assert others.read_bytes() == complete[end : end + cut]


def test_zeros_after_crash_are_moved(path: Path) -> None:
    """Some file systems leave zeros in place of the last line."""
    write(path, at(0), record(5))
    with path.open("ab") as file:
        file.write(b"\0" * 20)
    write(path, at(5), record(10))
    assert steps(path) == [5, 10]


def test_missing_newline_is_repaired(path: Path) -> None:
    """A complete record without a newline stays, and the next one gets its own line."""
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
def test_other_file_is_refused(path: Path, text: str) -> None:
    """The error has the line and the remedy; the file is not changed."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MetricsFileError, match=r"line \d of .*metrics\.jsonl is no record .* move"):
        JsonLinesSink(path).open(at(5))
    assert path.read_text(encoding="utf-8") == text
    assert [*path.parent.iterdir()] == [path]


def test_opening_reads_the_end_alone(path: Path) -> None:
    """A resume reads no more of 20,000 records than of 1,000; later records move."""

    def bytes_read(count: int) -> int:
        path.unlink(missing_ok=True)
        path.write_bytes(b"".join(to_line(record(step)) for step in range(1, count + 1)))
        before = Path("/proc/self/io").read_text().split()[1]
        write(path, at(count - 2))
        return int(Path("/proc/self/io").read_text().split()[1]) - int(before)

    few, many = bytes_read(1_000), bytes_read(20_000)
    assert few == pytest.approx(many, abs=1_000)
    assert many < 100_000
    assert steps(path) == [*range(1, 19_999)]
    assert steps(path.with_name("metrics.aside-2.jsonl")) == [19_999, 20_000]


@given(
    st.lists(
        st.sampled_from(["record", "long", "partial", "damaged", "torn", "empty"]), max_size=9
    ),
    st.integers(0, 9),
    st.booleans(),
)
def test_the_end_of_a_file_is_split_like_a_complete_file(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], step: int, is_cut: bool
) -> None:
    """Read from its end in pieces, a file of good records keeps the lines that it keeps in one."""
    lines = []
    for number, kind in enumerate(kinds, start=1):
        is_later = number > step
        line = to_line(record(number, partial=kind == "partial" and is_later))
        if kind == "long":
            line = to_line(MetricsRecord(0, number, 1, (MetricValue("n" * 300, 0.5, number),)))
        if is_later:  # damage before the last record to keep is not looked for
            line = {"damaged": b"\xff\n", "torn": line[:9] + b"\n", "empty": b"\n"}.get(kind, line)
        lines.append(line)
    data = b"".join(lines)[: -1 if is_cut else None]
    found: list[list[Any]] = []
    for size in (1, 40, 200, 1 << 20):
        path = tmp_path_factory.mktemp("sink") / "metrics.jsonl"
        path.write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("robo_orchard_lab.pipeline.sinks.jsonl._END_BYTES", size)
            sink = JsonLinesSink(path)
            try:
                sink.open(at(step))
            except MetricsFileError as error:
                found.append([str(error.path == path)])
            sink.close()
        found.append([sink.newest_record, *(f.read_bytes() for f in sorted(path.parent.iterdir()))])
    assert found[: len(found) // 4] * 4 == found


def test_earlier_damage_is_found_by_reading(path: Path) -> None:
    """A damaged line far before the resumed step stays in the file, and is an error of a reader."""
    write(path, at(0), *map(record, range(1, 2_001)))
    data = path.read_bytes().replace(b":", b"?", 1)
    path.write_bytes(data)
    write(path, at(2_000), record(2_001))
    assert path.read_bytes() == data + to_line(record(2_001))
    with pytest.raises(MetricsFileError, match="line 1 of"):
        read_metrics(path)


def test_damage_near_the_end_is_named_by_its_line(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged line at the end moves; the warning has its number in the complete file."""
    lines = [to_line(record(step)) for step in range(1, 2_001)]
    path.write_bytes(b"".join([*lines[:1_990], b"damage\n", *lines[1_990:]]))
    write(path, at(2_000))
    assert f"line 1991 of {path} is no record of metrics: b'damage" in caplog.text
    assert path.read_bytes() == b"".join(lines)
    assert path.with_name("metrics.aside-1.jsonl").read_bytes() == b"damage\n"


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
    """Process that holds the file open until its standard input is closed."""
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


def test_second_run_is_refused(path: Path, another_process: subprocess.Popen[str]) -> None:
    """A second run is refused while a run is writing, and accepted after a kill."""
    with pytest.raises(MetricsFileError, match=r"another process is writing .* a path of its own"):
        JsonLinesSink(path).open(at(0))
    another_process.kill()
    another_process.wait()
    write(path, at(0), record(5))
    assert steps(path) == [5]


def test_symlink_is_kept(tmp_path: Path, path: Path) -> None:
    """The target is written and replaced if the path is a link."""
    real = tmp_path / "elsewhere" / "real.jsonl"
    real.parent.mkdir()
    path.symlink_to(real)
    write(path, at(0), record(5), record(10))
    write(path, at(5))
    assert path.is_symlink()
    assert steps(real) == [5]
    assert steps(real.with_name("real.aside-1.jsonl")) == [10]


def test_missing_folders_are_created(tmp_path: Path) -> None:
    """The path may contain folders that do not exist yet."""
    path = tmp_path / "runs" / "1" / "metrics.jsonl"
    sink = JsonLinesSinkConfig(path=str(path))()
    sink.open(at(0))
    sink.close()
    assert path.read_bytes() == b""


def test_file_is_made_again(path: Path) -> None:
    """A file removed during the run is made again at once, and one that was moved within a second.

    Both have all records.
    """
    sink = JsonLinesSink(path)
    sink.open(at(0))
    sink.write(record(1))
    path.unlink()
    sink.write(record(2))
    assert steps(path) == [1, 2]
    path.rename(path.with_name("moved.jsonl"))
    written = 2
    for written in range(3, 10**6):
        sink.write(record(written))
        if path.exists():
            break
    sink.close()
    assert steps(path) == [*range(1, written + 1)]


# --- data frames -----------------------------------------------------------------------------


def write_records(path: Path) -> None:
    """Write three records: with a metric of an earlier step, non-finite values, and a partial one.

    The first records have step 2 to 4, the last one, of a run that ended, step 5.
    """
    named = [
        (2, {"loss": 0.5, "lr": 0.1}, []),
        (4, {"loss": math.nan}, [(3, "grad_norm", math.inf), (2, "eval/acc", 0.25)]),
        (5, {"loss": -math.inf, "eval/acc": 1.0}, []),
    ]
    write(
        path,
        at(0),
        *(
            MetricsRecord(
                step // 4,
                step,
                step - 1,
                tuple(
                    [MetricValue(name, value, s) for s, name, value in earlier]
                    + [MetricValue(name, value, step) for name, value in own.items()]
                ),
                partial=step == 5,
            )
            for step, own, earlier in named
        ),
    )


COLUMNS = {
    "epoch_id": [0, None, 1, 1],
    "global_step_id": [2, 3, 4, 5],
    "optimizer_step_id": [1, None, 3, 4],
    "partial": [False, None, False, True],
    "eval/acc": [0.25, None, None, 1.0],
    "grad_norm": [None, math.inf, None, None],
    "loss": [0.5, None, math.nan, -math.inf],
    "lr": [0.1, None, None, None],
}


def test_a_polars_frame_has_a_row_for_each_step(path: Path) -> None:
    """Steps are ints, NaN and infinities stay, and a metric without a value is null."""
    pytest.importorskip("polars")
    write_records(path)
    frame = read_metrics(path, frame="polars")
    found = {name: frame[name].to_list() for name in frame.columns}
    assert repr(found) == repr(COLUMNS)
    kinds = [str(kind) for kind in frame.schema.values()]
    assert kinds == ["Int64", "Int64", "Int64", "Boolean", *["Float64"] * 4]


def test_a_pandas_frame_distinguishes_missing_values_from_nan(path: Path) -> None:
    """Columns with missing values are nullable, and a NaN is not missing."""
    pandas = pytest.importorskip("pandas")
    write_records(path)
    frame = read_metrics(path, frame="pandas")
    found = {
        name: [None if value is pandas.NA else value for value in frame[name].tolist()]
        for name in frame.columns
    }
    assert repr(found) == repr(COLUMNS)
    kinds = [str(kind) for kind in frame.dtypes]
    assert kinds == ["Int64", "int64", "Int64", "boolean", *["Float64"] * 4]


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_frame_of_a_run_in_progress_lacks_the_torn_line(
    path: Path, kind: Literal["pandas", "polars"]
) -> None:
    """A frame excludes a torn last line; damage is an error; no records are no rows."""
    pytest.importorskip(kind)
    path.write_bytes(b"")
    assert len(read_metrics(path, frame=kind)) == 0
    write(path, at(0), record(1), record(2))
    complete = path.read_bytes()
    path.write_bytes(complete + to_line(record(3))[:-10])
    assert len(read_metrics(path, frame=kind)) == 2
    path.write_bytes(b'{"epoch_id": 0}\n' + complete)
    with pytest.raises(MetricsFileError, match=r"line 1 of .* is no record of metrics"):
        read_metrics(path, frame=kind)


@pytest.mark.parametrize("value", ["[1.0, 2.0]", '{"a": 1.0}', '"text"', "null"])
def test_values_that_are_no_numbers_are_no_records(path: Path, value: str) -> None:
    """A vector or a nested value is an error with its line, for records and for frames."""
    pytest.importorskip("polars")
    write(path, at(0), record(1), record(2))
    path.write_text(path.read_text().replace("1.0", value))
    for frame in (None, "polars"):
        with pytest.raises(MetricsFileError, match=r"line 1 of .* is no record of metrics"):
            read_metrics(path, frame=frame)


def test_a_frame_refuses_a_metric_named_like_a_counter(path: Path) -> None:
    """Two columns of one name are an error; the records are readable."""
    pytest.importorskip("polars")
    named = MetricsRecord(0, 1, 1, (MetricValue("epoch_id", 0.5, 1),))
    write(path, at(0), named)
    with pytest.raises(MetricsFileError, match="a metric named 'epoch_id'"):
        read_metrics(path, frame="polars")
    assert read_metrics(path) == [named]


def test_a_frame_of_an_unknown_or_missing_package_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the packages, or the command that installs one."""
    with pytest.raises(ValueError, match="expected frame='pandas' or frame='polars'"):
        read_metrics(path, frame="arrow")  # type: ignore[call-overload]
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError, match=r"frame='polars' requires polars.*pip install polars"):
        read_metrics(path, frame="polars")


def test_a_frame_needs_no_object_for_each_value(path: Path) -> None:
    """Reading 20,000 records allocates less than 80 bytes for each value."""
    pytest.importorskip("polars")
    lines = (to_line(record(step)) for step in range(1, 20_001))
    path.write_bytes(b"".join(lines))
    tracemalloc.start()
    read_metrics(path, frame="polars")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 5 * 80  # four counters and a metric
