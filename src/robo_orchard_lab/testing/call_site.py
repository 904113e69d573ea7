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
from robo_orchard_lab.pipeline.checkpoint import write_checkpoint, write_weights
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsBoard

_HERE = os.path.dirname(__file__)
# Who calls through these wants to be shown the own line, not theirs.
_LIBRARIES = frozenset({"accelerate", "contextlib", "functools", "numpy", "torch", "torchmetrics"})
_COMMIT_FUNCTIONS = (
    MetricsBoard.settle,
    MetricsBoard.tell_rest,
    MetricsBoard.read_deferred,
    write_checkpoint,
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
    """Whether the trainer made it, to read the metrics of a logging point or to save."""

    def __str__(self) -> str:
        by = f"hook {self.hook!r}" if self.hook else "the trainer" if self.at_commit else "no hook"
        return f"{self.what} by {by} at " + ", called from ".join(map(str, self.places))


def trace_call(what: str) -> TracedCall:
    """Describe the call that led here, by the stack outside of this package."""
    frames = [*_frames_outside()]
    for index, frame in enumerate(frames):
        first = _first_argument(frame)
        if isinstance(first, PipelineHooks):
            outermost = index + _outermost_of(first, frames[index:])
            return TracedCall(what, _places(frames[: outermost + 1]), first.name, at_commit=False)
        if isinstance(first, HookContextChannel):
            for inner in range(index - 1, -1, -1):
                label = _label_of(frames[inner].f_code, first)
                if label is not None:
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


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _outermost_of(hook: PipelineHooks, frames: Sequence[FrameType]) -> int:
    """The index of the method by which a hook was called."""
    outermost = 0
    for index, frame in enumerate(frames):
        first = _first_argument(frame)
        if first is hook:
            outermost = index
        elif isinstance(first, HookContextChannel):
            break
    return outermost


def _label_of(code: CodeType, channel: HookContextChannel[Any]) -> str | None:
    """The name of the hook of a channel whose before or after has this code."""
    for entry in channel.entries():
        if any(f is not None and _code_of(f) is code for f in (entry.before, entry.after)):
            return entry.label
    return None


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    """The code of a function, method or partial, also behind a schedule."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None
