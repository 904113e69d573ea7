"""What each rank of a run has for itself at a commit point, to save it and to go on from it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint import (
    capture_random_state,
    check_random_state,
    parameters_beside,
    restore_random_state,
)
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import ddp_of, plain_model, plain_name, plain_state
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded, local_tensor
from robo_orchard_lab.pipeline.sharding import (
    set_unreduced_gradients,
    shard_like,
    unreduced_gradient_names,
    unreduced_gradients,
)
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows

# --- trained names ---------------------------------------------------------------------------
# The names of the parameters that a run trains.


def trained_parameters(run: PipelineRun) -> Iterable[torch.nn.Parameter]:
    """Those that :func:`trained_names` names, in half its time."""
    groups = [] if run.optimizer is None else run.optimizer.param_groups
    beside = [parameter for group in groups for parameter in group["params"]]
    every = chain(run.model.parameters(), beside)
    return {id(parameter): parameter for parameter in every}.values()  # hash() calls Python


def trained_names(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Of all parameters that are trained, the model's and others."""
    names = _names_of_model(run)
    return {**names, **_beside(run, names)}


def names_beside(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Of parameters that the optimizer has, and the model has not, such as of a learned loss."""
    return _beside(run, _names_of_model(run))


def _names_of_model(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in plain_model(run).named_parameters()}


def _beside(
    run: PipelineRun, names: dict[torch.nn.Parameter, str]
) -> dict[torch.nn.Parameter, str]:
    return {} if run.optimizer is None else parameters_beside(run.optimizer, names)


# --- fitting ---------------------------------------------------------------------------------
# Whether a saved run is one that this run can go on as.


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


# --- open gradients --------------------------------------------------------------------------
# The gradients that ranks have added up in an accumulation window that is open.


def own_gradients(run: PipelineRun) -> dict[str, torch.Tensor]:
    """What this rank alone has added up, whole, by the names of the parameters: the same of plain
    models and of those in shards. The job's are the mean of them."""
    found = {
        name: local_tensor(parameter.grad)
        for parameter, name in trained_names(run).items()
        if parameter.grad is not None and not _is_divided(parameter.grad)
    }
    return found | unreduced_gradients(plain_model(run))


def reduced_gradients(run: PipelineRun) -> dict[str, torch.Tensor]:
    """Those that the ranks have reduced already, which in shards stay so: of parameters that no
    update takes."""
    return {
        name: parameter.grad
        for parameter, name in trained_names(run).items()
        if parameter.grad is not None and _is_divided(parameter.grad)
    }


def check_open_gradients(
    run: PipelineRun, own: Mapping[str, torch.Tensor], reduced: Mapping[str, torch.Tensor]
) -> None:
    """Refuse gradients that :func:`set_open_gradients` would find no place for.

    Raises:
        StateError: they are those of other parameters, which it names.
    """
    live = {name: parameter for parameter, name in trained_names(run).items()}
    unreduced = unreduced_gradient_names(plain_model(run)) if own else set()

    def fits(name: str, gradient: torch.Tensor) -> bool:
        return name in live and live[name].shape == gradient.shape

    lost = [name for name, gradient in reduced.items() if not fits(name, gradient)]
    lost += [
        name
        for name, gradient in own.items()
        if not fits(name, gradient) or (_is_divided(live[name]) and name not in unreduced)
    ]
    if lost:
        raise StateError(
            "the run was saved within an accumulation window, and the gradients of "
            f"{', '.join(lost)} have no place in this run's model; go on from a checkpoint "
            "between two windows"
        )


def set_open_gradients(
    run: PipelineRun, own: Mapping[str, torch.Tensor], reduced: Mapping[str, torch.Tensor]
) -> None:
    """Have the backward passes that follow add to what was open."""
    unreduced: dict[str, torch.Tensor] = {}
    for parameter, name in trained_names(run).items():
        gradient, of_rank = reduced.get(name), own.get(name)
        if of_rank is not None and _is_divided(parameter):
            unreduced[name] = of_rank
        elif of_rank is not None:
            of_rank = shard_like(parameter, of_rank)
            gradient = of_rank if gradient is None else gradient + of_rank
        parameter.grad = None if gradient is None else gradient.to(parameter)
    set_unreduced_gradients(plain_model(run), unreduced)


def _is_divided(tensor: torch.Tensor) -> bool:
    return is_sharded(tensor) and tensor.device_mesh.size() > 1


_KEYS = {
    "beside",
    "buffers",
    "data",
    "hooks",
    "metrics",
    "own_gradients",
    "random",
    "reduced_gradients",
    "window",
}


class RankStates:
    """Takes what this rank has for itself, and has it go on from such a state.

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

    def take(self) -> dict[str, Any]:
        """This rank's state; its tensors are the run's own.

        All ranks call it: where metrics wait to be read, they exchange.
        """
        run = self._run
        run.metrics.read_deferred(run.accelerator)
        # DDP takes the first rank's buffers at the next forward pass, unless told otherwise.
        shared = set(plain_state(run)) if run.accelerator.is_main_process else set()
        buffers = {plain_name(name): value for name, value in plain_model(run).named_buffers()}
        return {
            "random": capture_random_state() if self._random is None else self._random,
            "data": self._data.rank_state_dict(),
            "window": self._windows.state_dict(),
            "own_gradients": own_gradients(run),
            "reduced_gradients": reduced_gradients(run),
            "buffers": {name: value for name, value in buffers.items() if name not in shared},
            # Nothing keeps the ranks' alike.
            "beside": {name: parameter for parameter, name in names_beside(run).items()},
            "hooks": self._hooks.state_dict(),
            "metrics": run.metrics.state_dict(),
        }

    def check(self, state: Mapping[str, Any], of_data: Mapping[str, Any]) -> None:
        """Refuse what :meth:`load` could not go on from; changes nothing.

        Args:
            state: of a rank.
            of_data: where the whole job is in its data.

        Raises:
            StateError: it is that of another run, as the message says.
        """
        self._data.check(of_data, state["data"])
        check_random_state(state["random"])
        self._windows.check(state["window"])
        check_open_gradients(self._run, state["own_gradients"], state["reduced_gradients"])
        check_tensors(
            "the optimizer's parameters beside the model are others",
            {name: parameter for parameter, name in names_beside(self._run).items()},
            state["beside"],
        )

    def load_hooks(self, state: Mapping[str, Any]) -> None:
        """Have all hooks take over their states; where one refuses, all get back what they had."""
        before = copy.deepcopy(self._hooks.state_dict())
        try:
            self._hooks.load_state_dict(state["hooks"])  # compares names before it loads
        except Exception:  # whatever a hook of the user's raises; raised again below
            for hook in self._hooks.named_hooks():
                if hook.name in before:
                    with suppress(Exception):  # the one that has failed may fail again
                        hook.load_state_dict(before[hook.name])
            raise

    def load(self, state: Mapping[str, Any], of_data: Mapping[str, Any]) -> None:
        """Go on from a state that was checked, behind the model; of hooks, nothing is loaded."""
        run = self._run
        run.metrics.load_state_dict(state["metrics"], run.accelerator.device)
        self._data.load_state_dict(of_data, state["data"])
        self._windows.load_state_dict(state["window"], run.accelerator.device)
        self._load_unsaved_buffers(state["buffers"])
        with torch.no_grad():
            for parameter, name in names_beside(run).items():
                parameter.copy_(state["beside"][name])
        set_open_gradients(run, state["own_gradients"], state["reduced_gradients"])
        ddp = ddp_of(run.model)
        if ddp is not None and state["window"]["within"]:
            # After a pass without exchange, DDP leaves each rank its buffers in the next one.
            ddp.require_forward_param_sync = False
        self._random = state["random"]

    def go_on_drawing(self) -> None:
        """From here on, draw what the saved rank would have drawn; nothing if none was loaded."""
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None

    def _load_unsaved_buffers(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Of the buffers that the model leaves out of its state, those that are alike in kind.

        Others are caches, as of positions, that have grown since they were made.
        """
        with torch.no_grad():
            for name, buffer in plain_model(self._run).named_buffers():
                value = saved.get(plain_name(name))
                if value is not None and kind_of(value) == kind_of(buffer):
                    buffer.copy_(value)


def checked_rank_state(of_rank: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state that :meth:`RankStates.take` gave, of what a checkpoint has of a rank.

    Raises:
        StateError: it is no such state.
    """
    state = of_rank.get("state")
    state = state if isinstance(state, dict) else {}
    check_keys("the state of a rank", state, _KEYS)
    return state
