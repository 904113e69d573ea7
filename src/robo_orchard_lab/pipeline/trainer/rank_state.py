"""State of one rank at a commit point: RNG, data position, accumulated gradients, hook states."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from robo_orchard_core.utils.hook import add_origin
from robo_orchard_lab.pipeline.checkpoint import (
    capture_random_state,
    check_random_state,
    keyed_random_state,
    parameters_beside,
    restore_random_state,
)
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects, parts_for_rank
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.model import ddp_of, plain_model, plain_name, plain_state
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded, local_tensor
from robo_orchard_lab.pipeline.sharding import shard_like
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema, Tensors
from robo_orchard_lab.pipeline.trainer.accumulation import WINDOW_SCHEMA, AccumulationWindows


def trained_parameters(run: PipelineRun) -> Iterable[torch.nn.Parameter]:
    """Return all parameters of the model and of the optimizers, faster than `trained_names`."""
    groups = [group for each in run.optimizers.values() for group in each.param_groups]
    of_optimizers = [parameter for group in groups for parameter in group["params"]]
    every = chain(run.model.parameters(), of_optimizers)
    return {id(parameter): parameter for parameter in every}.values()  # hash() calls Python


def trained_names(run: PipelineRun) -> dict[torch.nn.Parameter, str]:
    """Return the names of all parameters of the model and of the optimizers."""
    names = {parameter: plain_name(n) for n, parameter in plain_model(run).named_parameters()}
    for owner, optimizer in run.optimizers.items():
        for parameter, name in parameters_beside(optimizer, names).items():
            names[parameter] = f"{owner}.{name}" if owner else name
    return names


def _extra_parameters(run: PipelineRun) -> dict[str, torch.nn.Parameter]:
    """Return the optimizers' parameters outside the model, such as of a learned loss, by name."""
    of_model = set(plain_model(run).parameters())
    return {name: p for p, name in trained_names(run).items() if p not in of_model}


def adopt_replaced_parameters(run: PipelineRun, before: Mapping[str, torch.nn.Parameter]) -> None:
    """Put parameters that loading a state has replaced into the optimizers' groups.

    Raises:
        StateError: the new parameters differ in names, shape or dtype, or belong to a DDP model,
            which would not reduce their gradients; the message names the module.
    """
    model = plain_model(run)
    after = dict(model.named_parameters())
    replaced = {name: new for name, new in after.items() if new is not before.get(name)}
    for name in dict.fromkeys([*before, *after]):
        was, now = (_kind(p[name]) if name in p else "no parameter" for p in (before, after))
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
    for optimizer in run.optimizers.values():
        for group in optimizer.param_groups:
            group["params"] = [current.get(parameter, parameter) for parameter in group["params"]]


def check_keys(what: str, found: Mapping[str, Any], expected: set[str]) -> None:
    """Raise a ``StateError`` if keys of a state are missing or unexpected."""
    if set(found) != expected:
        raise StateError(
            f"expected in {what}: {', '.join(sorted(expected))}; "
            f"found: {', '.join(map(str, sorted(found))) or 'nothing'}"
        )


