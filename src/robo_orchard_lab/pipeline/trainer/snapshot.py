"""Snapshot of a run at a commit point: capture for a checkpoint, and restore from one.

State shared by all ranks is saved once, and every rank saves its own state. Model weights and
optimizer state are parts of their own, with tensors by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from robo_orchard_core.utils.hook import add_origin
from robo_orchard_lab.pipeline.checkpoint import (
    Ranks,
    SavedState,
    keyed_random_state,
    load_named_optimizer_state,
    named_optimizer_state,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.context import PipelineRun, Snapshot
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.distributed.collectives import parts_for_rank
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.model import plain_model, plain_name, plain_state, plain_weights
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.run_info import describe_run
from robo_orchard_lab.pipeline.sharding import reshard
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows
from robo_orchard_lab.pipeline.trainer.rank_state import (
    RankStates,
    adopt_replaced_parameters,
    check_keys,
    check_tensors,
    check_types,
    check_window,
    checked_rank_state,
    trained_names,
    types_of,
)


class WorldSizeChange:
    """Derives this rank's state from a checkpoint that was saved at a different world size.

    State that is equal on all ranks comes from the same rank, or from the last one. Partial state
    is redistributed: accumulated gradients, published metrics, and the states of hooks that define
    ``redistribute_states``. A new rank gets new RNG states.

    Args:
        hooks: all hooks of the run.
        rank: rank of this process.
        processes: current world size.
    """

    def __init__(self, hooks: PipelineHooks, rank: int, processes: int) -> None:
        self._hooks = hooks
        self._rank = rank
        self._processes = processes

    def part_of(self, index: int, count: int, of_rank: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of one saved rank's state that :meth:`state` needs.

        Raises:
            StateError: ``of_rank`` is not the state of a rank.
        """
        state = checked_rank_state(of_rank)
        mine = index in parts_for_rank(range(count), self._rank, self._processes)
        return {
            "own_gradients": state["own_gradients"] if mine else {},
            "hooks": {n: s for n, s in state["hooks"].items() if n in self._redistributing()},
            "metrics": state["metrics"],
        }

    def state(
        self, nearest: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], key: str
    ) -> dict[str, Any]:
        """Return the state that this rank resumes from.

        Args:
            nearest: state of the same rank, or else of the last rank.
            parts: parts of all saved ranks, from :meth:`part_of`.
            key: key of the run and its step, which seeds the RNG of new ranks.

        Raises:
            StateError: a hook's state can't be redistributed.
        """
        new = self._rank >= len(parts)
        metrics = MetricsBoard.redistribute_states(
            [part["metrics"] for part in parts], self._processes
        )
        return {
            **nearest,
            "random": keyed_random_state(f"{key}/{self._rank}") if new else nearest["random"],
            "own_gradients": self._own_gradients(
                nearest["own_gradients"], [part["own_gradients"] for part in parts]
            ),
            "hooks": {**nearest["hooks"], **self._hook_states([p["hooks"] for p in parts])},
            "metrics": metrics[self._rank],
        }

    def _own_gradients(
        self, nearest: Mapping[str, torch.Tensor], parts: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Return gradients whose mean over the ranks is unchanged."""
        scale = self._processes / len(parts)
        found = {name: torch.zeros_like(gradient) for name, gradient in nearest.items()}
        for part in parts:
            for name, gradient in part.items():
                if name in found:
                    found[name].add_(gradient, alpha=scale)
                else:
                    found[name] = gradient * scale
        return found

    def _hook_states(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found = {}
        for name, hook in self._redistributing().items():
            states = [part[name] for part in parts if name in part]
            if len(states) < len(parts):
                continue  # refused later, when hooks are compared
            try:
                found[name] = hook.redistribute_states(states, self._processes)[self._rank]
            except Exception as error:
                add_origin(error, f"{name!r} (redistribute_states)")
                raise
        return found

    def _redistributing(self) -> dict[str, PipelineHooks]:
        default = PipelineHooks.redistribute_states
        return {
            hook.name: hook
            for hook in self._hooks.all_hooks()
            if type(hook).redistribute_states is not default
        }


STATE_VERSION = 4
_KEYS = {
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


class RunSnapshots:
    """Captures a run, and restores a run from a snapshot.

    Args:
        run: objects of the run.
        hooks: all hooks of the run.
        data: training data.
        windows: accumulation windows.
        check_weights: raises if the weights differ between ranks.
    """

    def __init__(
        self,
        run: PipelineRun,
        hooks: PipelineHooks,
        data: TrainingData,
        windows: AccumulationWindows,
        check_weights: Callable[[], None],
    ) -> None:
        self._run = run
        self._check_weights = check_weights
        self._hooks = hooks
        self._data = data
        self._windows = windows
        self._of_rank = RankStates(run, hooks, data, windows)
        accelerator = run.accelerator
        self._world_size_change = WorldSizeChange(
            hooks, accelerator.process_index, accelerator.num_processes
        )

    def take(self) -> Snapshot:
        """Capture the run at a commit point; tensors are references. All ranks call it.

        A collective if metrics are pending, and to compare the weights of DDP's ranks.
        """
        self._check_weights()
        reshard(plain_model(self._run))
        return Snapshot(
            parts=self._parts(),
            of_rank={"state": self._of_rank.take()},
            about=self._about,
        )

    @cached_property
    def _about(self) -> dict[str, Any]:
        """Description of the run, from the first snapshot, since it costs milliseconds."""
        return describe_run(self._run, self._hooks)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a snapshot into a new directory. All ranks call it."""
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

    def part_of_rank(self, index: int, count: int, of_rank: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part to keep of a saved rank's state after a change of world size."""
        return self._world_size_change.part_of(index, count, of_rank)

    def load(self, saved: SavedState) -> None:
        """Restore the run from a snapshot; :meth:`restore_rng` restores the RNG afterwards.

        All comparisons come before the first change of a live object. If a hook refuses its state,
        all hooks get their previous states back.

        Args:
            saved: checkpoint, read with :meth:`part_of_rank`.

        Raises:
            StateError: the snapshot belongs to a different model, optimizer, LR scheduler or set
                of hooks, to an open accumulation window of a different length, or can't be
                restored at this world size.
        """
        run, parts = self._run, saved.parts
        trainer = _checked_trainer_state(parts)
        own = checked_rank_state(saved.rank_parts)
        if "model" not in parts or ("optimizer" in parts) != (run.optimizer is not None):
            optimizer = "an" if run.optimizer else "no"
            raise StateError(
                f"the saved parts are {', '.join(sorted(parts))}; this run has a model and "
                f"{optimizer} optimizer"
            )
        if trainer["processes"] != saved.info.ranks:
            raise StateError(
                f"expected the states of {trainer['processes']} ranks, found {saved.info.ranks}; "
                "call save_checkpoint on all ranks"
            )
        check_types(run, trainer["types"])
        if saved.rank_results:
            key = f"{trainer['data']['seed']}/{saved.info.step}"
            own = self._world_size_change.state(own, saved.rank_results, key)
        if own["window"]["within"]:
            check_window(self._windows.length, trainer["window"])
        model = plain_model(run)
        entries = {plain_name(name): name for name in model.state_dict()}
        found = {**parts["model"], **trainer["model_extra"]}
        check_tensors(
            "the saved model is different",
            model.state_dict(),
            {entries.get(n, n): value for n, value in found.items()},
        )
        TrainerProgress().load_state_dict(trainer["progress"])
        optimizer_state = (
            load_named_optimizer_state(run.optimizer, trained_names(run), parts["optimizer"])
            if run.optimizer
            else None
        )
        self._of_rank.check(own, trainer["data"])

        self._of_rank.load_hooks(own)
        run.progress.load_state_dict(trainer["progress"])
        found |= {name: value for name, value in own["buffers"].items() if name in entries}
        before = dict(model.named_parameters())
        model.load_state_dict({entries[name]: value for name, value in found.items()})
        adopt_replaced_parameters(run, before)
        if run.optimizer is not None:
            run.optimizer.load_state_dict(optimizer_state)  # type: ignore[arg-type]  # one has both
        if run.lr_scheduler is not None:
            run.lr_scheduler.load_state_dict(trainer["lr_scheduler"])
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(trainer["scaler"])
        self._of_rank.load(own, trainer["data"])

    def reduce_gradients(self) -> None:
        """Reduce the loaded gradients of a sharded model after :meth:`load`; a collective."""
        self._of_rank.reduce_gradients()

    def restore_rng(self) -> None:
        """Restore the loaded RNG states, once; does nothing in a fresh run."""
        self._of_rank.restore_rng()

    def _parts(self) -> dict[str, Any]:
        """Return the state shared by all ranks, by file."""
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
                "window": self._windows.length,
                "lr_scheduler": run.lr_scheduler.state_dict() if run.lr_scheduler else None,
                "scaler": scaler.state_dict() if scaler else None,
                "types": types_of(run),
                "data": self._data.state_dict(),
            },
        }
        if run.optimizer is not None:
            parts["optimizer"] = named_optimizer_state(run.optimizer, trained_names(run))
        return parts


def ranks_of(run: PipelineRun) -> Ranks:
    """Return the ranks that save and load together; a collective for several ranks."""
    several = run.accelerator.num_processes > 1
    return Ranks.of_job(in_background=False) if several else Ranks.alone()


def _checked_trainer_state(parts: Mapping[str, Any]) -> Mapping[str, Any]:
    trainer = parts.get("trainer")
    if not isinstance(trainer, dict) or trainer.get("version") != STATE_VERSION:
        found_version = trainer.get("version") if isinstance(trainer, dict) else None
        raise StateError(
            f"expected a trainer state of version {STATE_VERSION}, found {found_version!r}; resume "
            "with the release that wrote the checkpoint"
        )
    check_keys("the trainer's state", trainer, _KEYS)
    return trainer
