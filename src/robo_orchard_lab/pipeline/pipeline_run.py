"""Objects of one run that the trainer creates and all hooks share: PipelineRun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.metric_mode import Mode
from robo_orchard_lab.pipeline.batch_processor import (
    BatchProcessor,
    SimpleBatchProcessor,
    count_batches,
    count_samples,
)
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError
from robo_orchard_lab.pipeline.isolation import isolated_evaluation
from robo_orchard_lab.pipeline.media import Report
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.model import WeightSet, autocast_context
from robo_orchard_lab.pipeline.progress import TrainerLimits, TrainerProgress
from robo_orchard_lab.pipeline.requests import Request, Requests
from robo_orchard_lab.pipeline.run.durable import OutputFile
from robo_orchard_lab.pipeline.run.run_state import RunStateFile

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from robo_orchard_lab.pipeline.checkpoint import FiniteCheck
    from robo_orchard_lab.pipeline.data import TrainingData


class Snapshot(NamedTuple):
    """State of a run at a commit point; tensors are references, not copies."""

    parts: Mapping[str, Any]
    """State shared by all ranks, by the name of its file."""
    of_rank: Mapping[str, Any]
    """State of this rank."""
    about: Mapping[str, Any]
    """Metadata for people: counters, configuration, command, versions."""
    finite: FiniteCheck
    """Weights and optimizer state, which should be finite."""


class Locate(Protocol):
    """Function that returns the place of a setting, for messages."""

    def __call__(self, owner: str, *setting: str | int) -> str:
        """Return file, line and path in an experiment's file, else owner and setting with dots.

        Args:
            owner: name of a hook, or ``lr_scheduler`` or ``data``.
            setting: keys of the setting; none for the owner itself.
        """
        ...


def dotted_setting(owner: str, *setting: str | int) -> str:
    """Return owner and setting with dots, the place of a setting in a script.

    >>> dotted_setting("EarlyStopping", "monitor")
    'EarlyStopping.monitor'
    """
    return ".".join(map(str, (owner, *setting)))


def _no_snapshot() -> Snapshot:
    raise PipelineStateError("a run without a trainer has no snapshot; create a HookBasedTrainer")


@dataclass(slots=True, eq=False, repr=False)
class PipelineRun:
    """Objects of one run that all scopes share; hooks reach the run as ``args.run``.

    The trainer creates the run. :meth:`standalone` creates a run without a trainer.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    batch_processor: BatchProcessor
    limits: TrainerLimits
    progress: TrainerProgress
    metrics: MetricsBoard
    agreement: Agreement
    requests: Requests
    optimizers: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)
    """Optimizers by name; the only optimizer without a name is under ``""``."""
    lr_schedulers: Mapping[str, LRScheduler] = field(default_factory=dict)
    """LR schedulers by the names of their optimizers."""
    scalers: Mapping[str, Any] = field(default_factory=dict)
    """Gradient scalers by the names of their optimizers; empty except for fp16."""
    dataloader: Iterable[Any] = ()
    data: TrainingData | None = None
    """Batches of :attr:`dataloader` in their order; None in a run without a trainer."""
    folder: Path | None = None
    """Run folder for the files of hooks, or None."""
    resumed_from: Path | None = None
    """Checkpoint that the run continues; None for a run from the beginning."""
    state_file: RunStateFile = field(default_factory=RunStateFile)
    """Writer of run_state.json; writes nothing in a run without a folder."""

    # Registries: hooks add themselves under their names when the loop begins.
    evaluations: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    """Function that executes an evaluation, given its ``PipelineHookArgs``, by hook name."""
    evaluated_loaders: dict[str, str] = field(default_factory=dict)
    """Name of the hook that evaluates a loader, by loader name."""
    weight_sets: dict[str, WeightSet] = field(default_factory=dict)
    """Alternative weights to evaluate and to save, by hook name."""
    savers: dict[str, Callable[[Sequence[Request]], None]] = field(default_factory=dict)
    """Function that writes a checkpoint for a list of requests, by hook name."""
    checkpoint_folders: dict[Path, str] = field(default_factory=dict)
    """Name of the hook that saves checkpoints in a folder."""
    outputs: dict[Path, OutputFile] = field(default_factory=dict)
    """Files of hooks, by path; the trainer writes again what could not be written."""
    constants: frozenset[str] = frozenset()
    """Names of buffers that were non-finite before the run, such as masks."""
    loss_checks: dict[str, Callable[[], bool]] = field(default_factory=dict)
    """Function that returns True if all losses since its last call are finite, by hook name; called
    for each checkpoint."""
    before_saves: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Function to call before weights or a checkpoint are written, by hook name; a failure keeps
    them from being written."""
    failures: list[Exception] = field(default_factory=list)
    """Errors of lost outputs; the trainer raises the first error at the end of the run."""

    after_updates: dict[str, Callable[[bool], None]] = field(default_factory=dict)
    """With several optimizers: function to call after all updates of a step, by hook name; the
    argument is True if an update was committed."""
    lr_settings: Any = None
    """Plain data that identifies the learning rates and LR schedulers, for checkpoints; or None."""
    metric_modes: dict[str, Mode] = field(default_factory=dict)
    """Direction of each metric that a hook monitors, ``"min"`` or ``"max"``."""
    show_notice: Callable[[str], bool] = lambda text: False
    """Function that replaces the progress bar with a line until its next update, and returns False
    without a progress bar. A signal handler may call it."""
    start_checks: list[Callable[[], Any]] = field(default_factory=list)
    """Checks to make before the first step, when the loop has begun for all hooks."""
    locate: Locate = dotted_setting
    """Function that returns the place of a hook's or a part's setting, for messages."""
    take_snapshot: Callable[[], Snapshot] = _no_snapshot
    """Function that collects the state for a checkpoint. All ranks call it at a commit point."""
    describe: Callable[[], Mapping[str, Any]] = dict
    """Function that describes configuration, command, versions and git state, as plain data."""
    should_defer_saves: Callable[[], bool] = lambda: False
    """Function that returns True within an accumulation window of a sharded model, until whose end
    saves and stops wait."""
    count_samples: Callable[[Any], int] = count_samples
    """Function that counts the samples of a step's batch: the batch processor's method where
    defined, else the number of dataset indices, else by the batch's structure."""
    updated_parameters: dict[str, tuple[list[int], list[torch.nn.Parameter]]] = field(
        default_factory=dict
    )
    """Ids of each optimizer's parameters, and the parameters in the order of the model; a cache."""
    commit_seconds: float = 0.0
    """Total time in evaluations, logging points and saves, in seconds."""
    stage_listeners: dict[str, Callable[[str, bool], Any]] = field(default_factory=dict)
    """Function to call with ``logging`` or ``saving`` and True when such work of a commit point
    begins, and with False when it ends, by hook name."""
    report: Report = field(init=False)
    """Images, text and tables of the run."""
    may_skip_batches: bool = False
    """True if a hook called :meth:`PipelineHookArgs.allow_skip_batch`."""

    def __post_init__(self) -> None:
        counts: object = self.batch_processor if self.data is None else self.data
        self.count_samples = getattr(counts, "count_samples", self.count_samples)
        self.report = Report(self.progress, self.folder, self.accelerator.process_index)
        if self.accelerator.scaler is not None and not self.scalers:
            self.scalers = {"": self.accelerator.scaler}

    @classmethod
    def standalone(
        cls,
        *,
        accelerator: Accelerator | None = None,
        model: torch.nn.Module | None = None,
        batch_processor: BatchProcessor | None = None,
        limits: TrainerLimits | None = None,
        dataloader: Iterable[Any] = (),
    ) -> PipelineRun:
        """Create a run without a trainer, to call hooks in tests, examples and evaluations.

        Defaults: ``Accelerator()``, ``torch.nn.Identity()``, a processor that returns the model's
        outputs and no loss, one epoch, no batches.
        """
        progress, agreement = TrainerProgress(), Agreement()
        return cls(
            accelerator=Accelerator() if accelerator is None else accelerator,
            model=torch.nn.Identity() if model is None else model,
            batch_processor=_FORWARD_ONLY if batch_processor is None else batch_processor,
            limits=TrainerLimits(max_epoch=1) if limits is None else limits,
            progress=progress,
            metrics=MetricsBoard(progress),
            agreement=agreement,
            requests=Requests(agreement),
            dataloader=dataloader,
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Optimizer without a name; None without a backward pass and with several optimizers."""
        return self.optimizers.get("")

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """LR scheduler of :attr:`optimizer`, or None."""
        return self.lr_schedulers.get("")

    @property
    def optimizer_names(self) -> list[str]:
        """Names of the optimizers; empty for one optimizer without a name."""
        return [name for name in self.optimizers if name]

    @property
    def steps_per_epoch(self) -> int | None:
        """Number of steps in an epoch on this rank; None for data without a length."""
        return count_batches(self.dataloader) if self.data is None else self.data.steps_per_epoch

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Report the body as work of a commit point to :attr:`stage_listeners`."""
        listeners = tuple(self.stage_listeners.values())
        for listener in listeners:
            listener(name, True)
        try:
            yield
        finally:
            for listener in listeners:
                listener(name, False)

    def check_optimizer(self, name: str, owner: str, *setting: str | int) -> None:
        """Raise a ``PipelineConfigError`` if no optimizer has a name from a hook's setting.

        Without any optimizer, as in an evaluation of saved weights, each name is accepted.
        """
        known = self.optimizer_names
        if self.optimizers and name not in known:
            hint = suggest_name(name, known, "optimizers:")
            if not known:
                hint = f"the trainer has one optimizer without a name: leave out {setting[0]}"
            place = self.locate(owner, *setting)
            raise PipelineConfigError(f"{place}: no optimizer is named {name!r}; {hint}")

    def write_file(
        self,
        path: str | os.PathLike[str],
        data: bytes | memoryview,
        by: str,
        *,
        is_required: bool = True,
    ) -> bool:
        """Replace a file atomically; return True if the contents are on the disk.

        If they are not, as on a full disk, the run continues: the contents stay in host memory, and
        are written at a later commit point, or at the end of the run, which fails without them.

        Args:
            path: path of the file; missing folders are created.
            data: contents, which must not change afterwards.
            by: name of the hook, for reports.
            is_required: a run that ends without the file fails.
        """
        key, new = Path(os.path.abspath(path)), OutputFile(path, by, is_required=is_required)
        return self.outputs.setdefault(key, new).write(data)

    def write_folder(
        self, path: str | os.PathLike[str], write: Callable[[Path], object], by: str
    ) -> bool:
        """Replace a folder atomically; return True if the contents are on the disk.

        If they are not, ``write`` is called again as in `write_file`.

        Args:
            path: path of the folder; missing parents are created.
            write: function that fills an empty folder, from data that does not change afterwards.
            by: name of the hook, for reports.
        """
        key, new = Path(os.path.abspath(path)), OutputFile(path, by)
        return self.outputs.setdefault(key, new).write_folder(write)

    def retry_writes(self) -> None:
        """Write again what could not be written before; on the ranks that tried."""
        self.state_file.retry()
        for output in self.outputs.values():
            output.retry()

    def weight_set(self, name: str) -> WeightSet:
        """Return the weights that a hook keeps.

        Raises:
            PipelineConfigError: no hook of that name keeps weights; the message lists those that
                do.
        """
        if name not in self.weight_sets:
            hint = suggest_name(name, list(self.weight_sets), "hooks that keep weights:")
            raise PipelineConfigError(
                f"no hook named {name!r} keeps weights; {hint}"
                + ("" if self.weight_sets else "; register an EMA")
            )
        return self.weight_sets[name]

    def applied(self, weights: str | None) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights that a hook keeps.

        None keeps the model's own weights. Errors are those of :meth:`weight_set`.
        """
        return nullcontext() if weights is None else self.weight_set(weights).applied()

    @contextmanager
    def evaluating(self, weights: str | None = None, *, rank_local: bool = False) -> Iterator[Any]:
        """Run the body in evaluation mode; see :meth:`PipelineHookArgs.evaluating`."""
        accelerator, is_shared = self.accelerator, not rank_local
        isolated = isolated_evaluation(
            self.model, processes=accelerator.num_processes, is_shared=is_shared
        )
        with self.applied(weights), isolated as model, autocast_context(accelerator)():
            yield model


_FORWARD_ONLY = SimpleBatchProcessor.from_callable(
    lambda model, batch: (model(batch), None), need_backward=False
)
