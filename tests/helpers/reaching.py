"""The sample environment with faults, in a module without torch, which each worker imports."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box

from robo_orchard_lab.policy.samples import Reach


class FaultyReach(Reach):
    """Sample environment with a fault.

    Args:
        limit: number of steps after which the environment truncates an episode.
        fault: fault of an episode, see ``_fail``.
        fault_seed: seed of the episode with the fault; None for all.
        fault_step: step of the fault.
        render: make ``render`` return images.
        images: observations with a camera image.
        child: start a process, as some simulators do, which is in the trace as well.
        drifts: start each episode farther away; reset is not repeatable.
        trace: file that gets the id of the process in a line.
    """

    def __init__(
        self,
        limit: int = 50,
        fault: str | None = None,
        fault_seed: int | None = None,
        fault_step: int = 2,
        render: bool = False,
        images: bool = False,
        child: bool = False,
        drifts: bool = False,
        trace: str | None = None,
    ) -> None:
        super().__init__(limit, render_mode="rgb_array" if render else None)
        self.fault, self.images = fault, images
        self.fault_seed, self.fault_step = fault_seed, fault_step
        self.drift = 0.5 if drifts else 0.0
        self.seed: int | None = None
        self.resets = 0
        started = [os.getpid()]
        if child:
            self.child = subprocess.Popen(["sleep", "3600"])
            started.append(self.child.pid)
        if trace is not None:
            with open(trace, "a") as file:
                file.write("".join(f"{pid}\n" for pid in started))
        if fault == "hang at start":
            time.sleep(3600)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seed = seed
        self.resets += 1
        self.position = self.position + self.drift * self.resets
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        if self.steps == self.fault_step and self.fault_seed in (None, self.seed):
            self._fail()
        found = super().step(action)
        return (*found[:4], {}) if self.fault == "silent" else found

    def render(self) -> Any:
        if self.fault == "no_gl":
            raise RuntimeError("cannot create a GL context")
        return super().render()

    def _fail(self) -> None:
        if self.fault == "raise":
            raise ValueError("the gripper is stuck")
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "hang without release":
            ctypes.PyDLL("libc.so.6").sleep(3600)  # holds the lock of the interpreter
        if self.fault == "die":
            os._exit(7)
        if self.fault == "nan":
            self.position = self.position * np.nan

    def _observation(self) -> Any:
        state = super()._observation()
        if not self.images:
            return state
        return {"observation.state": state, "observation.images.top": super().render()}


def make_reach(**arguments: Any) -> FaultyReach:
    return FaultyReach(**arguments)


def make_three() -> FaultyReach:
    """Return an environment with another action space than the policy's."""
    environment = FaultyReach()
    environment.action_space = Box(-1.0, 1.0, (3,), np.float32)
    return environment


def make_without_package() -> FaultyReach:
    raise ModuleNotFoundError("No module named 'metaworld'", name="metaworld")


def reach(**arguments: Any) -> Any:
    """Return a picklable factory of `FaultyReach`."""
    return partial(make_reach, **arguments)


def processes_in(trace: Path) -> list[int]:
    """Return the ids of the workers that wrote to a trace file."""
    return [*map(int, trace.read_text().split())] if trace.exists() else []
