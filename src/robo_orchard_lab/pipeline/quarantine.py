"""Windows of batches that gave non-finite values: written, read, and run again."""

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
from robo_orchard_lab.pipeline.model import plain_name

# --- batch tree ------------------------------------------------------------------------------
# Batches as plain values and tensors, as far as they can be, and back.


def pack_batch(batch: Any, lost: list[str], place: str = "batch") -> Any:
    """A batch as what a checkpoint's state can hold.

    Tensors and NumPy arrays, with their layout in memory, numbers, texts, lists, tuples and
    mappings come back; of a named tuple or a mapping of another class, what is in it.

    Args:
        batch: any object.
        lost: takes the places and types of what can't be saved.
        place: its name in ``lost``.

    >>> lost = []
    >>> pack_batch({"x": (1, 2.0), "f": print}, lost)
    {'map': {'x': (1, 2.0), 'f': {'lost': 'builtin_function_or_method'}}}
    >>> lost
    ["batch['f'] (builtin_function_or_method)"]
    """
    if batch is None or type(batch) in (bool, int, float, str):
        return batch
    if isinstance(batch, torch.Tensor) and _is_dense(batch):
        return _pack_tensor(batch.detach())
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf":
        return {"numpy": torch.from_numpy(np.ascontiguousarray(batch))}
    if isinstance(batch, np.generic) and batch.dtype.kind in "biuf":
        return batch.item()
    if isinstance(batch, (list, tuple)):
        items = [pack_batch(item, lost, f"{place}[{i}]") for i, item in enumerate(batch)]
        return tuple(items) if isinstance(batch, tuple) else items
    if isinstance(batch, Mapping) and all(isinstance(key, (str, int)) for key in batch):
        return {
            "map": {key: pack_batch(item, lost, f"{place}[{key!r}]") for key, item in batch.items()}
        }
    kind = type(batch).__name__
    lost.append(f"{place} ({kind})")
    return {"lost": kind}


def unpack_batch(packed: Any) -> Any:
    """The batch that :func:`pack_batch` packed; None in the place of what was lost.

    Its tensors are copies: those read from a file lie there at any address, and torch adds up
    numbers in another order where they are not aligned as in memory of their own.
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


def _pack_tensor(tensor: torch.Tensor) -> Any:
    if tensor.is_contiguous():
        return tensor
    # Files hold contiguous tensors. Which dimension lies next to which decides about the kernels
    # that torch picks, and so about the last bit of what they compute.
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return {"tensor": tensor.permute(order), "order": order}


def _is_dense(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.device.type != "meta"
        and tensor.dtype != torch.complex128  # which safetensors lacks
    )


# --- window ----------------------------------------------------------------------------------
# An accumulation window whose update was not finite, as a folder.


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_UNSAVED = {"lost": "batch"}


@dataclass(slots=True)
class QuarantinedStep:
    """One batch of the window, from its forward to its backward pass."""

    epoch_id: int
    step_id: int
    global_step_id: int
    batch: Any
    """None in the place of what could not be saved."""
    loss_divisor: float
    """Of a loss that comes without a weight."""
    loss_weight: torch.Tensor | None
    """What the batch processor said that the loss weighs; None where it said nothing."""
    random: Mapping[str, torch.Tensor]
    """What :func:`capture_torch_rng` gave ahead of the forward pass."""
    loss: torch.Tensor
    """This rank's, not divided."""
    finite: bool = True
    """Whether the loss is."""
    sample_ids: list[int | str] | None = None
    """Of the batch, where the guard was told where they are."""


@dataclass(slots=True)
class QuarantinedWindow:
    """All batches that went into one update, and what their replay needs.

    The counters of its steps are those of the batch that was open, from 0.
    """

    steps: list[QuarantinedStep]
    reason: str
    """What was not finite, for people."""
    progress: Mapping[str, int]
    """The counters of the run at the last step of the window."""
    grad_norm: torch.Tensor | None
    """Of the gradients of all ranks; None where it was not looked at, as with an fp16 scaler."""
    grad_norm_order: float
    parameters: list[str]
    """The names of those whose gradients were not finite, where that was known."""
    process_index: int
    num_processes: int
    mixed_precision: str
    """By the name that Accelerate gives it."""
    loss_scale: float | None = None
    """What the losses were multiplied by for the backward pass, by an fp16 scaler."""
    weight_reference: torch.Tensor | None = None
    """What the weights of losses were divided by for the backward pass; None where losses have no
    weights, and where the window was one batch of one process, which is the whole mean."""
    gradient_factor: torch.Tensor | None = None
    """What the gradients were multiplied by after the last backward pass, of weighted losses."""
    frozen: list[str] = field(default_factory=list)
    """The parameters that took no gradient."""
    evaluating: list[str] = field(default_factory=list)
    """The modules that were in evaluation mode."""
    steps_missing: int = 0
    """How many steps at the window's start are not there, since the run was resumed after them."""
    unsaved: list[str] = field(default_factory=list)
    """The places in the batches of what could not be saved, with its type."""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The parameters and all buffers ahead of the window, by name; empty where they were lost."""
    weights_with_first_rank: bool = False
    """Whether they are the same as the first rank's, in whose folder they are."""


