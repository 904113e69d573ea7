"""Arguments that every hook receives: the run, its counters, and the scope's own fields."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from accelerate import Accelerator

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.pipeline.batch_processor import (
    BatchProcessor,
    SimpleBatchProcessor,
    count_batches,
    count_samples,
)
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.distributed.failure_watch import report_failure
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError
from robo_orchard_lab.pipeline.isolation import isolated_evaluation
from robo_orchard_lab.pipeline.media import Report
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.model import WeightSet, autocast_context
from robo_orchard_lab.pipeline.progress import (
    CHANNEL_NAMES,
    ChannelName,
    TrainerLimits,
    TrainerProgress,
)
from robo_orchard_lab.pipeline.requests import Request, Requests
from robo_orchard_lab.pipeline.run.retried_write import OutputFile
from robo_orchard_lab.pipeline.run.run_state import RunStateFile

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from robo_orchard_lab.pipeline.batch_processor import LossWeighting
    from robo_orchard_lab.pipeline.checkpoint import FiniteCheck
    from robo_orchard_lab.pipeline.data import TrainingData

ArgsT = TypeVar("ArgsT")

_STEP_CHANNELS: tuple[ChannelName, ...] = (
    "on_step",
    "on_batch",
    "on_model_forward",
    "on_model_backward",
    "on_optimizer_step",
)
_UPDATE_CHANNELS: tuple[ChannelName, ...] = ("on_optimizer_step", "on_step")
_BACKING_FIELD = {
    "loss": "attached_loss",
    "batch_size": "batch",
    "is_padding_step": "_loss_divisor",
    "loss_weight": "_given_loss_weight",
    "losses": "attached_loss",
    "optimizer_name": "attached_loss",
    "sample_numbers": "batch",
    "sample_indices": "batch",
}
"""Field behind each property that is valid in some channels only, where the names differ."""
SKIP_TOO_LATE = (
    "args.skip_batch: expected a call before the forward pass; call it in a before of on_step or "
    "on_batch"
)
_REMEDIES = {
    "loss": "it is detached; to train on another loss, assign args.attached_loss in a before of "
    "on_model_backward",
    "at_accumulation_boundary": "set Accelerator(gradient_accumulation_steps=...); to skip an "
    "update, assign args.skip_reason in a before of on_optimizer_step",
    "loss_divisor": "to scale a loss, assign args.attached_loss in a before of on_model_backward",
    "loss_weight": "return (outputs, loss, weight) from the batch processor",
    "given_loss_weight": "return (outputs, loss, weight) from the batch processor",
    "batch_skip_reason": "call args.skip_batch(reason) in a before of on_step or on_batch",
    "batch_size": "define count_samples(batch) on the batch processor",
    "update_committed": "to skip an update, assign args.skip_reason in a before of "
    "on_optimizer_step",
    "epoch_completed": "to end the run, call args.requests.stop(...)",
    "exception": "to fail with another error, raise it",
}
"""Advice for an assignment to a read-only property."""


def _valid_in(channels: tuple[ChannelName, ...]) -> dict[str, tuple[ChannelName, ...]]:
    return {"channels": channels}


def _refuse_assignments(cls: type[ArgsT]) -> type[ArgsT]:
    """Make an assignment to a property of ``cls`` raise an AttributeError with advice."""
    assignable = ", ".join(name for name in cls.__slots__ if not name.startswith("_"))  # type: ignore[attr-defined]  # of a dataclass with slots

    def refuse(args: object, value: object, name: str) -> NoReturn:
        advice = _REMEDIES.get(name, f"hooks may assign {assignable}")
        raise AttributeError(f"args.{name} is read-only for hooks; {advice}")

    for name, member in list(vars(cls).items()):
        if isinstance(member, property):
            setattr(cls, name, member.setter(partial(refuse, name=name)))
    return cls


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
    state_file: RunStateFile = field(default_factory=RunStateFile)
    """Writer of run_state.json; writes nothing in a run without a folder."""

    # Registries: hooks add themselves under their names when the loop begins.
    evaluations: dict[str, Callable[[PipelineHookArgs], None]] = field(default_factory=dict)
    """Function that executes an evaluation, by hook name."""
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
    start_checks: list[Callable[[], Any]] = field(default_factory=list)
    """Checks to make before the first step, when the loop has begun for all hooks."""
    locate: Locate = dotted_setting
    """Function that returns the place of a hook's or a part's setting, for messages."""
    take_snapshot: Callable[[], Snapshot] = _no_snapshot
    """Function that collects the state for a checkpoint. All ranks call it at a commit point."""
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


@dataclass(slots=True, eq=False)
class NamedUpdates:
    """State of a step with several optimizers."""

    name: str | None = None
    """Optimizer of the current entry."""
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """Detached losses of the step by name."""
    is_counted: bool = False
    """True if an update of this step was committed."""


@_refuse_assignments
@dataclass(slots=True, eq=False, repr=False, init=False)
class PipelineHookArgs:
    """Argument of every hook: one object for each scope of work.

    All channels of a step share one object; the loop, each epoch and each evaluation have their
    own. Counters show the value at the time of reading. A field that is valid in some channels
    only has its default in the others; see :meth:`channels_of`.

    With several optimizers, the forward pass, backward pass and update of one loss are an entry:
    :attr:`optimizer_name`, :attr:`optimizer`, :attr:`lr_scheduler`, :attr:`loss`,
    :attr:`attached_loss`, :attr:`grad_norm`, :attr:`skip_reason` and :attr:`update_committed` are
    those of the current entry, and None outside of entries.

    Hooks may assign the public fields, and change the contents of the batch and the model's
    weights. Everything else is read-only, see :meth:`is_assignable`: the engine alone assigns the
    fields with an underscore, and reads them, which saves the call of a property.
    """

    batch: Any = field(metadata=_valid_in(_STEP_CHANNELS))
    """Batch, on the accelerator's device. A batch assigned in a ``before`` of ``on_step``,
    ``on_batch`` or ``on_model_forward`` replaces it; :attr:`batch_size` stays."""
    model_outputs: Any = field(metadata=_valid_in(_STEP_CHANNELS))
    """Outputs of the batch processor; None until the forward pass is done. Outputs assigned in
    an ``after`` of ``on_model_forward`` are those of all later hooks, such as metrics."""
    attached_loss: torch.Tensor | None = field(metadata=_valid_in(_STEP_CHANNELS))
    """Loss with its autograd graph; hooks read :attr:`loss`. A loss assigned in an ``after`` of
    ``on_model_forward`` or a ``before`` of ``on_model_backward`` replaces it."""
    grad_norm: torch.Tensor | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    """Norm of all gradients before clipping, on their device; None until a hook computes it."""
    grad_norm_order: float | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    """Order of :attr:`grad_norm`, such as 2."""
    gradients_changed: bool = field(metadata=_valid_in(_UPDATE_CHANNELS))
    """True if a ``before`` of ``on_optimizer_step`` changed the gradients after :attr:`grad_norm`
    was computed, as clipping does. The hook that changes them sets this."""
    skip_reason: str | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    """Reason to skip the optimizer step, set by a ``before`` of ``on_optimizer_step`` on every
    rank. Weights, optimizer and LR scheduler keep their state, and the gradients are dropped."""
    _run: PipelineRun
    _at_accumulation_boundary: bool = field(metadata=_valid_in(_STEP_CHANNELS))
    _loss_divisor: float = field(metadata=_valid_in(_STEP_CHANNELS))
    _given_loss_weight: torch.Tensor | None = field(metadata=_valid_in(_STEP_CHANNELS))
    _loss_weighting: LossWeighting | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    _update_committed: bool | None = field(metadata=_valid_in(_UPDATE_CHANNELS))
    _batch_skip_reason: str | None = field(metadata=_valid_in(_STEP_CHANNELS))
    _epoch_completed: bool = field(metadata=_valid_in(("on_epoch",)))
    _evaluation: str | None = field(metadata=_valid_in(("on_evaluation",)))
    _exception: BaseException | None
    _batch_size: int | None
    _named: NamedUpdates | None

    def __init__(
        self,
        run: PipelineRun | None = None,
        batch: Any = None,
        at_accumulation_boundary: bool = False,
        loss_divisor: float = 1.0,
        model_outputs: Any = None,
        attached_loss: torch.Tensor | None = None,
        update_committed: bool | None = None,
        epoch_completed: bool = False,
        evaluation: str | None = None,
        exception: BaseException | None = None,
    ) -> None:
        self._run = PipelineRun.standalone() if run is None else run
        self.batch = batch
        self.model_outputs = model_outputs
        self.attached_loss = attached_loss
        self.grad_norm = self.grad_norm_order = self.skip_reason = None
        self.gradients_changed = False
        self._at_accumulation_boundary = at_accumulation_boundary
        self._loss_divisor = loss_divisor
        self._given_loss_weight = self._loss_weighting = self._batch_size = None
        self._update_committed = update_committed
        self._batch_skip_reason = None
        self._epoch_completed = epoch_completed
        self._evaluation = evaluation
        self._exception = exception
        self._named = None

    @property
    def run(self) -> PipelineRun:
        """Objects that all scopes share; the properties below read them."""
        return self._run

    @property
    def at_accumulation_boundary(self) -> bool:
        """True if this step ends an accumulation window, so that an optimizer step is due."""
        return self._at_accumulation_boundary

    @property
    def loss_divisor(self) -> float:
        """Divisor of the loss in the backward pass; infinite in a padding step.

        The samples of the accumulation window, averaged over the ranks, divided by the samples of
        this batch.
        """
        return self._loss_divisor

    @property
    def given_loss_weight(self) -> torch.Tensor | None:
        """Weight that the batch processor returned with the loss, on the device, or None."""
        return self._given_loss_weight

    @property
    def loss_weighting(self) -> LossWeighting | None:
        """Scaling of the window's gradients for losses with weights.

        None without weights, and for a window of one batch on one rank.
        """
        return self._loss_weighting

    @property
    def update_committed(self) -> bool | None:
        """True if the optimizer step changed the weights, False if skipped, None before."""
        return self._update_committed

    @property
    def epoch_completed(self) -> bool:
        """In ``after``: True if the epoch reached the end of its data."""
        return self._epoch_completed

    @property
    def evaluation(self) -> str | None:
        """Name of the evaluating hook."""
        return self._evaluation

    @property
    def exception(self) -> BaseException | None:
        """In ``after``: the error that leaves the scope, or None."""
        return self._exception

    @property
    def is_padding_step(self) -> bool:
        """True if this rank has no data for a step, or if a hook has skipped its batch.

        If other ranks have data, the rank takes part with a batch of weight 0: ``batch_size`` is 0,
        ``sample_numbers`` is empty, gradients are zero, and buffers and RNG states are restored.
        Metrics should ignore ``model_outputs`` and ``loss``.
        """
        return self._loss_divisor == math.inf or self._batch_skip_reason is not None

    @property
    def is_filler(self) -> NoReturn:
        """Former name of :attr:`is_padding_step`; raises an AttributeError."""
        raise AttributeError("args.is_filler was renamed; read args.is_padding_step")

    @property
    def batch_size(self) -> int:
        """Number of samples of the batch on this rank; 0 in a padding step.

        Counted on first access, by the batch processor's ``count_samples(batch)`` where defined,
        else by dataset indices, else by the structure of the batch.
        """
        if self._batch_size is None:
            self._batch_size = 0 if self.is_padding_step else self._run.count_samples(self.batch)
        return self._batch_size

    @property
    def loss_weight(self) -> float | torch.Tensor:
        """Weight of this batch's loss in a mean of losses, on this rank; 0 in a padding step.

        The weight that the batch processor returned, or else the number of samples.
        """
        weight = self._given_loss_weight
        return self.batch_size if weight is None else weight

    @property
    def loss(self) -> torch.Tensor | None:
        """Loss of this batch on this rank: detached, not divided, on its device.

        None until the forward pass is done. Reading the number (``.item()``) waits for the
        device.
        """
        # Detached on access: a step without such a hook saves a microsecond.
        return None if self.attached_loss is None else self.attached_loss.detach()

    @property
    def losses(self) -> Mapping[str, torch.Tensor]:
        """Losses of this step by optimizer, like :attr:`loss`; empty with one optimizer.

        The last loss of each name, as far as the step has computed it.
        """
        return {} if self._named is None else self._named.losses

    @property
    def optimizer_name(self) -> str | None:
        """Name of the entry's optimizer; None with one optimizer and outside of entries.

        In a ``before`` of ``on_model_forward`` the name is unknown, and None: the forward pass
        decides which loss follows.
        """
        return None if self._named is None else self._named.name

    def metric_name(self, name: str) -> str:
        """Return a metric's name with that of the entry's optimizer, such as ``grad_norm/g``."""
        owner = self.optimizer_name
        return name if owner is None else f"{name}/{owner}"

    @property
    def progress(self) -> TrainerProgress:
        """All counters."""
        return self._run.progress

    @property
    def epoch_id(self) -> int:
        """Epoch, from 0."""
        return self._run.progress.epoch_id

    @property
    def step_id(self) -> int:
        """Step within the epoch, from 0."""
        return self._run.progress.step_id

    @property
    def global_step_id(self) -> int:
        """Step within the run, from 0."""
        return self._run.progress.global_step_id

    @property
    def optimizer_step_id(self) -> int:
        """Number of committed optimizer steps."""
        return self._run.progress.optimizer_step_id

    @property
    def batch_processor(self) -> BatchProcessor:
        """Batch processor: computes outputs and loss of a batch."""
        return self._run.batch_processor

    @property
    def limits(self) -> TrainerLimits:
        """Limits of the run."""
        return self._run.limits

    @property
    def max_step(self) -> int | None:
        """Limit in steps, or None."""
        return self._run.limits.max_step

    @property
    def max_optimizer_step(self) -> int | None:
        """Limit in optimizer steps, or None."""
        return self._run.limits.max_optimizer_step

    @property
    def max_epoch(self) -> int | None:
        """Limit in epochs, or None."""
        return self._run.limits.max_epoch

    @property
    def accelerator(self) -> Accelerator:
        """Devices, processes and precision."""
        return self._run.accelerator

    @property
    def model(self) -> torch.nn.Module:
        """Model as prepared: on its device, wrapped in DDP for several processes.

        With several optimizers the model is not wrapped: the trainer averages the gradients.
        """
        return self._run.model

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Optimizer that is stepped; None without a backward pass."""
        return self._run.optimizers.get(self.optimizer_name or "")

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """LR scheduler of the optimizer, or None."""
        return self._run.lr_schedulers.get(self.optimizer_name or "")

    @property
    def scaler(self) -> Any:
        """Gradient scaler of the optimizer, for fp16, or None."""
        return self._run.scalers.get(self.optimizer_name or "")

    @property
    def dataloader(self) -> Any:
        """Data loader that was passed to the trainer."""
        return self._run.dataloader

    @property
    def sample_numbers(self) -> Sequence[int] | None:
        """Positions of this rank's samples in the epoch's order, from 0, over the whole job.

        Valid in the channels of a step; empty in a padding step; None for data without positions.
        """
        if self.is_padding_step:
            return []
        return None if self._run.data is None else self._run.data.sample_numbers

    @property
    def sample_indices(self) -> Any:
        """Dataset indices of this rank's samples, as a list.

        Valid in the channels of a step; empty in a padding step; None for data without indices.
        """
        if self.is_padding_step:
            return []
        return None if self._run.data is None else self._run.data.sample_indices

    @property
    def metrics(self) -> MetricsBoard:
        """Metrics board, to publish named scalars."""
        return self._run.metrics

    @property
    def report(self) -> Report:
        """Report, to add images, videos, text, tables and hyperparameters."""
        return self._run.report

    @property
    def requests(self) -> Requests:
        """Requests to the trainer: save, evaluate, log, stop."""
        return self._run.requests

    def begin_entry(self, name: str | None, loss: torch.Tensor | None = None) -> None:
        """Reset the fields of an entry, for the loss of an optimizer; None ends the entries.

        The trainer calls this in a step with several optimizers.
        """
        assert self._named is not None  # set in each step
        self._named.name = name
        self.attached_loss = loss
        self.grad_norm = self.grad_norm_order = self.skip_reason = self._update_committed = None
        self.gradients_changed = False

    @property
    def batch_skip_reason(self) -> str | None:
        """Reason of :meth:`skip_batch`; None if the batch is not skipped."""
        return self._batch_skip_reason

    def skip_batch(self, reason: str) -> None:
        """Skip this batch, in a ``before`` of ``on_step`` or ``on_batch``.

        The step counts, and its hooks run. On one rank there is no forward and no backward pass. On
        several ranks, of which one may skip alone, the rank runs a padding step with its last batch
        that was not skipped, or with this one; see :meth:`allow_skip_batch`. The optimizer step
        uses the mean over the other samples of the accumulation window; without any, there is no
        optimizer step, and ``on_optimizer_step`` does not open.

        Args:
            reason: reason, for the log; the first batch of each reason is logged as a warning.

        Raises:
            PipelineStateError: the batch was processed already, no step is open, or there are
                several ranks and no hook has called :meth:`allow_skip_batch`.
            ValueError: the reason is not a text.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(
                "args.skip_batch: expected a reason, such as 'corrupt sample', found "
                f"{reason!r:.60}"
            )
        is_done = self.model_outputs is not None or self.attached_loss is not None
        if is_done or not self.progress.in_step:
            raise PipelineStateError(SKIP_TOO_LATE)
        if self._run.agreement.several and not self._run.may_skip_batches:
            raise PipelineStateError(
                "args.skip_batch: with several ranks, all of them must know that one may skip a "
                "batch; call args.allow_skip_batch() in a before of on_loop, on every rank"
            )
        if self._loss_divisor != math.inf and self._batch_skip_reason is None:
            self._batch_skip_reason, self._batch_size = reason, 0

    def allow_skip_batch(self) -> None:
        """Allow :meth:`skip_batch` on several ranks; in a ``before`` of ``on_loop``, on every rank.

        Costs a small all-reduce and a multiplication of all gradients per optimizer step,
        and the memory of one batch. Does nothing on one rank.
        """
        self._run.may_skip_batches = True

    def evaluating(
        self, weights: str | None = None, *, rank_local: bool = False
    ) -> AbstractContextManager[Any]:
        """Return a context for samples or rollouts: evaluation mode, no gradients.

        The context yields the model, without DDP's communication. At its end, also after an error,
        modes, buffers, weights and the global RNGs are as before; seed them in the body for equal
        random numbers each time. The body runs in the precision of a batch processor.

        >>> args = PipelineHookArgs()
        >>> with args.evaluating() as model:
        ...     model.training, torch.is_grad_enabled()
        (False, False)
        >>> args.model.training
        True

        Args:
            weights: name of the hook whose weights to use, such as ``"EMA"``; None for the model's
                own.
            rank_local: enter on this rank alone, with its own buffers. Otherwise all ranks enter,
                and a model with buffers has the first rank's: a collective.

        Raises:
            PipelineConfigError: no hook of that name keeps weights.
            PipelineStateError: the weights are applied already, or ``rank_local`` with a sharded
                model, whose forward pass is a collective.
        """
        return self._run.evaluating(weights, rank_local=rank_local)

    def failing(self, error: BaseException | None) -> None:
        """Set :attr:`exception`, and report an error to the other ranks.

        Channels call this before the first ``after`` of a failure, and restore the earlier value
        after the last.
        """
        self._exception = error
        if error is not None:
            report_failure(error)

    @classmethod
    def channels_of(cls, name: str) -> tuple[ChannelName, ...]:
        """Return the channels in which a field is valid.

        >>> PipelineHookArgs.channels_of("epoch_completed")
        ('on_epoch',)
        """
        names = {name, _BACKING_FIELD.get(name, f"_{name}")}
        for declared in fields(cls):
            if declared.name in names:
                channels: tuple[ChannelName, ...] = declared.metadata.get("channels", CHANNEL_NAMES)
                return channels
        if isinstance(getattr(cls, name, None), property):
            return CHANNEL_NAMES
        raise AttributeError(f"{cls.__name__} has no field {name!r}")

    @classmethod
    def is_assignable(cls, name: str) -> bool:
        """Return True if hooks may assign a field.

        >>> PipelineHookArgs.is_assignable("batch"), PipelineHookArgs.is_assignable("loss")
        (True, False)
        """
        cls.channels_of(name)  # raises for an unknown field
        return not name.startswith("_") and name in {declared.name for declared in fields(cls)}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.progress}>"
