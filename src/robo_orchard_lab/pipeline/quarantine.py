"""Accumulation windows with non-finite values: written, read and replayed.

A window is a folder in the format of a checkpoint, with batches, RNG states, weights and counters.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, send_to_device

from robo_orchard_lab.pipeline.batch_processor import (
    BatchProcessor,
    scale_gradients,
    scale_loss,
    zero_if_unweighted,
)
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.model import forward_in_context, plain_name

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2


def pack_batch(batch: Any, lost: list[str], path: str = "batch") -> Any:
    """Convert a batch to values that a checkpoint can hold.

    Supported are tensors and NumPy arrays with their memory layout, numbers, strings, lists, tuples
    and mappings. Named tuples become tuples, other mappings dicts. ``lost`` receives the paths and
    types of unsupported values.

    >>> lost = []
    >>> pack_batch({"x": (1, 2.0), "f": print}, lost)
    {'map': {'x': (1, 2.0), 'f': {'lost': 'builtin_function_or_method'}}}
    >>> lost
    ["batch['f'] (builtin_function_or_method)"]
    """
    if batch is None or type(batch) in (bool, int, float, str):
        return batch
    if isinstance(batch, torch.Tensor) and _is_dense(batch):
        tensor = batch.detach()
        if tensor.is_contiguous():
            return tensor
        # Files hold contiguous tensors, but strides decide about torch's kernels and so about the
        # last bit of their results.
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        return {"tensor": tensor.permute(order), "order": order}
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf":
        return {"numpy": torch.from_numpy(np.ascontiguousarray(batch))}
    if isinstance(batch, np.generic) and batch.dtype.kind in "biuf":
        return batch.item()
    if isinstance(batch, (list, tuple)):
        items = [pack_batch(item, lost, f"{path}[{i}]") for i, item in enumerate(batch)]
        return tuple(items) if isinstance(batch, tuple) else items
    if isinstance(batch, Mapping) and all(isinstance(key, (str, int)) for key in batch):
        return {
            "map": {key: pack_batch(item, lost, f"{path}[{key!r}]") for key, item in batch.items()}
        }
    kind = type(batch).__name__
    lost.append(f"{path} ({kind})")
    return {"lost": kind}


def unpack_batch(packed: Any) -> Any:
    """Return the batch of :func:`pack_batch`; None replaces unsupported values.

    Tensors are copied: a file's may be unaligned, which changes the order of torch's sums.
    """
    if isinstance(packed, torch.Tensor):
        return packed.clone()
    if isinstance(packed, (list, tuple)):
        return type(packed)(map(unpack_batch, packed))
    if not isinstance(packed, dict):
        return packed
    ((mark, content), *rest) = packed.items()
    if mark == "map":
        return {key: unpack_batch(item) for key, item in content.items()}
    if mark == "numpy":
        return content.clone().numpy()
    if mark == "tensor":
        order = rest[0][1]
        return content.clone().permute([order.index(dim) for dim in range(len(order))])
    return None


def _is_dense(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.device.type != "meta"
        and tensor.dtype != torch.complex128  # unsupported by safetensors
    )


@dataclass(slots=True)
class QuarantinedStep:
    """Micro-batch of an accumulation window, with what its replay needs."""

    epoch_id: int
    step_id: int
    global_step_id: int
    batch: Any
    """None replaces values that could not be saved."""
    loss_divisor: float
    """Divisor of a loss without a weight."""
    loss_weight: torch.Tensor | None
    """Weight that the batch processor returned, or None."""
    random: Mapping[str, torch.Tensor]
    """State of :func:`capture_torch_rng` before the forward pass."""
    loss: torch.Tensor
    """This rank's loss, not divided."""
    finite: bool = True
    """True if the loss is finite."""
    sample_ids: list[int | str] | None = None
    """Ids of the samples, if the guard has a ``sample_ids`` key."""


@dataclass(slots=True)
class QuarantinedWindow:
    """All micro-batches of an update, with the state for a replay."""

    steps: list[QuarantinedStep]
    reason: str
    """Description of the non-finite values."""
    progress: Mapping[str, int]
    """Counters of the run at the window's last step."""
    grad_norm: torch.Tensor | None
    """Norm of all ranks' gradients; None if it was not computed, as with an fp16 scaler."""
    grad_norm_order: float
    parameters: list[str]
    """Names of parameters with non-finite gradients, if known."""
    process_index: int
    num_processes: int
    mixed_precision: str
    """Accelerate's name of the precision."""
    loss_scale: float | None = None
    """Factor of the losses by an fp16 scaler."""
    weight_reference: torch.Tensor | None = None
    """Divisor of loss weights; None without weights, or for one batch in one process."""
    gradient_factor: torch.Tensor | None = None
    """Factor of the gradients after the last backward pass with weighted losses."""
    frozen: list[str] = field(default_factory=list)
    """Names of parameters without ``requires_grad``, and of those that the optimizer lacks."""
    evaluating: list[str] = field(default_factory=list)
    """Names of modules in evaluation mode."""
    steps_missing: int = 0
    """Number of steps at the window's start before the run was resumed; not saved."""
    unsaved: list[str] = field(default_factory=list)
    """Paths and types of batch values that could not be saved."""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Parameters and all buffers before the window, by name; empty if they were not saved."""
    weights_with_first_rank: bool = False
    """True if the weights equal the first rank's and are in its folder."""


