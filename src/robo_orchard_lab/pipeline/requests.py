"""What hooks ask of the trainer, which decides at the next commit point."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from robo_orchard_core.utils.hook import RemovableHandle

RequestT = TypeVar("RequestT", bound="Request")


@dataclass(frozen=True, slots=True)
class Request:
    """One thing asked for, with who asked and why."""

    reason: str
    by: str


@dataclass(frozen=True, slots=True)
class StopRequest(Request):
    """The run's end."""

    exit_code: int | None = None
    """With one the run is interrupted, not over: the process is to end with this code, and the run
    to be started again."""


@dataclass(frozen=True, slots=True)
class LogRequest(Request):
    """A logging point: what was published is read, reduced and told."""


@dataclass(frozen=True, slots=True)
class EvaluateRequest(Request):
    """An evaluation to run."""

    name: str | None = None
    """Of the hook that evaluates; None for every one."""


@dataclass(frozen=True, slots=True)
class SaveRequest(Request):
    """A checkpoint to write."""

    name: str | None = None
    """Of the hook that writes it; None for every one."""


@dataclass(frozen=True, slots=True)
class SaveWeightsRequest(Request):
    """Weights to write."""

    path: Path
    """The safetensors file, replaced when it is there."""
    weights: str | None = None
    """The name of the hook that keeps them, such as an EMA; None for the model's own."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the file says about itself, beside the counters of the run."""


@dataclass(frozen=True, slots=True)
class WriteRequest(Request):
    """Something to write that a hook knows how to."""

    write: Callable[[], object]
    """Called on every rank."""


class Requests:
    """Where hooks ask; nothing happens before the commit point.

    In a job of several processes a request is made alike on every rank: the trainer does not
    compare them across ranks. Who asks is, by default, the calling function with its file and line.
    """

    __slots__ = ("_listeners", "_waiting", "pending", "stop_request")

    def __init__(self) -> None:
        self.pending = False
        """Whether anything waits for the commit point; looked at after every step."""
        self.stop_request: StopRequest | None = None
        """The first request to stop, or None."""
        self._waiting: list[Request] = []
        self._listeners: list[Callable[[Request], Any]] = []

    def stop(self, reason: str, by: str | None = None, *, exit_code: int | None = None) -> None:
        """Ask for the run to end at the next commit point; the first request is the one told.

        Args:
            reason: why, for the log.
            by: who asks.
            exit_code: where the run is interrupted and will be started again: what the process
                ends with. The trainer then raises :class:`RunPreempted` when all is closed.
        """
        request = StopRequest(reason, by or _caller(), exit_code)
        if self.stop_request is None:
            self.stop_request = request
        self._tell(request)

    def evaluate(self, reason: str, by: str | None = None, *, name: str | None = None) -> None:
        """Ask for an evaluation at the next commit point; several requests make one.

        Args:
            reason: why, for the log.
            by: who asks.
            name: of the hook that evaluates; None for every one that is registered.
        """
        self._add(EvaluateRequest(reason, by or _caller(), name))

    def save(self, reason: str, by: str | None = None, *, name: str | None = None) -> None:
        """Ask for a checkpoint at the next commit point, after all else; several make one.

        Args:
            reason: why, for the log.
            by: who asks.
            name: of the hook that is to write it; None for every one that does.
        """
        self._add(SaveRequest(reason, by or _caller(), name))

    def save_weights(
        self,
        path: str | os.PathLike[str],
        reason: str,
        by: str | None = None,
        *,
        weights: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Ask for weights to be written at the next commit point, after what was asked to evaluate.

        Args:
            path: the safetensors file; one that is there is replaced as a whole, or not at all.
            reason: why, for the log.
            by: who asks.
            weights: the name of the hook whose weights to write (an EMA's); None for the model's.
            metadata: what the file is to say about itself.
        """
        by = by or _caller()
        self._add(SaveWeightsRequest(reason, by, Path(path), weights, dict(metadata or {})))

    def write(self, write: Callable[[], object], reason: str, by: str | None = None) -> None:
        """Ask for something of your own to be written with the weights, ahead of a checkpoint.

        Args:
            write: called on every rank at the next commit point, when evaluations and the log
                are done; what it raises ends the run.
            reason: why, for the log.
            by: who asks.
        """
        self._add(WriteRequest(reason, by or _caller(), write))

    def log(self, reason: str, by: str | None = None) -> None:
        """Ask for a logging point: what was published is read, reduced and told."""
        self._add(LogRequest(reason, by or _caller()))

    def listen(self, callback: Callable[[Request], Any]) -> RemovableHandle:
        """Have every request told when it is made."""
        self._listeners.append(callback)
        return RemovableHandle(lambda: self._listeners.remove(callback))

    def take(self, kind: type[RequestT]) -> list[RequestT]:
        """The requests of one kind, in the order in which they were made; they wait no longer."""
        taken = [request for request in self._waiting if isinstance(request, kind)]
        self._waiting = [request for request in self._waiting if not isinstance(request, kind)]
        self.pending = bool(self._waiting) or self.stop_request is not None
        return taken

    def _add(self, request: Request) -> None:
        self._waiting.append(request)
        self._tell(request)

    def _tell(self, request: Request) -> None:
        self.pending = True
        for listener in self._listeners:
            listener(request)


def _caller() -> str:
    """The function that called the function that calls this one, with file and line."""
    frame = sys._getframe(2)
    file = os.path.basename(frame.f_code.co_filename)
    return f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})"
