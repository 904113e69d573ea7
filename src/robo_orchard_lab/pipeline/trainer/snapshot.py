"""Everything that makes up a run at a commit point, to save it and to go on from it.

What all ranks share is saved once, what each has for itself by every rank. The model's weights are
a part of their own, as plain tensors by name; so is the optimizer's state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
    check_keys,
    check_tensors,
    check_types,
    check_window,
    checked_rank_state,
    trained_names,
    types_of,
)

# --- other processes -------------------------------------------------------------------------
# What each rank goes on from where another number of ranks has saved the run.


class OtherProcesses:
    """Makes this rank's state of those that another number of ranks has saved.

    What is alike on all ranks is taken over from the rank of the same number, or the last one.
    What the ranks had parts of is put together again: open gradients, published metrics, and the
    states of hooks that say so by ``redistribute_states``. A rank that was not there draws from
    random streams of its own.

    Args:
        hooks: all hooks of the run.
        rank: of this process.
        processes: how many there are now.
    """

    def __init__(self, hooks: PipelineHooks, rank: int, processes: int) -> None:
        self._hooks = hooks
        self._rank = rank
        self._processes = processes

    def part_of(self, index: int, count: int, of_rank: Mapping[str, Any]) -> dict[str, Any]:
        """Of what one rank had, of how many, what :meth:`state` needs; the rest is let go.

        Raises:
            StateError: it is no state of a rank.
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
        """What this rank goes on from.

        Args:
            nearest: what the rank of this number had, or else the last one.
            parts: of all ranks that saved.
            key: of the run and its step, which random streams of new ranks follow from.

        Raises:
            StateError: a hook can't go on so.
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
        """Such that their mean over the ranks is what it was."""
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
                continue  # it was not there, which is refused where hooks are compared
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
        self._of_rank = RankStates(run, hooks, data, windows)
        accelerator = run.accelerator
        self._other_processes = OtherProcesses(
            hooks, accelerator.process_index, accelerator.num_processes
        )

    def take(self) -> Snapshot:
        """All of the run, at a commit point; its tensors are the run's own. All ranks call it.

        Takes an exchange of the ranks where metrics wait to be read.
        """
        reshard(plain_model(self._run))
        return Snapshot(
            parts=self._parts(),
            of_rank={"state": self._of_rank.take()},
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

    def part_of_rank(self, index: int, count: int, of_rank: Mapping[str, Any]) -> dict[str, Any]:
        """What to keep of each rank's state where another number of ranks has saved the run."""
        return self._other_processes.part_of(index, count, of_rank)

    def load(self, saved: SavedState) -> None:
        """Make the run that of a snapshot; :meth:`go_on_drawing` then sets the random state.

        Args:
            saved: read with :meth:`part_of_rank`.

        Raises:
            StateError: the snapshot is that of another model, optimizer, schedule or set of hooks,
                was taken within an accumulation window of another length, or can't go on in this
                number of processes. All that can be compared is compared before the first object
                is changed; where a hook refuses its state, all hooks get back what they had.
        """
        run, parts = self._run, saved.parts
        trainer = _checked_trainer_state(parts)
        own = checked_rank_state(saved.rank_parts)
        if "model" not in parts or ("optimizer" in parts) != (run.optimizer is not None):
            here = "with one" if run.optimizer else "without"
            raise StateError(
                f"the saved parts are {', '.join(sorted(parts))}; this run has a model and is "
                f"{here} optimizer"
            )
        if trainer["processes"] != saved.info.ranks:
            raise StateError(
                f"the run had {trainer['processes']} processes, and {saved.info.ranks} have saved "
                "it; all of them call save_checkpoint"
            )
        check_types(run, trainer["types"])
        if saved.rank_results:
            key = f"{trainer['data']['seed']}/{saved.info.step}"
            own = self._other_processes.state(own, saved.rank_results, key)
        if own["window"]["within"]:
            check_window(self._windows.length, trainer["window"])
        model = plain_model(run)
        entries = {plain_name(name): name for name in model.state_dict()}
        found = {**parts["model"], **trainer["model_extra"]}
        check_tensors(
            "the saved model is another one",
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
        model.load_state_dict({entries[name]: value for name, value in found.items()})
        if run.optimizer is not None:
            run.optimizer.load_state_dict(optimizer_state)  # type: ignore[arg-type]  # one has both
        if run.lr_scheduler is not None:
            run.lr_scheduler.load_state_dict(trainer["lr_scheduler"])
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(trainer["scaler"])
        self._of_rank.load(own, trainer["data"])

    def go_on_drawing(self) -> None:
        """From here on, draw what the saved run would have drawn; nothing if none was loaded."""
        self._of_rank.go_on_drawing()

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
                "types": types_of(run),
                "data": self._data.state_dict(),
            },
        }
        if run.optimizer is not None:
            parts["optimizer"] = named_optimizer_state(run.optimizer, trained_names(run))
        return parts


def ranks_of(run: PipelineRun) -> Ranks:
    """The processes that save and load together: a collective where there are several."""
    several = run.accelerator.num_processes > 1
    return Ranks.of_job(in_background=False) if several else Ranks.alone()


def _checked_trainer_state(parts: Mapping[str, Any]) -> Mapping[str, Any]:
    trainer = parts.get("trainer")
    if not isinstance(trainer, dict) or trainer.get("version") != STATE_VERSION:
        found_version = trainer.get("version") if isinstance(trainer, dict) else None
        raise StateError(
            f"expected a trainer state of version {STATE_VERSION}, found {found_version!r}; resume "
            "with the release that wrote it"
        )
    check_keys("the trainer's state", trainer, _KEYS)
    return trainer