def capture_torch_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's default random generators, of the CPU and of the current device.

    It takes about a microsecond on the CPU. NumPy's and Python's are not looked at.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def restore_torch_rng(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Draw from where :func:`capture_torch_rng` was called, on the CPU and on ``device``."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        getattr(torch, device.type).set_rng_state(states[device.type])


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and all buffers of a plain model, those that are not saved included."""
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {plain_name(name): tensor for name, tensor in live.items()}


def sample_ids(batch: Any, key: str | int | None) -> list[int | str] | None:
    """The ids under a key or index of a batch, as plain values; None where there are none."""
    try:
        ids = None if key is None else batch[key]
    except (LookupError, TypeError):
        logger.warning("there are no sample ids under %r in a batch of %s", key, type(batch))
        return None
    if ids is None:
        return None
    if hasattr(ids, "tolist"):
        ids = ids.tolist()  # waits for the device where it is a tensor there
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return [item if type(item) is int else str(item) for item in ids]


def write_window(folder: str | os.PathLike[str], window: QuarantinedWindow) -> list[str]:
    """Write a window, whole or not at all, and give the places in it that could not be saved.

    Raises:
        FileExistsError: there is something by that name.
    """
    lost: list[str] = []
    try:
        batches = [pack_batch(s.batch, lost, f"steps[{i}].batch") for i, s in _numbered(window)]
        _save(folder, window, batches, lost)
    except FileExistsError:
        raise
    except Exception as error:  # something in a batch that only its own code understands
        logger.warning("the batches can't be written, what else there is will be: %r", error)
        lost = [f"steps[{i}].batch" for i, _ in _numbered(window)]
        _save(folder, window, [_UNSAVED] * len(lost), lost)
    return lost


def read_window(folder: str | os.PathLike[str]) -> QuarantinedWindow:
    """The window in a folder, on the CPU.

    The weights of ranks that are copies of one another are in the first rank's folder, beside.

    Raises:
        CheckpointError: there is no such folder, or not that of the first rank, or a file is
            missing or damaged.
        StateError: it is of another version.
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
    """The folder's name of a rank, that of the first being the plain one.

    >>> rank_folder("step_00000007", 1), rank_folder("step_00000007_rank1", 0)
    ('step_00000007_rank1', 'step_00000007')
    """
    plain = re.sub(r"_rank\d+$", "", name)
    return f"{plain}_rank{process_index}" if process_index else plain


def _save(
    folder: str | os.PathLike[str],
    window: QuarantinedWindow,
    batches: Sequence[Any],
    unsaved: Sequence[str],
) -> None:
    state = _state(window, batches, unsaved)
    step = window.progress["global_step_id"]
    save_checkpoint(folder, step, {"model": window.weights, "window": state})


def _numbered(window: QuarantinedWindow) -> list[tuple[int, QuarantinedStep]]:
    return list(enumerate(window.steps))


def _state(
    window: QuarantinedWindow, batches: Sequence[Any], unsaved: Sequence[str]
) -> dict[str, Any]:
    names = [f.name for f in fields(window) if f.name not in ("steps", "weights")]
    return {
        "quarantine_version": FORMAT_VERSION,
        **{name: getattr(window, name) for name in names},
        "unsaved": list(unsaved),
        "steps": [
            {**_plain(step), "batch": batch}
            for step, batch in zip(window.steps, batches, strict=True)
        ],
    }


def _plain(step: QuarantinedStep) -> dict[str, Any]:
    return {f.name: getattr(step, f.name) for f in fields(step) if f.name != "batch"}


# --- replay ----------------------------------------------------------------------------------
# Running a quarantined window again.


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
    before = capture_torch_rng(device)
    try:
        for step, batch in zip(window.steps, batches, strict=True):
            restore_torch_rng(step.random, device)
            _, loss, *_ = batch_processor.forward(model, send_to_device(batch, device))
            assert loss is not None  # the run had one
            if step.loss_weight is not None:
                loss = zero_if_unweighted(loss, step.loss_weight.to(loss.device))
            losses.append(loss.detach())
            _run_backward(_share_of_window(loss, step, window), window.loss_scale)
        if window.gradient_factor is not None:
            scale_gradients(plain.parameters(), window.gradient_factor)
    finally:
        restore_torch_rng(before, device)
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
    return scale_loss(loss, weight.to(loss.device), reference.to(loss.device))


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


__all__ = [
    "QuarantinedStep",
    "QuarantinedWindow",
    "Replay",
    "capture_torch_rng",
    "named_weights",
    "rank_folder",
    "read_window",
    "replay",
    "sample_ids",
    "write_window",
]