def capture_torch_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's default generators for the CPU and ``device``, in about 1 us."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def restore_torch_rng(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states of :func:`capture_torch_rng`."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        getattr(torch, device.type).set_rng_state(states[device.type])


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and all buffers of a plain model, non-persistent ones included."""
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {plain_name(name): tensor for name, tensor in live.items()}


def sample_ids(batch: Any, key: str | int | None) -> list[int | str] | None:
    """Return the ids at a key or index of a batch as ints and strings, or None.

    Syncs the device if the ids are a tensor.
    """
    try:
        ids = None if key is None else batch[key]
    except (LookupError, TypeError):
        logger.warning("there are no sample ids under %r in a batch of %s", key, type(batch))
        return None
    if ids is None:
        return None
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return [item if type(item) is int else str(item) for item in ids]


def write_window(folder: str | os.PathLike[str], window: QuarantinedWindow) -> list[str]:
    """Write a window atomically and return the paths of values that could not be saved.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    lost: list[str] = []
    paths = [f"steps[{index}].batch" for index in range(len(window.steps))]
    try:
        batches = [
            pack_batch(step.batch, lost, path)
            for step, path in zip(window.steps, paths, strict=True)
        ]
        _save(folder, window, batches, lost)
    except FileExistsError:
        raise
    except Exception as error:  # a batch may hold objects of any class
        logger.warning("the batches can't be written and are left out: %r", error)
        lost = paths
        _save(folder, window, [{"lost": "batch"}] * len(lost), lost)
    return lost


def _save(
    folder: str | os.PathLike[str],
    window: QuarantinedWindow,
    batches: Sequence[Any],
    unsaved: list[str],
) -> None:
    saved = {field.name: getattr(window, field.name) for field in fields(window)}
    weights = saved.pop("weights")
    names = [field.name for field in fields(QuarantinedStep)]
    steps = [
        {**{name: getattr(step, name) for name in names}, "batch": batch}
        for step, batch in zip(window.steps, batches, strict=True)
    ]
    version = {"quarantine_version": FORMAT_VERSION}
    state = {**version, **saved, "unsaved": unsaved, "steps": steps}
    step_id = window.progress["global_step_id"]
    save_checkpoint(folder, step_id, {"model": weights, "window": state})


def read_window(folder: str | os.PathLike[str]) -> QuarantinedWindow:
    """Return the window in a folder, on the CPU.

    Raises:
        CheckpointError: the folder, or the first rank's folder with the weights, is missing or
            damaged.
        StateError: the format has another version.
    """
    folder = Path(folder)
    parts = load_checkpoint(folder).parts
    weights: Any = parts.get("model")
    state: Any = parts.get("window")
    version = state.pop("quarantine_version", None) if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise StateError(
            f"{folder}: expected a quarantined window of version {FORMAT_VERSION}, "
            f"found version {version!r}"
        )
    if state["weights_with_first_rank"]:
        first = load_checkpoint(folder.with_name(rank_folder(folder.name, 0)))
        weights = first.parts["model"]
    steps = [
        QuarantinedStep(**{**step, "batch": unpack_batch(step["batch"])})
        for step in state.pop("steps")
    ]
    return QuarantinedWindow(steps=steps, weights=weights, **state)


def rank_folder(name: str, process_index: int) -> str:
    """Return a rank's folder name; the first rank's has no suffix.

    >>> rank_folder("step_00000007", 1), rank_folder("step_00000007_rank1", 0)
    ('step_00000007_rank1', 'step_00000007')
    """
    plain = re.sub(r"_rank\d+$", "", name)
    return f"{plain}_rank{process_index}" if process_index else plain


@dataclass(frozen=True, slots=True)
class Replay:
    """Result of :func:`replay`."""

    losses: tuple[torch.Tensor, ...]
    """Loss of each step, not divided, on the model's device; zero if its weight is zero."""
    grad_norm: torch.Tensor
    """Norm of the window's gradients before clipping; the model holds the gradients."""
    is_identical: bool
    """True if the losses equal the run's bit for bit, and so does the gradient norm of a run in one
    process."""
    window: QuarantinedWindow


