"""State of one rank at a commit point: RNG, data position, accumulated gradients, hook states."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from robo_orchard_lab.pipeline.checkpoint import (
    capture_random_state,
    check_random_state,
    parameters_beside,
    restore_random_state,
)
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import ddp_of, plain_model, plain_name, plain_state
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded, local_tensor
from robo_orchard_lab.pipeline.sharding import shard_like
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows

# --- Trained parameters ------------------------------------------------------------------------


def trained_parameters(run: PipelineRun) -> Iterable[torch.nn.Parameter]:
    """Return all parameters of the model and of the optimizer, faster than `trained_names`."""
    groups = [] if run.optimizer is None else run.optimizer.param_groups
    of_optimizer = [parameter for group in groups for parameter in group["params"]]
    every = chain(run.model.parameters(), of_optimizer)
    return {id(parameter): parameter for parameter in every}.values()  # hash() calls Python


def trained_names(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Return the names of all parameters of the model and of the optimizer."""
    names = _names_of_model(run)
    return {**names, **_extra_names(run, names)}


def extra_names(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Return names of the optimizer's parameters outside the model, such as of a learned loss."""
    return _extra_names(run, _names_of_model(run))


def _names_of_model(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in plain_model(run).named_parameters()}


def _extra_names(
    run: PipelineRun, names: dict[torch.nn.Parameter, str]
) -> dict[torch.nn.Parameter, str]:
    return {} if run.optimizer is None else parameters_beside(run.optimizer, names)


def adopt_replaced_parameters(run: PipelineRun, before: Mapping[str, torch.nn.Parameter]) -> None:
    """Put parameters that loading a state has replaced into the optimizer's groups.

    Args:
        run: objects of the run.
        before: the plain model's parameters before loading, by name.

    Raises:
        StateError: the new parameters differ in names, shape or dtype, or belong to a DDP model,
            which would not reduce their gradients; the message names the module.
    """
    model = plain_model(run)
    after = dict(model.named_parameters())
    replaced = {name: new for name, new in after.items() if new is not before.get(name)}
    for name in dict.fromkeys([*before, *after]):
        was, now = (kind_of(p[name]) if name in p else "no parameter" for p in (before, after))
        problem = ""
        if was != now:
            problem = f"{name} was {was}, and is {now} afterwards"
        elif name in replaced and ddp_of(run.model) is not None:
            problem = f"DDP would not reduce the gradients of the new {name}"
        if problem:
            modules = dict(model.named_modules())
            owner = name.rpartition(".")[0]
            while owner not in modules:
                owner = owner.rpartition(".")[0]
            raise StateError(
                f"load_state_dict of the module {type(modules[owner]).__qualname__} "
                f"({owner or 'the model itself'}) replaced parameters: {problem}; expected the "
                "same parameters with new values: copy the values in place, without assign=True"
            )
    for name, new in replaced.items():
        new.data = new.data.to(before[name].device)
        new.requires_grad_(before[name].requires_grad)
    current = {before[name]: new for name, new in replaced.items()}
    for group in run.optimizer.param_groups if run.optimizer is not None else ():
        group["params"] = [current.get(parameter, parameter) for parameter in group["params"]]


# --- Compatibility of a saved run --------------------------------------------------------------


def check_keys(what: str, found: Mapping[str, Any], expected: set[str]) -> None:
    """Raise a ``StateError`` if keys of a state are missing or unexpected."""
    if set(found) != expected:
        raise StateError(
            f"expected in {what}: {', '.join(sorted(expected))}; "
            f"found: {', '.join(map(str, sorted(found))) or 'nothing'}"
        )


def types_of(run: PipelineRun) -> dict[str, str | None]:
    """Return the class names of optimizer, LR scheduler and scaler."""
    parts = {
        "optimizer": run.optimizer,
        "lr_scheduler": run.lr_scheduler,
        "scaler": run.accelerator.scaler,
    }
    return {name: None if part is None else type(part).__qualname__ for name, part in parts.items()}


def check_types(run: PipelineRun, saved: Mapping[str, Any]) -> None:
    """Raise a ``StateError`` if optimizer, LR scheduler or scaler have a different class."""
    for part, live in types_of(run).items():
        if saved.get(part) != live:
            raise StateError(
                f"expected the {part} of the saved run, {saved.get(part) or 'none'}; "
                f"found {live or 'none'}"
            )


def check_window(window: int, saved: int) -> None:
    """Raise a ``StateError`` if an open accumulation window has a different length."""
    if saved != window:
        raise StateError(
            f"the run was saved within an accumulation window of {saved} batches, which can't "
            f"continue with {window}; resume with gradient_accumulation_steps={saved}"
        )


def check_tensors(what: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise a ``StateError`` that lists tensors with different names, shapes or dtypes."""
    problems = [f"missing: {name}" for name in live if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in live]
    problems += [
        f"{name}: saved as {kind_of(saved[name])}, here {kind_of(value)}"
        for name, value in live.items()
        if isinstance(value, torch.Tensor)
        and isinstance(saved.get(name), torch.Tensor)
        and not is_lazy(value)
        and (saved[name].shape, saved[name].dtype) != (value.shape, value.dtype)
    ]
    if problems:
        raise StateError(f"{what}: " + "; ".join(problems))


def kind_of(tensor: torch.Tensor) -> str:
    """Return dtype and shape, such as ``float32[2, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


# --- Accumulated gradients of an open window ---------------------------------------------------


def own_gradients(run: PipelineRun) -> dict[str, torch.Tensor]:
    """Return the unreduced gradients of this rank, by parameter name.

    The gradients of the job are their mean over the ranks.
    """
    return {
        name: local_tensor(parameter.grad)
        for parameter, name in trained_names(run).items()
        if parameter.grad is not None and not _is_divided(parameter.grad)
    }


def reduced_gradients(run: PipelineRun) -> dict[str, torch.Tensor]:
    """Return the sharded gradients that are reduced already, by parameter name."""
    return {
        name: parameter.grad
        for parameter, name in trained_names(run).items()
        if parameter.grad is not None and _is_divided(parameter.grad)
    }


def check_open_gradients(
    run: PipelineRun, own: Mapping[str, torch.Tensor], reduced: Mapping[str, torch.Tensor]
) -> None:
    """Check that this run has parameters for the gradients.

    Raises:
        StateError: gradients of parameters that this run lacks; the message lists them.
    """
    live = {name: parameter for parameter, name in trained_names(run).items()}
    lost = [
        name
        for name, gradient in chain(reduced.items(), own.items())
        if name not in live or live[name].shape != gradient.shape
    ]
    if lost:
        raise StateError(
            "the run was saved within an accumulation window, and this run's model has no "
            f"parameters for the gradients of {', '.join(lost)}; resume from a checkpoint that was "
            "saved after an optimizer step"
        )


def set_open_gradients(
    run: PipelineRun, own: Mapping[str, torch.Tensor], reduced: Mapping[str, torch.Tensor]
) -> None:
    """Restore accumulated gradients, to which the next backward passes add.

    Unreduced gradients of sharded parameters are left to :meth:`RankStates.reduce_gradients`.
    """
    for parameter, name in trained_names(run).items():
        gradient, of_rank = reduced.get(name), own.get(name)
        if of_rank is not None and not _is_divided(parameter):
            of_rank = shard_like(parameter, of_rank)
            gradient = of_rank if gradient is None else gradient + of_rank
        parameter.grad = None if gradient is None else gradient.to(parameter)


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
    """Captures and restores the state of this rank.

    Args:
        run: objects of the run.
        hooks: all hooks of the run.
        data: training data.
        windows: accumulation windows.
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
        self._random: Mapping[str, Any] | None = None  # loaded RNG states, until restored
        self._loaded_gradients: Mapping[str, torch.Tensor] = {}  # of this rank, until reduced

    def take(self) -> dict[str, Any]:
        """Return the state of this rank; tensors are references.

        All ranks call it: a collective if metrics are pending.
        """
        run = self._run
        run.metrics.read_deferred(run.accelerator)
        # DDP broadcasts the first rank's buffers at the next forward pass.
        shared = set(plain_state(run)) if run.accelerator.is_main_process else set()
        buffers = {plain_name(name): value for name, value in plain_model(run).named_buffers()}
        return {
            "random": capture_random_state() if self._random is None else self._random,
            "data": self._data.rank_state_dict(),
            "window": self._windows.state_dict(),
            "own_gradients": own_gradients(run),
            "reduced_gradients": reduced_gradients(run),
            "buffers": {name: value for name, value in buffers.items() if name not in shared},
            # Parameters outside the model may differ between ranks.
            "beside": {name: parameter for parameter, name in extra_names(run).items()},
            "hooks": self._hooks.state_dict(),
            "metrics": run.metrics.state_dict(),
        }

    def check(self, state: Mapping[str, Any], of_data: Mapping[str, Any]) -> None:
        """Check that :meth:`load` can load a state; changes nothing.

        Args:
            state: state of a rank.
            of_data: data position of the job.

        Raises:
            StateError: the state belongs to a different run.
        """
        self._data.check(of_data, state["data"])
        check_random_state(state["random"])
        self._windows.check(state["window"])
        check_open_gradients(self._run, state["own_gradients"], state["reduced_gradients"])
        check_tensors(
            "the optimizer has different parameters outside the model",
            {name: parameter for parameter, name in extra_names(self._run).items()},
            state["beside"],
        )

    def load_hooks(self, state: Mapping[str, Any]) -> None:
        """Load the states of all hooks; if a hook raises, restore the states of all hooks."""
        before = copy.deepcopy(self._hooks.state_dict())
        try:
            self._hooks.load_state_dict(state["hooks"])  # compares names before it loads
        except Exception:  # any error of a user's hook; raised again below
            for hook in self._hooks.named_hooks():
                if hook.name in before:
                    with suppress(Exception):  # the failed hook may fail again
                        hook.load_state_dict(before[hook.name])
            raise

    def load(self, state: Mapping[str, Any], of_data: Mapping[str, Any]) -> None:
        """Load a checked state, except those of hooks. Call after the model has loaded."""
        run = self._run
        run.metrics.load_state_dict(state["metrics"], run.accelerator.device)
        self._data.load_state_dict(of_data, state["data"])
        self._windows.load_state_dict(state["window"], run.accelerator.device)
        self._load_unsaved_buffers(state["buffers"])
        with torch.no_grad():
            for parameter, name in extra_names(run).items():
                parameter.copy_(state["beside"][name])
        set_open_gradients(run, state["own_gradients"], state["reduced_gradients"])
        self._loaded_gradients = state["own_gradients"]
        ddp = ddp_of(run.model)
        if ddp is not None and state["window"]["within"]:
            # After a pass without reduction, DDP does not broadcast buffers in the next one.
            ddp.require_forward_param_sync = False
        self._random = state["random"]

    def reduce_gradients(self) -> None:
        """Add the mean of all ranks' loaded gradients to sharded parameters. A collective."""
        own, self._loaded_gradients = self._loaded_gradients, {}
        named = trained_names(self._run).items()
        divided = {name: parameter for parameter, name in named if _is_divided(parameter)}
        if not divided:
            return
        names = set[str]().union(*gather_objects([name for name in own if name in divided]))
        for name in sorted(names):  # a rank may have no gradient of some parameters
            parameter = divided[name]
            mean = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            if name in own:
                mean += own[name].to(mean)
            torch.distributed.all_reduce(mean)
            share = shard_like(parameter, mean.div_(self._run.accelerator.num_processes))
            parameter.grad = share if parameter.grad is None else parameter.grad + share

    def restore_rng(self) -> None:
        """Restore the loaded RNG states, once; does nothing in a fresh run."""
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None

    def _load_unsaved_buffers(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Load non-persistent buffers of equal shape and dtype; others are caches that grow."""
        with torch.no_grad():
            for name, buffer in plain_model(self._run).named_buffers():
                value = saved.get(plain_name(name))
                if value is not None and kind_of(value) == kind_of(buffer):
                    buffer.copy_(value)


def checked_rank_state(of_rank: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state that :meth:`RankStates.take` returned, from a checkpoint's rank part.

    Raises:
        StateError: the part is not such a state.
    """
    state = of_rank.get("state")
    state = state if isinstance(state, dict) else {}
    check_keys("the state of a rank", state, _KEYS)
    return state
