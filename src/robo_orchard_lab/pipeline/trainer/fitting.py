"""Whether a saved run is one that this run can go on as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.errors import StateError


def check_keys(what: str, found: Mapping[str, Any], expected: set[str]) -> None:
    """Refuse a state that lacks something, or has something besides."""
    if set(found) != expected:
        raise StateError(
            f"expected in {what}: {', '.join(sorted(expected))}; "
            f"found: {', '.join(map(str, sorted(found))) or 'nothing'}"
        )


def types_of(run: PipelineRun) -> dict[str, str | None]:
    """The classes of what the trainer works with, whose states mean nothing to others."""
    parts = {
        "optimizer": run.optimizer,
        "lr_scheduler": run.lr_scheduler,
        "scaler": run.accelerator.scaler,
    }
    return {name: None if part is None else type(part).__qualname__ for name, part in parts.items()}


def check_types(run: PipelineRun, saved: Mapping[str, Any]) -> None:
    """Refuse the state of another class of optimizer, schedule or scaler."""
    for part, live in types_of(run).items():
        if saved.get(part) != live:
            raise StateError(
                f"the saved run had as {part}: {saved.get(part) or 'none'}, "
                f"this one has: {live or 'none'}"
            )


def check_window(window: int, saved: int) -> None:
    """Refuse to go on within an accumulation window of another length."""
    if saved != window:
        raise StateError(
            f"the run was saved within an accumulation window of {saved} batches, which "
            f"can't go on as one of {window}; resume with the same gradient_accumulation_steps"
        )


def check_tensors(what: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse tensors of other names, shapes or types; all that differ are named."""
    problems = [f"missing: {name}" for name in live if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in live]
    problems += [
        f"{name}: saved as {kind_of(saved[name])}, here {kind_of(value)}"
        for name, value in live.items()
        if isinstance(value, torch.Tensor)
        and isinstance(saved.get(name), torch.Tensor)
        and (saved[name].shape, saved[name].dtype) != (value.shape, value.dtype)
    ]
    if problems:
        raise StateError(f"{what}: " + "; ".join(problems))


def kind_of(tensor: torch.Tensor) -> str:
    """Its type and shape, for people."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
