"""An accumulation window whose update was not finite, as a folder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.plain_model import plain_name
from robo_orchard_lab.pipeline.quarantine.batch_tree import pack_batch, unpack_batch

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
    """What :func:`capture_generators` gave ahead of the forward pass."""
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


def capture_generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's default random generators, of the CPU and of the current device.

    It takes about a microsecond on the CPU. NumPy's and Python's are not looked at.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def restore_generators(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Draw from where :func:`capture_generators` was called, on the CPU and on ``device``."""
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
