"""Keeping what an accumulation window needs to be run again, and writing it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robo_orchard_lab.pipeline.batch_processor import LossWeighting
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.gradient_norm import REPLICATED_TYPES
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

# --- finite ----------------------------------------------------------------------------------
# Whether the losses of a window and the norm of its gradients are finite.


@dataclass(frozen=True, slots=True)
class Finding:
    """The values of one update, on the host."""

    losses: tuple[float, ...]
    """This rank's, of each batch of the window."""
    norm: float | None
    """Of the gradients of all ranks; None where it is not looked at."""

    @property
    def bad_losses(self) -> list[int]:
        """The places in the window of the batches whose loss is not finite."""
        return [index for index, loss in enumerate(self.losses) if not math.isfinite(loss)]

    @property
    def bad_norm(self) -> bool:
        """Whether the norm is not finite."""
        return self.norm is not None and not math.isfinite(self.norm)

    @property
    def finite(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad_norm and not self.bad_losses

    def __str__(self) -> str:
        parts = []
        if bad := self.bad_losses:
            places = ", ".join(str(index + 1) for index in bad)
            of = f" in batch {places} of the window's {len(self.losses)}"
            parts.append(f"the loss is {self.losses[bad[0]]}{of if len(self.losses) > 1 else ''}")
        if self.bad_norm:
            parts.append(f"the gradient norm is {self.norm}")
        return " and ".join(parts)


def pack(losses: Sequence[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
    """The values of one update as one tensor on their device, the norm last."""
    values = list(losses) if norm is None else [*losses, norm]
    device = values[0].device
    return torch.stack([value.detach().reshape(()).to(device) for value in values])


def unpack(values: Sequence[float], has_norm: bool) -> Finding:
    """What was packed, after it was read."""
    return Finding(tuple(values[:-1]), values[-1]) if has_norm else Finding(tuple(values), None)


class LateReading:
    """The values of one update on their way to the host, where they are looked at in the next.

    From a CUDA device they are copied to pinned memory while the host goes on.
    """

    def __init__(self) -> None:
        self._host: torch.Tensor | None = None
        self._count = 0
        self._copied: torch.cuda.Event | None = None

    def start(self, values: torch.Tensor) -> None:
        """Send the values; those before must have been taken."""
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

    def take(self) -> list[float]:
        """The values that were sent."""
        assert self._host is not None
        if self._copied is not None:
            self._copied.synchronize()  # waits for the device, which has got there long ago
        values: list[float] = self._host[: self._count].tolist()  # on other devices, this waits
        return values


logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ObservedUpdate:
    """An update that is due, and what went into it."""

    losses: list[torch.Tensor]
    """This rank's, of each batch of the window, on the device."""
    norm: torch.Tensor | None
    """Of the gradients of all ranks; None where it is not looked at."""
    norm_order: float
    clipped: bool
    """Whether a hook had changed the gradients by the time that they were looked at."""
    steps: list[QuarantinedStep]
    """The batches, where they are kept; those since a resume within the window."""
    progress: TrainerProgress
    """The counters at the last step of the window."""
    weighting: LossWeighting | None
    """How its losses were weighed, where they come with weights."""


class WindowRecorder:
    """Holds on to the batches of the window that is open, with their random states.

    Args:
        folder: where the windows are written, each in a folder of its own.
        max_windows: how many may lie there; those that come first stay.
        ids_key: the key or index of the sample ids in a batch.
    """

    def __init__(self, folder: Path, max_windows: int, ids_key: str | int | None) -> None:
        self._folder = folder
        self._max_windows = max_windows
        self._ids_key = ids_key
        self._random: dict[str, torch.Tensor] = {}
        self._steps: list[QuarantinedStep] = []

    def before_forward(self, args: PipelineHookArgs) -> None:
        """Note the random state, about a microsecond on the CPU."""
        self._random = capture_torch_rng(args.accelerator.device)

    def before_backward(self, args: PipelineHookArgs, loss: torch.Tensor) -> None:
        """Hold on to the batch, which is not copied."""
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
        """The steps of the window, which is over."""
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
        """Write a window; gives its folder, or None where it could not be, which the log tells.

        Args:
            args: of the update that is open.
            update: the one to write, by now or of the window before.
            finding: what is wrong with it.
            parameters: those whose gradients are not finite.
            buffers: the model's, as they were before it; None where its weights are no more.
        """
        accelerator, steps = args.accelerator, update.steps
        name = f"step_{update.progress.global_step_id:08d}"
        folder = self._folder / rank_folder(name, accelerator.process_index)
        try:
            if folder.exists():
                logger.warning("%s exists already and stays as it is", folder)
                return folder
            if self._count(accelerator.process_index) >= self._max_windows:
                logger.warning(
                    "%s holds %d windows already (max_quarantined); this one is not written",
                    self._folder,
                    self._max_windows,
                )
                return None
            missing = len(finding.losses) - len(steps)
            for step, loss in zip(steps, finding.losses[missing:], strict=True):
                step.finite = abs(loss) < float("inf")
                step.sample_ids = sample_ids(step.batch, self._ids_key)
            window = _describe(args, update, finding, list(parameters))
            window.steps_missing = missing
            if buffers is not None:
                _add_weights(args, window, buffers, alone=not finding.bad_norm)
            lost = write_window(folder, window)
        except Exception:  # a full disk must not end a run that could go on
            logger.warning("could not write %s", folder, exc_info=True)
            return None
        if lost:
            logger.warning("%s lacks what can't be saved: %s", folder, ", ".join(lost))
        return folder

    def _count(self, process_index: int) -> int:
        """How many windows of this rank there are."""
        names = [path.name for path in self._folder.glob("step_*")]
        return sum(name == rank_folder(name, process_index) for name in names)


def _describe(
    args: PipelineHookArgs, update: ObservedUpdate, finding: Finding, parameters: list[str]
) -> QuarantinedWindow:
    accelerator, model = args.accelerator, plain_model(args.run)
    scaler, weighting = accelerator.scaler, update.weighting
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
        frozen=[plain_name(n) for n, p in model.named_parameters() if not p.requires_grad],
        evaluating=[plain_name(n) for n, module in model.named_modules() if not module.training],
    )


def _add_weights(
    args: PipelineHookArgs,
    window: QuarantinedWindow,
    buffers: Mapping[str, torch.Tensor],
    alone: bool,
) -> None:
    """Add the weights, once for ranks that are copies of one another.

    All ranks write a window whose gradients are not finite; one whose loss alone is not finite,
    this rank writes alone.
    """
    if args.accelerator.distributed_type not in REPLICATED_TYPES:
        logger.warning("the weights are in parts on several ranks, and are not written")
    elif window.process_index > 0 and not alone:
        window.weights_with_first_rank = True
    else:
        live = named_weights(plain_model(args.run))
        # A buffer that two modules share goes by its first name.
        kept = {name: buffer for name, buffer in buffers.items() if name in live}
        window.weights = {**live, **kept}