def check_tensors(what: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise a ``StateError`` that lists tensors with different names, shapes or dtypes."""
    problems = [f"missing: {name}" for name in live if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in live]
    problems += [
        f"{name}: saved as {_kind(saved[name])}, here {_kind(value)}"
        for name, value in live.items()
        if name in saved
        and (isinstance(value, torch.Tensor) or isinstance(saved[name], torch.Tensor))
        and not is_lazy(value)
        and _kind(saved[name]) != _kind(value)
    ]
    if problems:
        raise StateError(f"{what}: " + "; ".join(problems))


def _kind(tensor: Any) -> str:
    """Return dtype and shape, such as ``float32[2, 3]``, or the type of another object."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _is_divided(tensor: torch.Tensor) -> bool:
    return is_sharded(tensor) and tensor.device_mesh.size() > 1


_SCHEMA = StateSchema(
    optional=["skipped_batches"],
    beside=Tensors,
    buffers=Tensors,
    data=dict[str, Any],
    hooks=dict[str, Any],
    metrics=dict[str, Any],
    own_gradients=Tensors,
    random=dict[str, Any],
    reduced_gradients=Tensors,
    skipped_batches=Count | None,
    window=WINDOW_SCHEMA.type,
)


@dataclass(eq=False)
class RankStates:
    """Capture and restore of the state of this rank, also at a different world size.

    Gradients of an open accumulation window are either this rank's own, of which the job's are the
    mean over the ranks, or reduced already, as sharded ones may be.
    """

    run: PipelineRun
    hooks: PipelineHooks
    data: TrainingData
    windows: AccumulationWindows
    _random: Mapping[str, Any] | None = field(default=None, init=False)
    """Loaded RNG states, until restored."""
    _loaded_gradients: Mapping[str, torch.Tensor] = field(default_factory=dict, init=False)
    """Loaded gradients of this rank, until reduced."""

    def take(self) -> dict[str, Any]:
        """Return the state of this rank; tensors are references.

        All ranks call it: a collective if metrics are pending.
        """
        run = self.run
        run.metrics.read_deferred(run.accelerator)
        # DDP broadcasts the first rank's buffers at the next forward pass.
        shared = set(plain_state(run)) if run.accelerator.is_main_process else set()
        buffers = {plain_name(name): value for name, value in plain_model(run).named_buffers()}
        named = trained_names(run).items()
        gradients = {name: p.grad for p, name in named if p.grad is not None}
        return {
            "random": capture_random_state() if self._random is None else self._random,
            "data": self.data.rank_state_dict(),
            "window": self.windows.state_dict(),
            "skipped_batches": run.progress.skipped_batches,
            "own_gradients": {
                name: local_tensor(g) for name, g in gradients.items() if not _is_divided(g)
            },
            "reduced_gradients": {name: g for name, g in gradients.items() if _is_divided(g)},
            "buffers": {name: value for name, value in buffers.items() if name not in shared},
            "beside": _extra_parameters(run),  # may differ between ranks
            "hooks": self.hooks.state_dict(),
            "metrics": run.metrics.state_dict(),
        }

    def check(self, state: Mapping[str, Any], of_data: Mapping[str, Any]) -> None:
        """Raise a ``StateError`` if :meth:`load` can't load a state.

        ``of_data`` is the state of the data that all ranks have in common.
        """
        self.hooks.check_states(state["hooks"], plain_model(self.run))
        MetricsBoard.check(state["metrics"])
        self.data.check(of_data, state["data"])
        check_random_state(state["random"])
        self.windows.check(state["window"])
        live = {name: parameter for parameter, name in trained_names(self.run).items()}
        lost = [
            name
            for key in ("reduced_gradients", "own_gradients")
            for name, gradient in state[key].items()
            if name not in live
            or live[name].shape != gradient.shape
            or live[name].is_complex() != gradient.is_complex()
        ]
        if lost:
            raise StateError(
                "the run was saved within an accumulation window, and this run's model has no "
                f"parameters for the gradients of {', '.join(lost)}; resume from a checkpoint that "
                "was saved after an optimizer step"
            )
        check_tensors(
            "the optimizer has different parameters outside the model",
            _extra_parameters(self.run),
            state["beside"],
        )

    def load_hooks(self, state: Mapping[str, Any], undo: ExitStack) -> None:
        """Load the states of all hooks; ``undo`` restores the states of all hooks."""
        undo.callback(self._restore_hooks, copy.deepcopy(self.hooks.state_dict()))
        self.hooks.load_state_dict(state["hooks"])  # compares names before it loads

    def _restore_hooks(self, before: Mapping[str, Any]) -> None:
        for hook in self.hooks.named_hooks():
            if hook.name in before:
                with suppress(Exception):  # the failed hook may fail again
                    hook.load_state_dict(before[hook.name])

    def load(self, state: Mapping[str, Any], of_data: Mapping[str, Any]) -> None:
        """Load a checked state, except those of hooks. Call after the model has loaded."""
        run = self.run
        run.metrics.load_state_dict(state["metrics"], run.accelerator.device)
        self.data.load_state_dict(of_data, state["data"])
        self.windows.load_state_dict(state["window"], run.accelerator.device)
        run.progress.skipped_batches = state.get("skipped_batches") or 0
        with torch.no_grad():
            for name, buffer in plain_model(run).named_buffers():
                value = state["buffers"].get(plain_name(name))
                # Non-persistent buffers of another shape are caches that grow.
                if value is not None and _kind(value) == _kind(buffer):
                    buffer.copy_(value)
            for name, parameter in _extra_parameters(run).items():
                parameter.copy_(state["beside"][name])
        self._load_gradients(state["own_gradients"], state["reduced_gradients"])
        ddp = ddp_of(run.model)
        if ddp is not None and state["window"]["within"]:
            # After a pass without reduction, DDP does not broadcast buffers in the next one.
            ddp.require_forward_param_sync = False
        self._random = state["random"]

    def _load_gradients(
        self, own: Mapping[str, torch.Tensor], reduced: Mapping[str, torch.Tensor]
    ) -> None:
        """Restore accumulated gradients; :meth:`reduce_gradients` adds those of other ranks."""
        self._loaded_gradients = own
        for parameter, name in trained_names(self.run).items():
            gradient, of_rank = reduced.get(name), own.get(name)
            if of_rank is not None and not _is_divided(parameter):
                of_rank = shard_like(parameter, of_rank)
                gradient = of_rank if gradient is None else gradient + of_rank
            parameter.grad = None if gradient is None else gradient.to(parameter)

    def reduce_gradients(self) -> None:
        """Add the mean of all ranks' loaded gradients to sharded parameters. A collective."""
        own, self._loaded_gradients = self._loaded_gradients, {}
        named = trained_names(self.run).items()
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
            share = shard_like(parameter, mean.div_(self.run.accelerator.num_processes))
            parameter.grad = share if parameter.grad is None else parameter.grad + share

    def restore_rng(self) -> None:
        """Restore the loaded RNG states, once; does nothing in a fresh run."""
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None

    # --- change of the world size ------------------------------------------------------------

    def part_of(self, index: int, count: int, of_rank: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of one saved rank's state that :meth:`redistribute` needs."""
        state, accelerator = checked_rank_state(of_rank), self.run.accelerator
        MetricsBoard.check(state["metrics"])
        self.hooks.check_states(state["hooks"], plain_model(self.run))
        mine = parts_for_rank(range(count), accelerator.process_index, accelerator.num_processes)
        return {
            "own_gradients": state["own_gradients"] if index in mine else {},
            "hooks": {n: s for n, s in state["hooks"].items() if n in self._redistributing()},
            "metrics": state["metrics"],
        }

    def redistribute(
        self, nearest: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], key: str
    ) -> dict[str, Any]:
        """Return the state that this rank resumes from at a different world size.

        State that is equal on all ranks comes from the same rank, or from the last one. Gradients,
        metrics and the states of hooks that define ``redistribute_states`` are redistributed. A new
        rank gets new RNG states.

        Args:
            nearest: state of the same rank, or else of the last rank.
            parts: parts of all saved ranks, from :meth:`part_of`.
            key: key of the run and its step, which seeds the RNG of new ranks.
        """
        accelerator = self.run.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        gradients = {name: torch.zeros_like(g) for name, g in nearest["own_gradients"].items()}
        for part in parts:
            for name, gradient in part["own_gradients"].items():
                total = gradients.setdefault(name, torch.zeros_like(gradient))
                total.add_(gradient, alpha=processes / len(parts))  # keeps the mean over ranks
        hooks = dict(nearest["hooks"])
        for name, hook in self._redistributing().items():
            states = [part["hooks"][name] for part in parts if name in part["hooks"]]
            if len(states) < len(parts):
                continue  # refused later, when hooks are compared
            try:
                hooks[name] = hook.redistribute_states(states, processes)[rank]
            except Exception as error:
                add_origin(error, f"{name!r} (redistribute_states)")
                raise
        metrics = MetricsBoard.redistribute_states([part["metrics"] for part in parts], processes)
        is_new = rank >= len(parts)
        return {
            **nearest,
            "random": keyed_random_state(f"{key}/{rank}") if is_new else nearest["random"],
            "own_gradients": gradients,
            "hooks": hooks,
            "metrics": metrics[rank],
        }

    def _redistributing(self) -> dict[str, PipelineHooks]:
        default = PipelineHooks.redistribute_states
        hooks = self.hooks.all_hooks()
        return {hook.name: hook for hook in hooks if type(hook).redistribute_states is not default}


def checked_rank_state(of_rank: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state that :meth:`RankStates.take` returned, from a checkpoint's rank part.

    Raises:
        StateError: the part is not such a state.
    """
    state = of_rank.get("state")
    state = state if isinstance(state, dict) else {}
    check_keys("the state of a rank", {"skipped_batches": 0, **state}, {*_SCHEMA.names})
    _SCHEMA.check(state, "state")
    return state