def replay(
    folder: str | os.PathLike[str],
    model: torch.nn.Module,
    batch_processor: BatchProcessor,
    *,
    accelerator: Accelerator | None = None,
    batches: Sequence[Any] | None = None,
) -> Replay:
    """Repeat the forward and backward passes of a quarantined window.

    Weights, buffers, modes, frozen parameters, batches, torch's RNG and accumulation are restored.
    Values are equal bit for bit on the same kind of device if its operations are deterministic. To
    find the operation that made a NaN, call ``replay`` in ``torch.autograd.detect_anomaly()``.

    Args:
        folder: a ``step_...`` folder of the guard. Other ranks' end in ``_rank1`` and so on; the
            weights are in the first rank's.
        model: a model of the same architecture. Keeps the window's weights, modes and gradients.
        batch_processor: the run's processor.
        accelerator: prepares the model; required if the run had mixed precision.
        batches: replace the saved ones, one for each step.

    Raises:
        CheckpointError: the folder is missing or damaged.
        StateError: the window has another model's weights, or lacks values of the batches.
        ValueError: the precision or the number of batches differs from the window's.
    """
    window = read_window(folder)
    batches = _choose_batches(window, batches)
    _check_precision(window, accelerator)
    if accelerator is not None:
        model = accelerator.prepare_model(model)
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    _restore_model(plain, window)
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    model.zero_grad()
    processor, given = forward_in_context(batch_processor, model, accelerator)
    losses = []
    before = capture_torch_rng(device)
    try:
        for step, batch in zip(window.steps, batches, strict=True):
            restore_torch_rng(step.random, device)
            _, loss, *_ = processor.forward(given, send_to_device(batch, device))
            assert loss is not None  # the run had one
            if step.loss_weight is not None:
                loss = zero_if_unweighted(loss, step.loss_weight.to(loss.device))
            losses.append(loss.detach())
            scaled = _divide_loss(loss, step, window)
            (scaled if window.loss_scale is None else scaled * window.loss_scale).backward()
        if window.gradient_factor is not None:
            scale_gradients(plain.parameters(), window.gradient_factor)
    finally:
        restore_torch_rng(before, device)
    gradients = [p.grad for p in plain.parameters() if p.grad is not None]
    if window.loss_scale is not None:
        for gradient in gradients:
            gradient.mul_(1.0 / window.loss_scale)
    norm = torch.nn.utils.get_total_norm(gradients, window.grad_norm_order)
    is_identical = all(map(_equal, losses, [step.loss for step in window.steps]))
    if window.grad_norm is not None and window.num_processes == 1 and not window.steps_missing:
        is_identical = is_identical and _equal(norm, window.grad_norm)
    return Replay(tuple(losses), norm, is_identical, window)


def _choose_batches(window: QuarantinedWindow, batches: Sequence[Any] | None) -> Sequence[Any]:
    if batches is None:
        if window.unsaved:
            raise StateError(
                f"values of the batches could not be saved: {', '.join(window.unsaved)}; load the "
                "batches of the steps in read_window(folder), by their counters or sample_ids, "
                "and pass batches=[...]"
            )
        return [step.batch for step in window.steps]
    if len(batches) != len(window.steps):
        raise ValueError(f"the window has {len(window.steps)} steps, got {len(batches)} batches")
    return batches


def _check_precision(window: QuarantinedWindow, accelerator: Accelerator | None) -> None:
    precision = accelerator.mixed_precision if accelerator is not None else "no"
    if precision != window.mixed_precision:
        raise ValueError(
            f"the run had mixed_precision={window.mixed_precision!r}, the replay has "
            f"{precision!r}; pass accelerator=Accelerator(mixed_precision="
            f"{window.mixed_precision!r})"
        )


def _restore_model(model: torch.nn.Module, window: QuarantinedWindow) -> None:
    if window.weights:
        _load_weights(model, window.weights)
    else:
        logger.warning("the weights of the window were not saved; the model keeps its own")
    frozen, evaluating = set(window.frozen), set(window.evaluating)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plain_name(name) not in frozen)
    for name, module in model.named_modules():
        module.training = plain_name(name) not in evaluating


def _load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    live = named_weights(model)
    problems = [f"missing: {name}" for name in live if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in live]
    problems += [
        f"{name}: saved as {tuple(weights[name].shape)}, here {tuple(tensor.shape)}"
        for name, tensor in live.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        raise StateError("the window is of another model: " + "; ".join(problems))
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(weights[name])


def _divide_loss(
    loss: torch.Tensor, step: QuarantinedStep, window: QuarantinedWindow
) -> torch.Tensor:
    """Return the loss's share of the window's mean."""
    if step.loss_weight is None:
        return loss if step.loss_divisor == 1.0 else loss / step.loss_divisor
    if window.weight_reference is None:
        return loss
    weight, reference = step.loss_weight, window.weight_reference
    return scale_loss(loss, weight.to(loss.device), reference.to(loss.device))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if dtypes, shapes and values are equal; NaN equals NaN."""
    is_comparable = a.dtype == b.dtype and a.shape == b.shape
    return is_comparable and torch.allclose(a, b.to(a.device), 0.0, 0.0, equal_nan=True)
