"""Time to list checkpoints, and to open and read metrics files, by their number of entries.

The time of an entry must not grow with the number of entries.
"""

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import thread_time

from benchmarks.environment import describe
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Spread
from robo_orchard_lab.pipeline.checkpoint.listing import RootListing
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    ReadLimits,
    step_dir_name,
)
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.sinks import JsonLinesSink, read_metrics
from robo_orchard_lab.pipeline.sinks.jsonl import to_line

BAR = 1.5  # of the time of an entry in the smallest folder


def run(*, quick: bool) -> Report:
    saves = (100, 1_000) if quick else (100, 1_000, 10_000)
    records = (1_000, 10_000) if quick else (1_000, 10_000, 100_000)
    tables = [
        _table("Checkpoints: first listing of a root", "saves", saves, _list_first),
        _table("Checkpoints: the next listing by the same store", "saves", saves, _list_again),
        _table("Metrics file: opened by a resumed run", "records", records, _open),
        _table("Metrics file: read as records", "records", records, _read),
    ]
    return Report("large_folders", tables, environment=describe(["torch"]))


def _table(
    title: str, what: str, counts: tuple[int, ...], measure: Callable[[int, Path], float]
) -> Table:
    each: list[float] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            each.append(measure(count, Path(folder)) / count * 1e6)
    rows = [
        Row(
            f"{count:,} {what}",
            _exactly(us),
            _exactly(us / each[0]),
            BAR if us is not each[0] else None,
            f"{us * count / 1e6:.2f} s in all",
        )
        for count, us in zip(counts, each, strict=True)
    ]
    return Table(title, f"us of CPU for each of the {what}", rows)


def _exactly(number: float) -> Spread:
    return Spread(number, number, number)


def _make_root(count: int, root: Path) -> RootListing:
    names = ("model.safetensors", "optimizer.json", "state.rank00000.json", "trainer.json")
    for step in range(1, count + 1):
        manifest = Manifest(
            step=step,
            serial=step,
            saved_at=datetime.now(UTC),
            ranks=1,
            digest_name="xxh3_128",
            metrics={"eval/val/loss": 1.0},
            metadata={"reason": "every 100 steps"},
            files={name: FileEntry(1000, f"{step:032x}") for name in names},
        )
        folder = root / step_dir_name(step)
        folder.mkdir()
        (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return RootListing(root, ReadLimits())


def _seconds(call: Callable[[], object]) -> float:
    began_at = thread_time()
    call()
    return thread_time() - began_at


def _list_first(count: int, root: Path) -> float:
    return _seconds(_make_root(count, root).read)


def _list_again(count: int, root: Path) -> float:
    listing = _make_root(count, root)
    assert len(listing.read().infos) == count
    return min(_seconds(listing.read) for _ in range(3))


def _make_file(count: int, folder: Path) -> Path:
    path = folder / "metrics.jsonl"
    names = ("loss/total", "lr/group0", "perf/steps_per_s", "perf/memory_mib")
    with path.open("wb") as file:
        for step in range(1, count + 1):
            values = tuple(MetricValue(name, 0.1 * step, step) for name in names)
            file.write(to_line(MetricsRecord(0, step, step, values)))
    return path


def _open(count: int, folder: Path) -> float:
    sink = JsonLinesSink(_make_file(count, folder))
    run = PipelineRun.standalone()
    run.progress.global_step_id = count
    args = PipelineHookArgs(run)
    taken = _seconds(lambda: sink.open(args))
    sink.close()
    return taken


def _read(count: int, folder: Path) -> float:
    path = _make_file(count, folder)
    return _seconds(lambda: read_metrics(path))
