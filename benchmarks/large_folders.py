"""Time of checkpoint roots, metrics files, runs and models by their number of entries.

The time of an entry must not grow with the number of entries.
"""

import gc
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from benchmarks.contenders import ours
from benchmarks.environment import describe
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Spread
from benchmarks.workload import Job, Settings, TinyModel
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor
from robo_orchard_lab.pipeline.checkpoint.listing import RootListing
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    ReadLimits,
    step_dir_name,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.sinks import JsonLinesSink, JsonLinesSinkConfig, read_metrics
from robo_orchard_lab.pipeline.sinks.jsonl import to_line

BAR = 1.5  # of the time of an entry in the smallest folder


def run(*, quick: bool) -> Report:
    saves = (100, 1_000) if quick else (100, 1_000, 10_000)
    records = (1_000, 10_000) if quick else (1_000, 10_000, 100_000)
    parameters = (100, 1_000) if quick else (1_000, 10_000, 100_000)
    tables = [
        _table("Checkpoints: first listing of a root", "saves", saves, _list_first),
        _table("Checkpoints: the next listing by the same store", "saves", saves, _list_again),
        _opening(records if quick else (*records, 1_000_000)),
        _table("Metrics file: read as records", "records", records, _read),
        *(
            _table(f"Metrics file: read as a frame of {kind}", "records", records, read)
            for kind, read in (("polars", _read_frame),)
            if find_spec(kind)
        ),
        *_epochs(500 if quick else 100_000),
        *(
            _table(f"Model: {what}", "parameters", parameters, _of_model(what))
            for what in ("set-up of a trainer", "a save", "a resume, with its set-up")
        ),
        _steps(parameters),
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


def _opening(counts: tuple[int, ...]) -> Table:
    """Return the time to open a file, which must not depend on the number of records."""
    taken = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            taken.append(_open(_make_file(count, Path(folder)), count))
    rows = [
        Row(
            f"{count:,} records",
            _exactly(each * 1e3),
            _exactly(each / taken[0]),
            BAR if each is not taken[0] else None,
        )
        for count, each in zip(counts, taken, strict=True)
    ]
    return Table("Metrics file: opened by a resumed run", "ms of CPU", rows)


def _open(path: Path, count: int) -> float:
    run = PipelineRun.standalone()
    run.progress.global_step_id = count
    args = PipelineHookArgs(run)
    taken = []
    for _ in range(5):
        sink = JsonLinesSink(path)
        taken.append(_seconds(lambda sink=sink: sink.open(args)))  # type: ignore[misc]
        sink.close()
    return median(taken)


def _read(count: int, folder: Path) -> float:
    path = _make_file(count, folder)
    return _seconds(lambda: read_metrics(path))


def _read_frame(count: int, folder: Path) -> float:
    path = _make_file(count, folder)
    read_metrics(path, frame="polars")  # imports
    return _seconds(lambda: read_metrics(path, frame="polars"))


# --- epochs --------------------------------------------------------------------------------------


class _Marks(PipelineHooks):
    """CPU time at the end of each 50th epoch, and memory after a tenth and at the end."""

    def __init__(self, epochs: int, model: TinyModel) -> None:
        super().__init__()
        self.times: list[float] = []
        self.memory: list[float] = []
        process = psutil.Process()

        @self.on_epoch.after
        def mark(args: PipelineHookArgs) -> None:
            if args.progress.epoch_id % 50 == 0:
                self.times.append(thread_time())
                model.forward_began_ns.clear()
            if args.progress.epoch_id in (epochs // 10, epochs - 1):
                gc.collect()
                self.memory.append(process.memory_info().rss / 2**20)


def _epochs(count: int) -> list[Table]:
    """Train epochs of one step with the default logging and four saves."""
    with tempfile.TemporaryDirectory() as name, _quiet():
        folder = Path(name)
        job = Job(Settings(steps=1))
        marks = _Marks(count, job.model)
        trainer = ours.make_trainer(job, 0, run_folder=name, max_epoch=count)
        for hook in (
            ProgressBarHookConfig(plain=True),
            LossTrackerConfig(),
            StatsMonitorConfig(),
            MetricsLoggerConfig(
                every="50 steps", sinks=[JsonLinesSinkConfig(path=str(folder / "metrics.jsonl"))]
            ),
            SaveCheckpointConfig(every=f"{count // 4} epochs", keep_last=4),
            marks,
        ):
            trainer.hooks += hook
        trainer()
        saves = [
            sum(file.stat().st_size for file in save.iterdir()) / 1024
            for save in sorted((folder / "checkpoints").glob("step_*"))
        ]
        files = sum(1 for each in folder.rglob("*") if each.is_file())
    each = [(after - before) / 50 * 1e6 for before, after in pairwise(marks.times)]
    tenth = max(1, len(each) // 10)
    title = f"Run of {count:,} epochs of one step: "
    found: list[tuple[str, str, Sequence[float], float]] = [
        ("an epoch", "us of CPU", [median(each[:tenth]), median(each[-tenth:])], BAR),
        ("memory", "MiB, after a tenth and at the end", marks.memory, 1.01),
        ("a save", f"KiB, after a quarter and at the end; {files} files in all", saves[::3], BAR),
    ]
    return [
        Table(
            title + what,
            unit,
            [
                Row("early", _exactly(early)),
                Row("late", _exactly(late), _exactly(late / early), bar),
            ],
        )
        for what, unit, (early, late), bar in found
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("robo_orchard_lab")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


# --- parameters ----------------------------------------------------------------------------------


class _Biases(torch.nn.Module):
    """Sum of parameters of 8 numbers each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.biases = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.zeros(8)) for _ in range(count)]
        )

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([*self.biases]).sum() + batch.sum()


_STEPS = 5


def _model(count: int) -> tuple[_Biases, torch.optim.Optimizer]:
    model = _Biases(count)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _bare(count: int) -> list[float]:
    """Return the CPU seconds of each step of a plain loop."""
    model, optimizer = _model(count)
    marks = [thread_time()]
    for batch in DataLoader([torch.ones(8)] * _STEPS):  # type: ignore[arg-type]  # a dataset
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(thread_time())
    return [after - before for before, after in pairwise(marks)]


def _trainer(count: int, marks: list[float], **options: Any) -> HookBasedTrainer:
    model, optimizer = _model(count)
    hooks = PipelineHooks("marks")
    hooks.on_step.before(lambda args: marks.append(thread_time()))
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        dataloader=DataLoader([torch.ones(8)] * _STEPS),  # type: ignore[arg-type]  # a dataset
        batch_processor=SimpleBatchProcessor.from_callable(
            lambda model, batch: (None, model(batch))
        ),
        optimizer=optimizer,
        hooks=[hooks],
        max_epoch=1,
        **options,
    )


@cache
def _measure_model(count: int) -> dict[str, float]:
    """Return CPU seconds of a trainer, a save and a resume, and a step's ratio to a bare loop's."""
    marks: list[float] = []
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "save"
        _trainer(10, [])  # imports
        trainers: list[HookBasedTrainer] = []
        found["set-up of a trainer"] = _seconds(lambda: trainers.append(_trainer(count, marks)))
        bare = _bare(count)
        trainers[0]()
        bare += _bare(count)
        found["a save"] = _seconds(lambda: trainers[0].save_checkpoint(path))
        found["a resume, with its set-up"] = _seconds(
            lambda: _trainer(count, [], resume_from=path) and None
        )
    steps = [after - before for before, after in pairwise(marks)]
    found["bare step"], found["step"] = min(bare), min(steps)
    return found


def _of_model(what: str) -> Callable[[int, Path], float]:
    return lambda count, folder: _measure_model(count)[what]


def _steps(counts: tuple[int, ...]) -> Table:
    rows = []
    for count in counts:
        found = _measure_model(count)
        rows.append(
            Row(
                f"{count:,} parameters",
                _exactly(found["step"] / count * 1e6),
                _exactly(found["step"] / found["bare step"]),
                1.1,
                f"{found['bare step'] / count * 1e6:.1f} us in a bare loop",
            )
        )
    return Table("Model: a step, beside a bare loop's", "us of CPU for each parameter", rows)
