"""What hooks ask of the trainer, which decides at the next commit point."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.errors import PipelineStateError
from robo_orchard_lab.pipeline.job_log import job_logger

logger = job_logger(__name__)

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

    In a job of several processes, a request is made alike on every rank, which costs nothing; or
    by one rank, whatever the others do, with ``rank_local=True``. A hook then has called
    :meth:`allow_rank_local` on every rank when the run began: the ranks then exchange now and then
    whether one has asked, see :class:`Agreement`, and all of them are asked alike at one commit
    point. In one process, ``rank_local`` makes no difference.

    A request that some ranks make, and not ``rank_local``, is a mistake. The others go on
    training meanwhile, so that the ranks wait for one another in different places. Where it is to
    stop, save or evaluate, that is found within seconds, and ends the job with who has asked for
    what; else the job's timeouts do, or ``stall_timeout_s``.

    Who asks is, by default, the calling function with its file and line.

    Args:
        agreement: of the run.
    """

    __slots__ = (
        "_agreement",
        "_declared",
        "_joint_commits",
        "_listeners",
        "_rank_local",
        "_waiting",
        "pending",
        "stop_request",
    )

    def __init__(self, agreement: Agreement | None = None) -> None:
        self.pending = False
        """Whether anything waits for the commit point; looked at after every step."""
        self.stop_request: StopRequest | None = None
        """The first request to stop, or None."""
        self._waiting: list[Request] = []
        self._listeners: list[Callable[[Request], Any]] = []
        self._agreement = Agreement() if agreement is None else agreement
        self._declared = False
        self._joint_commits = (0, 0, "")
        self._rank_local: list[Request] = []  # made by this rank, and not known to the others yet

    def allow_rank_local(self) -> None:
        """Allow requests that one rank makes alone; a second call changes nothing.

        Called on every rank alike, in a ``before`` of ``on_loop``:

        >>> from robo_orchard_lab.pipeline import PipelineHooks
        >>> hooks = PipelineHooks("disk watch")
        >>> @hooks.on_loop.before
        ... def declare(args):
        ...     args.requests.allow_rank_local()
        >>> @hooks.on_step.after(when="100 steps")
        ... def look(args):
        ...     if is_full("/scratch"):
        ...         args.requests.stop("the disk of this machine is full", rank_local=True)
        """
        if not self._declared:
            self._declared = True
            if self._agreement.several:
                self._agreement.topic(
                    "requests that one rank makes alone",
                    find=lambda: len(self._rank_local),
                    tell=self._grant_rank_local,
                )

    def stop(
        self,
        reason: str,
        by: str | None = None,
        *,
        exit_code: int | None = None,
        rank_local: bool = False,
    ) -> None:
        """Ask for the run to end at the next commit point; the first request is the one told.

        Args:
            reason: why, for the log.
            by: who asks.
            exit_code: where the run is interrupted and will be started again: what the process
                ends with. The trainer then raises :class:`RunPreempted` when all is closed.
            rank_local: whether this rank asks by itself, and not all of them alike; see the class.

        Raises:
            PipelineStateError: ``rank_local``, and no hook has declared it.
        """
        self._ask(StopRequest(reason, by or _caller(), exit_code), rank_local)

    def evaluate(
        self,
        reason: str,
        by: str | None = None,
        *,
        name: str | None = None,
        rank_local: bool = False,
    ) -> None:
        """Ask for an evaluation at the next commit point; several requests make one.

        Args:
            reason: why, for the log.
            by: who asks.
            name: of the hook that evaluates; None for every one that is registered.
            rank_local: as for :meth:`stop`.
        """
        self._ask(EvaluateRequest(reason, by or _caller(), name), rank_local)

    def save(
        self,
        reason: str,
        by: str | None = None,
        *,
        name: str | None = None,
        rank_local: bool = False,
    ) -> None:
        """Ask for a checkpoint at the next commit point, after all else; several make one.

        Args:
            reason: why, for the log.
            by: who asks.
            name: of the hook that is to write it; None for every one that does.
            rank_local: as for :meth:`stop`.
        """
        self._ask(SaveRequest(reason, by or _caller(), name), rank_local)

    def save_weights(
        self,
        path: str | os.PathLike[str],
        reason: str,
        by: str | None = None,
        *,
        weights: str | None = None,
        metadata: Mapping[str, str] | None = None,
        rank_local: bool = False,
    ) -> None:
        """Ask for weights to be written at the next commit point, after what was asked to evaluate.

        Args:
            path: the safetensors file; one that is there is replaced as a whole, or not at all.
            reason: why, for the log.
            by: who asks.
            weights: the name of the hook whose weights to write (an EMA's); None for the model's.
            metadata: what the file is to say about itself.
            rank_local: as for :meth:`stop`.
        """
        by = by or _caller()
        self._ask(
            SaveWeightsRequest(reason, by, Path(path), weights, dict(metadata or {})), rank_local
        )

    def write(self, write: Callable[[], object], reason: str, by: str | None = None) -> None:
        """Ask for something of your own to be written with the weights, ahead of a checkpoint.

        Args:
            write: called on every rank at the next commit point, when evaluations and the log
                are done; what it raises ends the run.
            reason: why, for the log.
            by: who asks.
        """
        self._make(WriteRequest(reason, by or _caller(), write))

    def log(self, reason: str, by: str | None = None, *, rank_local: bool = False) -> None:
        """Ask for a logging point: what was published is read, reduced and told.

        Args:
            reason: why, for the log.
            by: who asks.
            rank_local: as for :meth:`stop`.
        """
        self._ask(LogRequest(reason, by or _caller()), rank_local)

    def listen(self, callback: Callable[[Request], Any]) -> RemovableHandle:
        """Have every request told when it is made."""
        self._listeners.append(callback)
        return RemovableHandle(lambda: self._listeners.remove(callback))

    def pop(self, kind: type[RequestT]) -> list[RequestT]:
        """The requests of one kind, in the order in which they were made; they wait no longer."""
        taken = [request for request in self._waiting if isinstance(request, kind)]
        self._waiting = [request for request in self._waiting if not isinstance(request, kind)]
        self.pending = bool(self._waiting) or self.stop_request is not None
        return taken

    def pop_rank_local(self) -> list[Request]:
        """What this rank has asked for alone, and the others have not been told; nor will they."""
        taken, self._rank_local = self._rank_local, []
        return taken

    @property
    def joint_commits(self) -> tuple[int, int, str]:
        """At how many commit points all ranks had something to do together: to evaluate, to save or
        to stop; after how many steps the last time, and what."""
        return self._joint_commits

    def begin_commit(self, step: int) -> None:
        """What waits is now carried out, after so many steps."""
        common = [r for r in self._waiting if isinstance(r, EvaluateRequest | SaveRequest)]
        stop = [] if self.stop_request is None else [self.stop_request]
        if common or stop:
            asked = "; ".join(
                f"{type(r).__name__}: {r.reason}, asked by {r.by}" for r in [*common, *stop]
            )
            self._joint_commits = (self._joint_commits[0] + 1, step, asked)

    def _ask(self, request: Request, rank_local: bool) -> None:
        if rank_local and not self._declared:
            raise PipelineStateError(
                f"{request.by} makes a request with rank_local=True, for which ranks have to be "
                "ready: call args.requests.allow_rank_local() on every rank, in a before of on_loop"
            )
        if not rank_local or not self._agreement.several:
            self._make(request)
        elif request not in self._rank_local:  # asked for in each step until it is granted
            self._rank_local.append(request)

    def _grant_rank_local(self, asked: int) -> None:
        """Make the requests of all ranks on this one, as each of them does: a collective."""
        for rank, requests in enumerate(gather_objects(self.pop_rank_local())):
            for request in requests:
                by = f"{request.by} on rank {rank}"
                # Others are told when they are done.
                if isinstance(request, EvaluateRequest | LogRequest):
                    what = "an evaluation" if isinstance(request, EvaluateRequest) else "a log"
                    logger.info("%s asked for %s: %s", by, what, request.reason)
                self._make(replace(request, by=by))

    def _make(self, request: Request) -> None:
        if not isinstance(request, StopRequest):
            self._waiting.append(request)
        elif self.stop_request is None:
            self.stop_request = request
        self.pending = True
        for listener in self._listeners:
            listener(request)


def _caller() -> str:
    """The function that called the function that calls this one, with file and line."""
    frame = sys._getframe(2)
    file = os.path.basename(frame.f_code.co_filename)
    return f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})"
