"""Everything that makes up a run at a commit point, to save it and to go on from it.

What all ranks share is saved once, what each has for itself by every rank. The model's weights are
a part of their own, as plain tensors by name; so is the optimizer's state.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint import (
    Ranks,
    capture_random_state,
    check_random_state,
    load_named_optimizer_state,
    named_optimizer_state,
    parameters_beside,
    restore_random_state,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.context import PipelineRun, Snapshot
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.plain_model import (
    ddp_of,
    plain_model,
    plain_name,
    plain_state,
    plain_weights,
)
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.trainer.about import describe_run
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
_OF_RANK = {"beside", "buffers", "data", "gradients", "hooks", "metrics", "random", "window"}


class RunSnapshots:
    """Takes all that makes up a run, and makes a run that of a snapshot.

    Args:
        run: the trainer's objects.
        hooks: all hooks of the run.
        data: what it is trained on.
        windows: how that is divided for accumulation.
    """

    def __init__(
        self,
        run: PipelineRun,
        hooks: PipelineHooks,
        data: TrainingData,
        windows: AccumulationWindows,
    ) -> None:
        self._run = run
        self._hooks = hooks
        self._data = data
        self._windows = windows
        self._random: Mapping[str, Any] | None = None  # of a resumed run, until it goes on

    def take(self) -> Snapshot:
        """All of the run, at a commit point; its tensors are the run's own. All ranks call it.

        Takes an exchange of the ranks where metrics wait to be read.
        """
        return Snapshot(
            parts=self._parts(),
            of_rank={"state": self._rank_state()},
            about=self._about,
        )

    @cached_property
    def _about(self) -> dict[str, Any]:
        """Which run it is: as it stands at the first snapshot, since it takes milliseconds."""
        return describe_run(self._run, self._hooks)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a snapshot into a folder that does not exist yet. All ranks call it."""
        snapshot = self.take()
        with ranks_of(self._run) as ranks:
            save_checkpoint(
                folder,
                self._run.progress.global_step_id,
                snapshot.parts,
                snapshot.of_rank,
                metadata=snapshot.about,
                ranks=ranks,
            )

    def load(self, parts: Mapping[str, Any], of_rank: Mapping[str, Any]) -> None:
        """Make the run that of a snapshot; :meth:`go_on_drawing` then sets the random state.

        Raises:
            StateError: the snapshot is that of another model, optimizer, schedule, number of
                processes or set of hooks, or was taken within an accumulation window of another
                length. All that can be compared is compared before the first object is changed;
                where a hook refuses its state, all hooks get back what they had.
        """
        run, trainer, own = self._run, parts.get("trainer"), of_rank.get("state")
        if not isinstance(trainer, dict) or trainer.get("version") != STATE_VERSION:
            found_version = trainer.get("version") if isinstance(trainer, dict) else None
            raise StateError(
                f"expected a trainer state of version {STATE_VERSION}, found {found_version!r}"
            )
        own = own if isinstance(own, dict) else {}
        _check_keys("the trainer's state", trainer, _TRAINER)
        _check_keys("the state of a rank", own, _OF_RANK)
        if "model" not in parts or ("optimizer" in parts) != (run.optimizer is not None):
            here = "with one" if run.optimizer else "without"
            raise StateError(
                f"the saved parts are {', '.join(sorted(parts))}; this run has a model and is "
                f"{here} optimizer"
            )
        _check_alike(run, trainer)
        if own["gradients"]:
            _check_window(self._windows.length, trainer["window"])
        model = plain_model(run)
        entries = {plain_name(name): name for name in model.state_dict()}
        found = {**parts["model"], **trainer["model_extra"]}
        _check_tensors(
            "the saved model is another one",
            model.state_dict(),
            {entries.get(n, n): value for n, value in found.items()},
        )
        TrainerProgress().load_state_dict(trainer["progress"])
        self._data.check(trainer["data"], own["data"])
        check_random_state(own["random"])
        optimizer_state = (
            load_named_optimizer_state(run.optimizer, _names(run), parts["optimizer"])
            if run.optimizer
            else None
        )
        beside = _beside(run)
        _check_tensors(
            "the optimizer's parameters beside the model are others",
            {name: parameter for parameter, name in beside.items()},
            own["beside"],
        )

        self._load_hooks(own["hooks"])
        run.progress.load_state_dict(trainer["progress"])
        run.metrics.load_state_dict(own["metrics"], run.accelerator.device)
        self._data.load_state_dict(trainer["data"], own["data"])
        self._windows.load_state_dict(own["window"])
        found |= {name: value for name, value in own["buffers"].items() if name in entries}
        model.load_state_dict({entries[name]: value for name, value in found.items()})
        self._load_unsaved_buffers(own["buffers"])
        for parameter, name in beside.items():
            with torch.no_grad():
                parameter.copy_(own["beside"][name])
        if run.optimizer is not None:
            run.optimizer.load_state_dict(optimizer_state)  # type: ignore[arg-type]  # one has both
        if run.lr_scheduler is not None:
            run.lr_scheduler.load_state_dict(trainer["lr_scheduler"])
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(trainer["scaler"])
        for parameter, name in _names(run).items():
            gradient = own["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        ddp = ddp_of(run.model)
        if ddp is not None and own["gradients"]:
            # After a pass without exchange, DDP leaves each rank its buffers in the next one.
            ddp.require_forward_param_sync = False
        self._random = own["random"]

    def go_on_drawing(self) -> None:
        """From here on, draw what the saved run would have drawn; nothing if none was loaded."""
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None

    def _parts(self) -> dict[str, Any]:
        """What all ranks share, by the file it goes to."""
        run = self._run
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
                "window": self._windows.length,
                "lr_scheduler": run.lr_scheduler.state_dict() if run.lr_scheduler else None,
                "scaler": scaler.state_dict() if scaler else None,
                "types": _types(run),
                "data": self._data.state_dict(),
            },
        }
        if run.optimizer is not None:
            parts["optimizer"] = named_optimizer_state(run.optimizer, _names(run))
        return parts

    def _rank_state(self) -> dict[str, Any]:
        """What this rank has for itself."""
        run = self._run
        run.metrics.read_deferred(run.accelerator)
        # DDP takes the first rank's buffers at the next forward pass, unless told otherwise.
        shared = set(plain_state(run)) if run.accelerator.is_main_process else set()
        buffers = {plain_name(name): value for name, value in plain_model(run).named_buffers()}
        return {
            "random": capture_random_state() if self._random is None else self._random,
            "data": self._data.rank_state_dict(),
            "window": self._windows.state_dict(run.progress.step_id),
            "gradients": {n: p.grad for p, n in _names(run).items() if p.grad is not None},
            "buffers": {name: value for name, value in buffers.items() if name not in shared},
            # Such as of a loss that is learned; nothing keeps the ranks' alike.
            "beside": {name: parameter for parameter, name in _beside(run).items()},
            "hooks": self._hooks.state_dict(),
            "metrics": run.metrics.state_dict(),
        }

    def _load_unsaved_buffers(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Of the buffers that the model leaves out of its state, those that are alike in kind.

        Others are caches, as of positions, that have grown since they were made.
        """
        with torch.no_grad():
            for name, buffer in plain_model(self._run).named_buffers():
                value = saved.get(plain_name(name))
                if value is not None and _kind(value) == _kind(buffer):
                    buffer.copy_(value)

    def _load_hooks(self, state: Mapping[str, Any]) -> None:
        before = copy.deepcopy(self._hooks.state_dict())
        try:
            self._hooks.load_state_dict(state)  # compares names before it loads
        except Exception:  # whatever a hook of the user's raises; raised again below
            for hook in self._hooks.named_hooks():
                if hook.name in before:
                    with suppress(Exception):  # the one that has failed may fail again
                        hook.load_state_dict(before[hook.name])
            raise


def ranks_of(run: PipelineRun) -> Ranks:
    """The processes that save and load together: a collective where there are several."""
    several = run.accelerator.num_processes > 1
    return Ranks.of_job(in_background=False) if several else Ranks.alone()


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
    """Of all parameters that are trained, the model's and others."""
    return {**_names_of_model(run), **_beside(run)}


def _names_of_model(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in plain_model(run).named_parameters()}


def _beside(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Parameters that the optimizer has, and the model has not."""
    return {} if run.optimizer is None else parameters_beside(run.optimizer, _names_of_model(run))


def _check_tensors(what: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
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
        raise StateError(f"{what}: " + "; ".join(problems))


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
