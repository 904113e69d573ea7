"""Everything that makes up a run between two steps, to save it and to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint import load_named_optimizer_state, named_optimizer_state
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.plain_model import (
    plain_model,
    plain_name,
    plain_state,
    plain_weights,
)
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.trainer.position import DataPosition

_PARTS = {
    "gradients",
    "hooks",
    "lr_scheduler",
    "metrics",
    "model_extra",
    "optimizer",
    "position",
    "progress",
    "scaler",
    "types",
    "window",
}


def take_snapshot(
    run: PipelineRun, hooks: PipelineHooks, position: DataPosition
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The model's weights by name, and the rest of the run's state."""
    entries = plain_state(run)
    weights = plain_weights(run)
    names = _names(run)
    run.metrics.read_deferred(run.accelerator)
    scaler = run.accelerator.scaler
    return weights, {
        "progress": run.progress.state_dict(),
        "model_extra": {name: value for name, value in entries.items() if name not in weights},
        # In the middle of an accumulation window, a part of its gradients is there.
        "window": run.accelerator.gradient_accumulation_steps,
        "gradients": {n: p.grad for p, n in names.items() if p.grad is not None},
        "optimizer": named_optimizer_state(run.optimizer, names) if run.optimizer else None,
        "lr_scheduler": run.lr_scheduler.state_dict() if run.lr_scheduler else None,
        "scaler": scaler.state_dict() if scaler else None,
        "types": _types(run),
        "hooks": hooks.state_dict(),
        "metrics": run.metrics.state_dict(),
        "position": position.state_dict(),
    }


def load_snapshot(
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    run: PipelineRun,
    hooks: PipelineHooks,
    position: DataPosition,
) -> None:
    """Make the run that of the snapshot.

    Raises:
        StateError: the snapshot is that of another model, optimizer, schedule or set of hooks, or
            was taken within an accumulation window of another length. All that can be compared is
            compared before the first object is changed.
    """
    if not isinstance(state, dict) or set(state) != _PARTS:
        raise StateError(f"expected a state of {', '.join(sorted(_PARTS))}; found {state!r:.80}")
    model = plain_model(run)
    entries = {plain_name(name): name for name in model.state_dict()}
    found = {**weights, **state["model_extra"]}
    _check_model(model.state_dict(), {entries.get(n, n): value for n, value in found.items()})
    for part, live in _types(run).items():
        if state["types"][part] != live:
            raise StateError(
                f"the saved run had as {part}: {state['types'][part] or 'none'}, "
                f"this one has: {live or 'none'}"
            )
    window = run.accelerator.gradient_accumulation_steps
    if state["gradients"] and state["window"] != window:
        raise StateError(
            f"the run was saved within an accumulation window of {state['window']} batches, which "
            f"can't go on as one of {window}; resume with the same gradient_accumulation_steps"
        )
    TrainerProgress().load_state_dict(state["progress"])
    position.check(state["position"])
    optimizer_state = (
        load_named_optimizer_state(run.optimizer, _names(run), state["optimizer"])
        if run.optimizer
        else None
    )

    hooks.load_state_dict(state["hooks"])  # compares names before it loads
    run.progress.load_state_dict(state["progress"])
    run.metrics.load_state_dict(state["metrics"], run.accelerator.device)
    position.load_state_dict(state["position"])
    model.load_state_dict({entries[name]: value for name, value in found.items()})
    if run.optimizer is not None:
        run.optimizer.load_state_dict(optimizer_state)  # type: ignore[arg-type]  # one has both
    if run.lr_scheduler is not None:
        run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    for parameter, name in _names(run).items():
        gradient = state["gradients"].get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def _types(run: PipelineRun) -> dict[str, str | None]:
    """The classes of what the trainer works with, whose states mean nothing to others."""
    parts = {
        "optimizer": run.optimizer,
        "lr_scheduler": run.lr_scheduler,
        "scaler": run.accelerator.scaler,
    }
    return {name: None if part is None else type(part).__qualname__ for name, part in parts.items()}


def _names(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in plain_model(run).named_parameters()}


def _check_model(live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    problems = [f"missing: {name}" for name in live if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in live]
    problems += [
        f"{name}: saved as {tuple(saved[name].shape)}, here {tuple(value.shape)}"
        for name, value in live.items()
        if isinstance(value, torch.Tensor)
        and isinstance(saved.get(name), torch.Tensor)
        and saved[name].shape != value.shape
    ]
    if problems:
        raise StateError("the saved model is another one: " + "; ".join(problems))
