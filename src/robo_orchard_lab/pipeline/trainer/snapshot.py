"""Everything that makes up a run at a commit point, to save it and to go on from it.

What all ranks share is saved once, what each has for itself by every rank. The model's weights are
a part of their own, as plain tensors by name; so is the optimizer's state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint import (
    capture_random_state,
    check_random_state,
    load_named_optimizer_state,
    named_optimizer_state,
)
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.plain_model import (
    plain_model,
    plain_name,
    plain_state,
    plain_weights,
)
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows

STATE_VERSION = 2
_TRAINER = {
    "data",
    "lr_scheduler",
    "model_extra",
    "processes",
    "progress",
    "scaler",
    "types",
    "version",
    "window",
}
_OF_RANK = {"buffers", "data", "gradients", "hooks", "metrics", "random", "window"}


def take_parts(
    run: PipelineRun, data: TrainingData, windows: AccumulationWindows
) -> dict[str, Any]:
    """What all ranks share, by the file it goes to; tensors are the run's own."""
    weights = plain_weights(run)
    scaler = run.accelerator.scaler
    parts: dict[str, Any] = {
        "model": weights,
        "trainer": {
            "version": STATE_VERSION,
            "processes": run.accelerator.num_processes,
            "progress": run.progress.state_dict(),
            "model_extra": {n: v for n, v in plain_state(run).items() if n not in weights},
            # In the middle of an accumulation window, a part of its gradients is there.
            "window": windows.length,
            "lr_scheduler": run.lr_scheduler.state_dict() if run.lr_scheduler else None,
            "scaler": scaler.state_dict() if scaler else None,
            "types": _types(run),
            "data": data.state_dict(),
        },
    }
    if run.optimizer is not None:
        parts["optimizer"] = named_optimizer_state(run.optimizer, _names(run))
    return parts


def take_rank_state(
    run: PipelineRun,
    hooks: PipelineHooks,
    data: TrainingData,
    windows: AccumulationWindows,
    random: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What this rank has for itself.

    Args:
        random: the random state of a run that was resumed and has not gone on yet; None captures
            that of this moment.
    """
    run.metrics.read_deferred(run.accelerator)
    # DDP takes the first rank's buffers at the next forward pass, where it was not told otherwise.
    buffers = {} if run.accelerator.is_main_process else dict(plain_model(run).named_buffers())
    return {
        "random": capture_random_state({}) if random is None else random,
        "data": data.rank_state_dict(),
        "window": windows.state_dict(run.progress.step_id),
        "gradients": {n: p.grad for p, n in _names(run).items() if p.grad is not None},
        "buffers": {plain_name(name): buffer for name, buffer in buffers.items()},
        "hooks": hooks.state_dict(),
        "metrics": run.metrics.state_dict(),
    }


def load_snapshot(
    parts: Mapping[str, Any],
    of_rank: Mapping[str, Any],
    run: PipelineRun,
    hooks: PipelineHooks,
    data: TrainingData,
    windows: AccumulationWindows,
) -> None:
    """Make the run that of the snapshot, but for the random state, which is set as it goes on.

    Raises:
        StateError: the snapshot is that of another model, optimizer, schedule, number of processes
            or set of hooks, or was taken within an accumulation window of another length. All that
            can be compared is compared before the first object is changed; where a hook refuses
            its state, all hooks get back what they had.
    """
    trainer = parts.get("trainer")
    if not isinstance(trainer, dict) or trainer.get("version") != STATE_VERSION:
        found_version = trainer.get("version") if isinstance(trainer, dict) else None
        raise StateError(
            f"expected a trainer state of version {STATE_VERSION}, found {found_version!r}"
        )
    _check_keys("the trainer's state", trainer, _TRAINER)
    _check_keys("the state of a rank", of_rank, _OF_RANK)
    if "model" not in parts or ("optimizer" in parts) != (run.optimizer is not None):
        here = "with one" if run.optimizer else "without"
        raise StateError(
            f"the saved parts are {', '.join(sorted(parts))}; this run has a model and is {here} "
            "optimizer"
        )
    _check_alike(run, trainer)
    if of_rank["gradients"]:
        _check_window(windows.length, trainer["window"])
    model = plain_model(run)
    entries = {plain_name(name): name for name in model.state_dict()}
    found = {**parts["model"], **trainer["model_extra"]}
    _check_model(model.state_dict(), {entries.get(n, n): value for n, value in found.items()})
    TrainerProgress().load_state_dict(trainer["progress"])
    data.check(trainer["data"], of_rank["data"])
    check_random_state(of_rank["random"], {})
    optimizer_state = (
        load_named_optimizer_state(run.optimizer, _names(run), parts["optimizer"])
        if run.optimizer
        else None
    )

    _load_hooks(hooks, of_rank["hooks"])
    run.progress.load_state_dict(trainer["progress"])
    run.metrics.load_state_dict(of_rank["metrics"], run.accelerator.device)
    data.load_state_dict(trainer["data"], of_rank["data"])
    windows.load_state_dict(of_rank["window"])
    found |= of_rank["buffers"]
    model.load_state_dict({entries[name]: value for name, value in found.items()})
    if run.optimizer is not None:
        run.optimizer.load_state_dict(optimizer_state)  # type: ignore[arg-type]  # one has both
    if run.lr_scheduler is not None:
        run.lr_scheduler.load_state_dict(trainer["lr_scheduler"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(trainer["scaler"])
    for parameter, name in _names(run).items():
        gradient = of_rank["gradients"].get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def _load_hooks(hooks: PipelineHooks, state: Mapping[str, Any]) -> None:
    before = copy.deepcopy(hooks.state_dict())
    try:
        hooks.load_state_dict(state)  # compares names before it loads
    except Exception:
        hooks.load_state_dict(before)
        raise


def _check_keys(what: str, found: Mapping[str, Any], expected: set[str]) -> None:
    if set(found) != expected:
        raise StateError(
            f"expected in {what}: {', '.join(sorted(expected))}; "
            f"found: {', '.join(map(str, sorted(found))) or 'nothing'}"
        )


def _check_alike(run: PipelineRun, trainer: Mapping[str, Any]) -> None:
    processes = run.accelerator.num_processes
    if trainer["processes"] != processes:
        raise StateError(
            f"the run was saved by {trainer['processes']} processes, and this job has {processes}; "
            f"resume it with {trainer['processes']}"
        )
    for part, live in _types(run).items():
        if trainer["types"].get(part) != live:
            raise StateError(
                f"the saved run had as {part}: {trainer['types'].get(part) or 'none'}, "
                f"this one has: {live or 'none'}"
            )


def _check_window(window: int, saved: int) -> None:
    if saved != window:
        raise StateError(
            f"the run was saved within an accumulation window of {saved} batches, which "
            f"can't go on as one of {window}; resume with the same gradient_accumulation_steps"
        )


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
        f"{name}: saved as {_kind(saved[name])}, here {_kind(value)}"
        for name, value in live.items()
        if isinstance(value, torch.Tensor)
        and isinstance(saved.get(name), torch.Tensor)
        and (saved[name].shape, saved[name].dtype) != (value.shape, value.dtype)
    ]
    if problems:
        raise StateError("the saved model is another one: " + "; ".join(problems))


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
