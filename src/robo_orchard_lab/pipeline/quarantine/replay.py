"""Running a quarantined window again."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, send_to_device

from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.plain_model import plain_name
from robo_orchard_lab.pipeline.quarantine.window import (
    QuarantinedStep,
    QuarantinedWindow,
    capture_generators,
    named_weights,
    read_window,
    restore_generators,
)
from robo_orchard_lab.pipeline.weighted_loss import (
    counted_loss,
    multiply_gradients,
    weighed_loss,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of running a window again."""

    losses: tuple[torch.Tensor, ...]
    """Of each step, not divided, on the model's device; zero where it weighs nothing."""
    grad_norm: torch.Tensor
    """Of the gradients of this window, before clipping; they are in the model."""
    same: bool
    """Whether the losses are those of the run, bit for bit, and the gradient norm as well, where
    it is that of this window: in a run of one process."""
    window: QuarantinedWindow
    """What was read."""


def replay(
    folder: str | os.PathLike[str],
    model: torch.nn.Module,
    batch_processor: BatchProcessor,
    *,
    accelerator: Accelerator | None = None,
    batches: Sequence[Any] | None = None,
) -> Replay:
    """Run a window that a guard has quarantined once more, as it ran then.

    That is with its weights and buffers, its batches, the state of torch's random generators, the
    parts that were frozen or in evaluation mode, and its accumulation: ``zero_grad``, then forward
    and backward of each batch. It gives the same values bit for bit on the same kind of device,
    as far as the operations there are deterministic. To find the operation that made a NaN, call
    it in ``with torch.autograd.detect_anomaly():``.

    Args:
        folder: a ``step_...`` that the guard wrote. Those of other ranks end in ``_rank1`` and so
            on; the weights are in the first rank's, beside.
        model: of the same architecture, on any device. It is left with the window's weights,
            modes and gradients, to be looked at.
        batch_processor: the one of the run.
        accelerator: prepares the model; needed where the run had mixed precision.
        batches: in the place of those saved, such as where these have parts that could not be.

    Raises:
        CheckpointError: there is no such folder, or it is damaged.
        StateError: it is of another model, or lacks parts of the batches.
        ValueError: the accelerator has another precision than the run, or there are more or
            fewer batches than the window has steps.
    """
    window = read_window(folder)
    batches = _batches(window, batches)
    _check_precision(window, accelerator)
    if accelerator is not None:
        model = accelerator.prepare_model(model)
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    _set_up(plain, window)
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    model.zero_grad()
    losses = []
    before = capture_generators(device)
    try:
        for step, batch in zip(window.steps, batches, strict=True):
            restore_generators(step.random, device)
            _, loss, *_ = batch_processor.forward(model, send_to_device(batch, device))
            assert loss is not None  # the run had one
            if step.loss_weight is not None:
                loss = counted_loss(loss, step.loss_weight.to(loss.device))
            losses.append(loss.detach())
            _run_backward(_share_of_window(loss, step, window), window.loss_scale)
        if window.gradient_factor is not None:
            multiply_gradients(plain.parameters(), window.gradient_factor)
    finally:
        restore_generators(before, device)
    norm = _unscaled_norm(plain, window)
    same = all(map(_equal, losses, [step.loss for step in window.steps]))
    if window.grad_norm is not None and window.num_processes == 1 and not window.steps_missing:
        same = same and _equal(norm, window.grad_norm)
    return Replay(tuple(losses), norm, same, window)


def _batches(window: QuarantinedWindow, batches: Sequence[Any] | None) -> Sequence[Any]:
    if batches is None:
        if window.unsaved:
            raise StateError(
                f"these parts of the batches could not be saved: {', '.join(window.unsaved)}; give "
                "the batches by batches=[...], as by what read_window(folder) says of each step: "
                "its counters, and its sample_ids where the guard was told where they are"
            )
        return [step.batch for step in window.steps]
    if len(batches) != len(window.steps):
        raise ValueError(f"the window has {len(window.steps)} steps, got {len(batches)} batches")
    return batches


def _check_precision(window: QuarantinedWindow, accelerator: Accelerator | None) -> None:
    given = accelerator.mixed_precision if accelerator is not None else "no"
    if given != window.mixed_precision:
        raise ValueError(
            f"the run had mixed_precision={window.mixed_precision!r}, the replay has {given!r}; "
            f"give accelerator=Accelerator(mixed_precision={window.mixed_precision!r})"
        )


def _set_up(model: torch.nn.Module, window: QuarantinedWindow) -> None:
    """Give the model the weights, frozen parameters and modes of the window."""
    if window.weights:
        _load(model, window.weights)
    else:
        logger.warning("the weights of the window were not saved; taking those of the model")
    frozen, evaluating = set(window.frozen), set(window.evaluating)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plain_name(name) not in frozen)
    for name, module in model.named_modules():
        module.training = plain_name(name) not in evaluating


def _load(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    live = named_weights(model)
    problems = [f"missing: {name}" for name in live if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in live]
    problems += [
        f"{name}: saved as {tuple(weights[name].shape)}, here {tuple(tensor.shape)}"
        for name, tensor in live.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        raise StateError("the window is that of another model: " + "; ".join(problems))
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(weights[name])


def _share_of_window(
    loss: torch.Tensor, step: QuarantinedStep, window: QuarantinedWindow
) -> torch.Tensor:
    """What the backward pass was run of."""
    if step.loss_weight is None:
        return loss if step.loss_divisor == 1.0 else loss / step.loss_divisor
    if window.weight_reference is None:
        return loss
    weight, reference = step.loss_weight, window.weight_reference
    return weighed_loss(loss, weight.to(loss.device), reference.to(loss.device))


def _run_backward(loss: torch.Tensor, scale: float | None) -> None:
    (loss if scale is None else loss * scale).backward()


def _unscaled_norm(model: torch.nn.Module, window: QuarantinedWindow) -> torch.Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if window.loss_scale is not None:
        torch._foreach_mul_(gradients, 1.0 / window.loss_scale)
    return torch.nn.utils.get_total_norm(gradients, window.grad_norm_order)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for the kinds of NaN."""
    b = b.to(a.device)
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(((a == b) | (a.isnan() & b.isnan())).all())
    )
