"""What each rank of a run has for itself at a commit point, to save it and to go on from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from robo_orchard_lab.pipeline.checkpoint import (
    capture_random_state,
    check_random_state,
    restore_random_state,
)
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import ddp_of, plain_model, plain_name, plain_state
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows
from robo_orchard_lab.pipeline.trainer.fitting import check_keys, check_tensors, kind_of
from robo_orchard_lab.pipeline.trainer.open_gradients import (
    check_open_gradients,
    own_gradients,
    reduced_gradients,
    set_open_gradients,
)
from robo_orchard_lab.pipeline.trainer.trained_names import names_beside

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
