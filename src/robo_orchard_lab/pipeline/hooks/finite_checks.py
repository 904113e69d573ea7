"""Finite checks of updates, and recording of their batches, for `NonFiniteGuard`.

- `Finding`: the losses and the gradient norm of one update on the host, by `pack` and `unpack`.
- `DelayedRead`: a transfer to the host while training continues.
- `LoggingPointCheck`: a flag on the device, read with the values of logging points.
- `bad_gradients`, `describe_problem`: the message about an update.
- `ObservedUpdate`, `WindowRecorder`: the batches of an accumulation window, for the quarantine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed

from robo_orchard_lab.pipeline.batch_processor import LossWeighting
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.gradient_norm import REPLICATED_TYPES, updated_parameters
from robo_orchard_lab.pipeline.metrics import MetricValue
from robo_orchard_lab.pipeline.model import plain_model, plain_name
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.quarantine import (
    QuarantinedStep,
    QuarantinedWindow,
    capture_torch_rng,
    named_weights,
    rank_folder,
    sample_ids,
    write_window,
)
from robo_orchard_lab.pipeline.sharded_tensors import has_sharded, local_tensor

logger = logging.getLogger(__name__)

_MAX_NAMES = 3  # of the names and ids in a message

FLAG = "guard/non_finite"
"""Metric published by `LoggingPointCheck`: 1 after a non-finite update, else 0."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Losses and gradient norm of one update, on the host."""

    losses: tuple[float, ...]
    """Loss of each batch of the accumulation window, on this rank."""
    norm: float | None
    """Gradient norm over all ranks; None if not checked."""

    @property
    def bad_losses(self) -> list[int]:
        """Indices in the window of the non-finite losses."""
        return [index for index, loss in enumerate(self.losses) if not math.isfinite(loss)]

    @property
    def is_bad_norm(self) -> bool:
        """Return True if the norm is non-finite."""
        return self.norm is not None and not math.isfinite(self.norm)

    @property
    def is_finite(self) -> bool:
        """Return True if the losses and the norm are finite."""
        return not self.is_bad_norm and not self.bad_losses

    def __str__(self) -> str:
        problems = []
        if bad := self.bad_losses:
            numbers = ", ".join(str(index + 1) for index in bad)
            of = f" in batch {numbers} of the window's {len(self.losses)}"
            problems.append(
                f"the loss is {self.losses[bad[0]]}{of if len(self.losses) > 1 else ''}"
            )
        if self.is_bad_norm:
            problems.append(f"the gradient norm is {self.norm}")
        return " and ".join(problems)


