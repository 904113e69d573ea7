"""What each rank goes on from where another number of ranks has saved the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from robo_orchard_core.utils.hook import add_origin
from robo_orchard_lab.pipeline.checkpoint import keyed_random_state
from robo_orchard_lab.pipeline.distributed.collectives import parts_for_rank
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.trainer.rank_state import checked_rank_state


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
