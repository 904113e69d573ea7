"""Where a call was made, and for which hook."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from robo_orchard_core.utils.hook import HookContextChannel
from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    save_checkpoint,
    write_weights,
)
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsBoard

_HERE = os.path.dirname(__file__)
# Who calls through these wants to be shown the own line, not theirs.
_LIBRARIES = frozenset({"accelerate", "contextlib", "functools", "numpy", "torch", "torchmetrics"})
_COMMIT_FUNCTIONS = (
    Agreement.settle,
    MetricsBoard.settle,
    MetricsBoard.tell_rest,
    MetricsBoard.read_deferred,
    CheckpointStore.prepare,
    save_checkpoint,
    write_weights,
)
_AT_COMMIT = frozenset(function.__code__ for function in _COMMIT_FUNCTIONS)


@dataclass(frozen=True, slots=True)
class Place:
    """A line of source."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One call that was counted, and who made it."""

    what: str
    """The operation, such as ``item`` or ``all_reduce``."""
    places: tuple[Place, ...]
    """The lines that led to it, from the call outwards to the hook's own function; outside of
    hooks, the line of the call alone. Lines of torch, Accelerate and the like are left out."""
    hook: str | None
    """The name of the hook in whose function it was made, the innermost one; None outside."""
    at_commit: bool
    """Whether the trainer made it at a commit point: to agree with other ranks, to read the metrics
    of a logging point, or to save."""

    def __str__(self) -> str:
        by = f"hook {self.hook!r}" if self.hook else "the trainer" if self.at_commit else "no hook"
        return f"{self.what} by {by} at " + ", called from ".join(map(str, self.places))


def trace_call(what: str) -> TracedCall:
    """Describe the call that led here, by the stack outside of this package."""
    frames = [*_frames_outside()]
    for index, frame in enumerate(frames):
        owner = _owner_of(frame)
        if isinstance(owner, PipelineHooks):
            outermost = index + _outermost_of(owner, frames[index:])
            return TracedCall(what, _places(frames[: outermost + 1]), owner.name, at_commit=False)
        if isinstance(owner, HookContextChannel):
            found = _hook_function(frames[:index], owner)
            if found is not None:
                inner, label = found
                return TracedCall(what, _places(frames[: inner + 1]), label, at_commit=False)
        if frame.f_code in _AT_COMMIT:
            return TracedCall(what, _places(frames[: index + 1]), None, at_commit=True)
    return TracedCall(what, _places(frames)[:1], None, at_commit=False)


def _frames_outside() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if os.path.dirname(frame.f_code.co_filename) != _HERE:
            yield frame
        frame = frame.f_back


def _places(frames: Iterable[FrameType]) -> tuple[Place, ...]:
    return tuple(
        Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
        for frame in frames
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES
    )


def _owner_of(frame: FrameType) -> Any:
    """The object whose method a frame runs, or a function that was made in one."""
    return frame.f_locals.get("self")


def _outermost_of(hook: PipelineHooks, frames: Sequence[FrameType]) -> int:
    """The index of the method by which a hook was called."""
    outermost = 0
    for index, frame in enumerate(frames):
        owner = _owner_of(frame)
        if owner is hook:
            outermost = index
        elif isinstance(owner, HookContextChannel):
            break
    return outermost


def _hook_function(
    frames: Sequence[FrameType], channel: HookContextChannel[Any]
) -> tuple[int, str] | None:
    """Which of the frames is a hook of the channel, if any is, and the name of the hook.

    It is the function's own, or else that of the schedule that is asked about it.
    """
    asked: tuple[int, str] | None = None
    for index in range(len(frames) - 1, -1, -1):
        for entry in channel.entries():
            functions = [f for f in (entry.before, entry.after) if f is not None]
            if any(_code_of(function) is frames[index].f_code for function in functions):
                return index, entry.label
            if asked is None and _owner_of(frames[index]) is entry.context:
                asked = index, entry.label
    return asked


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    """The code of a function, method or partial, also behind a schedule."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None
