"""Worker process of one environment; it imports neither torch nor the main module of the job.

`serve` answers requests on a connection until the connection or the parent process ends:

    ("reset", seed)                 -> ("reset", observation)
    ("step", actions, frames_at)    -> ("step", Steps)
    ("render", )                    -> ("render", frame)

An error of the environment is the reply ("error", number of steps, text).
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

SUCCESS_KEYS = ("success", "is_success")
"""Keys of ``info`` that report the success of an episode."""

_PARENT_CHECK_S = 0.5


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """Properties of an environment that the policy and the recorder must know."""

    action_shape: tuple[int, ...]
    low: Any
    """Least action, an array of the shape of actions; clipped before each step."""
    high: Any
    frames_per_second: float
    """Environment steps in a second of simulated time, for videos."""
    render_problem: str | None
    """Reason why the environment can't render, or None."""


@dataclass(slots=True)
class Steps:
    """Result of some environment steps; the last observation is of the last step."""

    observation: Any = None
    count: int = 0
    reward: float = 0.0
    is_success: bool = False
    is_done: bool = False
    """True after a success, or at the environment's end of the episode."""
    reports_success: bool = False
    """True if an ``info`` had a key of `SUCCESS_KEYS`."""
    frames: list[Any] = field(default_factory=list)


def main(descriptor: int, parent: int) -> None:
    """Serve a connection of the parent process, which sends the arguments of `serve`."""
    os.dup2(2, 1)  # standard output belongs to the parent's results
    with Connection(descriptor) as connection:
        serve(connection, parent)


def serve(connection: Connection, parent: int) -> None:
    """Create the environment and answer requests until the connection ends.

    The first message has the time limit of a step in seconds, and the environment's function.
    A step that exceeds the time limit by itself, or the end of the parent process, ends the
    process, also while the simulator blocks.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _ignore)  # sent to all processes of a job; the parent decides
    # SIGALRM prints the stack and ends the process, also if the simulator never returns to Python.
    faulthandler.register(signal.SIGALRM, file=2, all_threads=False, chain=True)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores share the machine
    if not os.environ.get("DISPLAY") and "MUJOCO_GL" not in os.environ and _has_egl():
        os.environ["MUJOCO_GL"] = "egl"  # renders without a display
    environment: Any = None
    step_timeout_s = 0.0
    try:
        try:
            step_timeout_s, factory = connection.recv()  # imports the function's module
            environment = factory()
            reply: tuple[Any, ...] = ("ready", _spec(environment))
        except Exception as error:
            reply = ("error", 0, _text(error))
        connection.send(reply)
        while (message := connection.recv()) != ("close",):
            connection.send(_answer(environment, *message, step_timeout_s=step_timeout_s))
        is_orphan = False
    except (EOFError, BrokenPipeError, ConnectionResetError):
        is_orphan = True
    try:
        if environment is not None:
            signal.setitimer(signal.ITIMER_REAL, step_timeout_s)
            environment.close()
    finally:
        if is_orphan:  # else the parent ends the child processes of the environment
            os.killpg(0, signal.SIGKILL)


def _answer(
    environment: Any, request: str, *arguments: Any, step_timeout_s: float
) -> tuple[Any, ...]:
    steps = Steps()
    try:
        signal.setitimer(signal.ITIMER_REAL, step_timeout_s)
        if request == "reset":
            return "reset", environment.reset(seed=arguments[0])[0]
        if request == "render":
            return "render", environment.render()
        actions, frames_at = arguments
        for index, action in enumerate(actions):
            signal.setitimer(signal.ITIMER_REAL, step_timeout_s)
            _step(environment, action, steps)
            if frames_at is not None and (steps.is_done or index in frames_at):
                steps.frames.append(environment.render())
            if steps.is_done:
                break
        return "step", steps
    except Exception as error:
        return "error", steps.count, _text(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _step(environment: Any, action: Any, steps: Steps) -> None:
    observation, reward, terminated, truncated, info = environment.step(action)
    found = [bool(info[key]) for key in SUCCESS_KEYS if key in info]
    steps.observation = observation
    steps.count += 1
    steps.reward += float(reward)
    steps.reports_success |= bool(found)
    steps.is_success |= any(found)
    steps.is_done = bool(steps.is_success or terminated or truncated)


def _spec(environment: Any) -> EnvironmentSpec:
    space = environment.action_space
    if not hasattr(space, "low"):
        raise TypeError(
            f"expected an action space of the type Box, found {space}; wrap the environment"
        )
    metadata = getattr(environment, "metadata", None)
    fps = metadata.get("render_fps") if isinstance(metadata, Mapping) else None
    mode = getattr(environment, "render_mode", None)
    problem = None
    if mode != "rgb_array":
        problem = (
            f"expected the render_mode 'rgb_array', found {mode!r}; pass it to the environment's "
            "function"
        )
    return EnvironmentSpec(tuple(space.shape), space.low, space.high, float(fps or 30), problem)


def _has_egl() -> bool:
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    return True


def _text(error: Exception) -> str:
    """Return the message of an error in the first line, then its traceback."""
    message = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return f"{message[-1]}\n{''.join(traceback.format_exception(error))}"


def _ignore(number: int, frame: Any) -> None:
    """Do nothing; a function, since ignored signals stay ignored in child processes."""


def _end_with(parent: int) -> None:
    """End this process and its children when the parent process has ended."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os.killpg(0, signal.SIGKILL)