def pack(losses: Sequence[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
    """Pack the values of one update into one device tensor, the norm last."""
    values = list(losses) if norm is None else [*losses, norm]
    device = values[0].device
    return torch.stack([value.detach().reshape(()).to(device) for value in values])


def unpack(values: Sequence[float], has_norm: bool) -> Finding:
    """Unpack values of :func:`pack` on the host."""
    return Finding(tuple(values[:-1]), values[-1]) if has_norm else Finding(tuple(values), None)


class DelayedRead:
    """Transfer of one update's values to the host, read one update later.

    From a CUDA device, values are copied to pinned memory without blocking the host.
    """

    def __init__(self) -> None:
        self._host: torch.Tensor | None = None
        self._count = 0
        self._copied: torch.cuda.Event | None = None

    def start(self, values: torch.Tensor) -> None:
        """Start a transfer; the previous one must have been read."""
        self._count = len(values)
        if values.device.type != "cuda":
            self._host = values
            return
        if self._host is None or len(self._host) < len(values) or self._host.dtype != values.dtype:
            self._host = torch.empty(len(values), dtype=values.dtype, pin_memory=True)
            self._copied = torch.cuda.Event()
        assert self._copied is not None
        self._host[: self._count].copy_(values, non_blocking=True)
        self._copied.record()

    def read(self) -> list[float]:
        """Return the values of the last transfer."""
        assert self._host is not None
        if self._copied is not None:
            self._copied.synchronize()  # device sync, of a copy that ended long ago
        values: list[float] = self._host[: self._count].tolist()  # device sync elsewhere
        return values


class LoggingPointCheck:
    """Check of updates at logging points, over all ranks; four small operations per update.

    A failure is raised before the next step, after sinks received the record.

    Args:
        fail: raises, given the problem, and the index of the update if known on this rank.
    """

    def __init__(self, fail: Callable[[str, int | None], NoReturn]) -> None:
        self._fail = fail
        self._reset(0, torch.device("cpu"))

    def _reset(self, first_update: int, device: torch.device) -> None:
        self._first_update, self._is_flagged = first_update, False
        self._finite_updates = torch.zeros((), dtype=torch.int32, device=device)
        self._loss, self._norm = torch.zeros(2, device=device)  # NaN after a non-finite value

    def start(self, args: PipelineHookArgs, who: str) -> None:
        """Publish the flag at logging points; ``who`` names the subscriber in errors."""
        board, progress = args.metrics, args.progress
        updates = progress.optimizer_step_id + progress.skipped_optimizer_steps
        self._reset(updates, args.accelerator.device)

        def publish() -> None:
            board.publish(FLAG, torch.isnan(self._loss + self._norm), reduce="max")

        def receive(value: MetricValue) -> None:
            self._is_flagged = value.value > 0

        board.publish(FLAG, 0.0, reduce="max")  # makes the name known in any case
        self._handles = [board.before_logging(publish), board.subscribe(FLAG, receive, who)]

    def add(self, losses: Sequence[torch.Tensor], norm: torch.Tensor | None) -> None:
        """Add the values of one update."""
        for loss in losses:
            self._loss.add_(loss.reshape(()), alpha=0)  # 0 * inf is NaN, and NaN stays
        if norm is not None:
            self._norm.add_(norm, alpha=0)
        self._finite_updates.add_(self._loss == self._norm)  # 0 == 0; NaN equals nothing

    def raise_if_flagged(self) -> None:
        """Fail if the last logging point found a non-finite update on any rank."""
        if self._is_flagged:
            self._fail(*(self._read() or ("another rank found non-finite values", None)))

    def end(self, args: PipelineHookArgs) -> None:
        """Check the last updates at the end of the run."""
        for handle in self._handles:
            handle.remove()
        if args.exception is None:
            self.check()

    def check(self) -> None:
        """Check all updates so far; a device sync."""
        self.raise_if_flagged()
        if found := self._read():
            self._fail(*found)

    def _read(self) -> tuple[str, int] | None:
        """Return the problem and the update's index, or None; a device sync."""
        loss, norm = torch.stack([self._loss, self._norm]).tolist()
        named = {"loss": loss, "gradient norm": norm}
        bad = [f"the {name}" for name, value in named.items() if math.isnan(value)]
        if not bad:
            return None
        text = f"{' and '.join(bad)} {'are' if len(bad) > 1 else 'is'} not finite"
        return text, self._first_update + int(self._finite_updates)


@dataclass(slots=True)
class ObservedUpdate:
    """A due update and its inputs."""

    losses: list[torch.Tensor]
    """Loss of each batch of the accumulation window on this rank, on the device."""
    norm: torch.Tensor | None
    """Gradient norm over all ranks; None if not checked."""
    norm_order: float
    is_clipped: bool
    """True if a hook had changed the gradients before the check."""
    steps: list[QuarantinedStep]
    """Recorded batches; after a resume within the window, only the later ones."""
    progress: TrainerProgress
    """Counters at the last step of the window."""
    weighting: LossWeighting | None
    """Weighting of the losses, if they have weights."""
    optimizer_name: str | None = None
    """Name of one of several optimizers."""


def bad_gradients(args: PipelineHookArgs) -> list[str] | None:
    """Return the names of parameters with non-finite gradients; a device sync.

    Returns None after clipping, which spreads a NaN norm to all gradients. A collective if the
    gradients are sharded.
    """
    if args.gradients_changed:
        return None
    names = {id(p): plain_name(name) for name, p in plain_model(args.run).named_parameters()}
    named = [
        (names.get(id(p), "a parameter outside the model"), p.grad)
        for p in updated_parameters(args)
        if p.grad is not None
    ]
    flags = [
        (local.coalesce().values() if local.is_sparse else local).isfinite().all()
        for local in (local_tensor(gradient) for _, gradient in named)
    ]
    packed = torch.stack(flags).int() if flags else torch.ones(0)
    if has_sharded(gradient for _, gradient in named):
        torch.distributed.all_reduce(packed, torch.distributed.ReduceOp.MIN)  # collective
    finite = packed.tolist()  # device sync
    return [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]


def describe_problem(
    args: PipelineHookArgs,
    finding: Finding,
    update: ObservedUpdate,
    parameters: Sequence[str] | None,
) -> str:
    """Describe a non-finite update: values, rank, counters, parameters and samples.

    ``parameters`` are those with non-finite gradients; None if unknown.
    """
    text = str(finding)
    if update.optimizer_name is not None:
        text += f" for the optimizer {update.optimizer_name!r}"
    if args.accelerator.num_processes > 1:
        text += f" on rank {args.accelerator.process_index} of {args.accelerator.num_processes}"
        if not finding.bad_losses:
            text += ", where the loss is finite"
    text += f", at {update.progress}"
    if finding.is_bad_norm and parameters:
        text += f", by the gradients of {_shortened(parameters)}"
    elif finding.is_bad_norm and parameters is not None:
        text += ", though each gradient is finite"
    elif finding.is_bad_norm and update.is_clipped:
        text += ", clipped before the gradient could be identified"
    bad = [step for step in update.steps if not step.finite] or update.steps
    ids = [str(sample) for step in bad for sample in step.sample_ids or ()]
    return text + (f", samples {_shortened(ids)}" if ids else "")


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


class WindowRecorder:
    """Recorder of the batches and random states of the open accumulation window.

    Args:
        folder: quarantine folder; each window gets a subfolder.
        max_windows: limit of windows per rank; the first ones are kept.
        ids_key: key or index of the sample ids in a batch.
    """

    def __init__(self, folder: Path, max_windows: int, ids_key: str | int | None) -> None:
        self._folder = folder
        self._max_windows = max_windows
        self._ids_key = ids_key
        self._random: dict[str, torch.Tensor] = {}
        self._steps: list[QuarantinedStep] = []

    def before_forward(self, args: PipelineHookArgs) -> None:
        """Capture the random state; about 1 us on the CPU."""
        self._random = capture_torch_rng(args.accelerator.device)

    def before_backward(self, args: PipelineHookArgs, loss: torch.Tensor) -> None:
        """Keep a reference to the batch, without a copy."""
        counters = args.epoch_id, args.step_id, args.global_step_id
        step = QuarantinedStep(
            *counters,
            batch=args.batch,
            loss_divisor=args.loss_divisor,
            loss_weight=args.given_loss_weight,
            random=self._random,
            loss=loss,
        )
        self._steps.append(step)

    def take(self) -> list[QuarantinedStep]:
        """Return the steps of the completed window, and start the next one."""
        steps, self._steps = self._steps, []
        return steps

    def write(
        self,
        args: PipelineHookArgs,
        update: ObservedUpdate,
        finding: Finding,
        parameters: Sequence[str],
        buffers: Mapping[str, torch.Tensor] | None,
    ) -> Path | None:
        """Write a window; return its folder, or None after logging why writing failed.

        ``update`` is the open update or the one before; ``buffers`` are the model's before the
        window, None if its weights have changed.
        """
        accelerator, steps = args.accelerator, update.steps
        name = f"step_{update.progress.global_step_id:08d}"
        folder = self._folder / rank_folder(name, accelerator.process_index)
        try:
            if folder.exists():
                logger.warning("%s exists already; not overwritten", folder)
                return folder
            if self._count(accelerator.process_index) >= self._max_windows:
                logger.warning(
                    "%s holds %d windows already (max_quarantined); not writing another one",
                    *(self._folder, self._max_windows),
                )
                return None
            missing = len(finding.losses) - len(steps)
            for step, loss in zip(steps, finding.losses[missing:], strict=True):
                step.finite = abs(loss) < float("inf")
                step.sample_ids = sample_ids(step.batch, self._ids_key)
            window = _describe(args, update, finding, list(parameters))
            window.steps_missing = missing
            if buffers is not None:
                _add_weights(args, window, buffers, is_alone=not finding.is_bad_norm)
            unsaved = write_window(folder, window)
        except Exception:  # a full disk must not end a run that could continue
            logger.warning("NonFiniteGuard: could not write %s", folder, exc_info=True)
            return None
        if unsaved:
            logger.warning("%s lacks values that can't be saved: %s", folder, ", ".join(unsaved))
        return folder

    def _count(self, process_index: int) -> int:
        names = [path.name for path in self._folder.glob("step_*")]
        return sum(name == rank_folder(name, process_index) for name in names)


def _describe(
    args: PipelineHookArgs, update: ObservedUpdate, finding: Finding, parameters: list[str]
) -> QuarantinedWindow:
    accelerator, model = args.accelerator, plain_model(args.run)
    scaler, weighting = accelerator.scaler, update.weighting
    updated = set(map(id, updated_parameters(args)))
    return QuarantinedWindow(
        steps=update.steps,
        reason=str(finding),
        progress=update.progress.state_dict(),
        grad_norm=update.norm,
        grad_norm_order=update.norm_order,
        parameters=parameters,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        mixed_precision=accelerator.mixed_precision,
        loss_scale=None if scaler is None else scaler.get_scale(),
        weight_reference=None if weighting is None else weighting.reference,
        gradient_factor=None if weighting is None else weighting.gradient_factor,
        frozen=[
            plain_name(name)
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad or id(parameter) not in updated
        ],
        evaluating=[plain_name(n) for n, module in model.named_modules() if not module.training],
    )


def _add_weights(
    args: PipelineHookArgs,
    window: QuarantinedWindow,
    buffers: Mapping[str, torch.Tensor],
    is_alone: bool,
) -> None:
    """Add the weights, once for replicated ranks; ``is_alone`` if only this rank writes."""
    if args.accelerator.distributed_type not in REPLICATED_TYPES:
        logger.warning("the weights are sharded over ranks, and are not written")
    elif window.process_index > 0 and not is_alone:
        window.weights_with_first_rank = True
    else:
        live = named_weights(plain_model(args.run))
        # A buffer shared by two modules has its first name.
        window.weights = {**live, **{n: buffer for n, buffer in buffers.items() if n in live}}
