"""Requests of hooks to the trainer, decided at the next commit point."""

from __future__ import annotations

import inspect
import os
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
    """Request with its reason and its source."""

    reason: str
    by: str


@dataclass(frozen=True, slots=True)
class StopRequest(Request):
    """Request to end the run."""

    exit_code: int | None = None
    """Exit code of the process if the run is interrupted and will be started again; else None."""


@dataclass(frozen=True, slots=True)
class RollbackRequest(Request):
    """Request to continue from the newest healthy checkpoint."""


@dataclass(frozen=True, slots=True)
class LogRequest(Request):
    """Request for a logging point: read, reduce and log the published metrics."""


@dataclass(frozen=True, slots=True)
class EvaluateRequest(Request):
    """Request for an evaluation."""

    name: str | None = None
    """Name of the hook that evaluates; None for all."""


@dataclass(frozen=True, slots=True)
class SaveRequest(Request):
    """Request for a checkpoint."""

    name: str | None = None
    """Name of the hook that saves; None for all."""


@dataclass(frozen=True, slots=True)
class SaveWeightsRequest(Request):
    """Request for a file of weights."""

    path: Path
    """Safetensors file; an existing one is replaced."""
    weights: str | None = None
    """Name of the hook that keeps the weights, such as an EMA; None for the model's weights."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the file, in addition to the counters of the run."""


@dataclass(frozen=True, slots=True)
class WriteRequest(Request):
    """Request to call a function that writes."""

    write: Callable[[], object]
    """Called on every rank."""


class Requests:
    """Pending requests of hooks, ``args.requests``; executed at the commit point.

    Every request has a ``reason``, for the log, and a source ``by``: by default the calling
    function with its file and line.

    Ranks: make a request on every rank; this costs nothing. A hook that decides on one rank passes
    ``rank_local=True``, and calls :meth:`allow_rank_local` on every rank when the run starts. The
    ranks then exchange such requests now and then, see :class:`Agreement`, and all make them at the
    same commit point. In one process ``rank_local`` has no effect.

    A request to stop, save or evaluate that only some ranks make, without ``rank_local``, is an
    error. It is detected within seconds and ends the job with the reason and the source; other
    mismatches end with the timeouts of the job, or ``stall_timeout_s``.

    Args:
        agreement: exchange between the ranks of the run.
    """

    __slots__ = (
        "_agreement",
        "_is_rank_local_allowed",
        "_listeners",
        "_rank_local",
        "_waiting",
        "joint_commits",
        "pending",
        "rollback_request",
        "stop_request",
    )

    def __init__(self, agreement: Agreement | None = None) -> None:
        self.pending = False
        """True if a request waits for the commit point; read after every step."""
        self.stop_request: StopRequest | None = None
        """First request to stop, or None."""
        self.rollback_request: RollbackRequest | None = None
        """First request to roll back, or None."""
        self._waiting: list[Request] = []
        self._listeners: list[Callable[[Request], Any]] = []
        self._agreement = Agreement() if agreement is None else agreement
        self._is_rank_local_allowed = False
        self.joint_commits = (0, 0, "")
        """Number of commit points with joint work of the ranks (evaluate, save, stop), the step of
        the last one, and its requests; to compare ranks."""
        self._rank_local: list[Request] = []  # made on this rank, unknown to the others yet

    def allow_rank_local(self) -> None:
        """Allow requests with ``rank_local=True``; call on every rank, in ``on_loop.before``.

        >>> from robo_orchard_lab.pipeline import PipelineHooks
        >>> hooks = PipelineHooks("disk watch")
        >>> @hooks.on_loop.before
        ... def allow(args):
        ...     args.requests.allow_rank_local()
        >>> @hooks.on_step.after(when="100 steps")
        ... def check(args):
        ...     if is_full("/scratch"):
        ...         args.requests.stop("the disk of this machine is full", rank_local=True)
        """
        if not self._is_rank_local_allowed:
            self._is_rank_local_allowed = True
            if self._agreement.several:
                self._agreement.topic(
                    "rank-local requests",
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
        """Request the end of the run; only the first request is logged.

        With an ``exit_code`` the run counts as interrupted: after closing everything the trainer
        raises :class:`RunPreempted`, and the process should exit with the code and be restarted.

        Raises:
            PipelineStateError: ``rank_local`` without :meth:`allow_rank_local`.
        """
        self._add(StopRequest(reason, by or _caller(), exit_code), rank_local)

    def rollback(self, reason: str, by: str | None = None) -> None:
        """Request to continue from the newest healthy checkpoint; needs a ``SaveCheckpoint``.

        Make the request on every rank. At the next commit point the trainer executes no other
        request, leaves ``on_loop``, loads the checkpoint as a resumed run does, and enters
        ``on_loop`` again.
        """
        self._make(RollbackRequest(reason, by or _caller()))

    def evaluate(
        self,
        reason: str,
        by: str | None = None,
        *,
        name: str | None = None,
        rank_local: bool = False,
    ) -> None:
        """Request an evaluation by the hook ``name``, or by all; identical requests are merged."""
        self._add(EvaluateRequest(reason, by or _caller(), name), rank_local)

    def save(
        self,
        reason: str,
        by: str | None = None,
        *,
        name: str | None = None,
        rank_local: bool = False,
    ) -> None:
        """Request a checkpoint by the hook ``name``, or by all; saved after all other requests."""
        self._add(SaveRequest(reason, by or _caller(), name), rank_local)

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
        """Request a file of weights, written after evaluations.

        Args:
            path: safetensors file; an existing one is replaced atomically.
            reason: reason, for the log.
            by: source of the request.
            weights: name of the hook that keeps the weights (an EMA); None for the model's weights.
            metadata: metadata of the file.
            rank_local: True if only this rank makes the request.
        """
        by = by or _caller()
        request = SaveWeightsRequest(reason, by, Path(path), weights, dict(metadata or {}))
        self._add(request, rank_local)

    def write(self, write: Callable[[], object], reason: str, by: str | None = None) -> None:
        """Request a call of ``write`` on every rank, after evaluations and before a checkpoint.

        An error of ``write`` ends the run.
        """
        self._make(WriteRequest(reason, by or _caller(), write))

    def log(self, reason: str, by: str | None = None, *, rank_local: bool = False) -> None:
        """Request a logging point."""
        self._add(LogRequest(reason, by or _caller()), rank_local)

    def listen(self, callback: Callable[[Request], Any]) -> RemovableHandle:
        """Call a function with every request, immediately."""
        self._listeners.append(callback)
        return RemovableHandle(lambda: self._listeners.remove(callback))

    def pop(self, kind: type[RequestT]) -> list[RequestT]:
        """Remove and return the waiting requests of a kind, in order."""
        popped: list[RequestT] = []
        if self._waiting:
            popped = [request for request in self._waiting if isinstance(request, kind)]
            self._waiting = [request for request in self._waiting if not isinstance(request, kind)]
        self.pending = bool(self._waiting or self.stop_request or self.rollback_request)
        return popped

    def pop_rollback(self) -> RollbackRequest | None:
        """Remove and return the request to roll back, and drop other requests.

        A request to interrupt the run, such as on a signal, stays.
        """
        request, self.rollback_request = self.rollback_request, None
        if self.stop_request is not None and self.stop_request.exit_code is None:
            self.stop_request = None
        self.pop(Request)
        return request

    def pop_rank_local(self) -> list[Request]:
        """Remove and return this rank's requests not exchanged with other ranks yet."""
        popped, self._rank_local = self._rank_local, []
        return popped

    def require_commit(self) -> None:
        """Make the trainer execute the next commit point, also without a request."""
        self.pending = True

    def begin_commit(self, step: int, due: str = "") -> None:
        """Record a commit point after ``step`` steps in :attr:`joint_commits`.

        ``due`` metrics are part of the logging point where one is requested.
        """
        joint = [r for r in self._waiting if isinstance(r, EvaluateRequest | SaveRequest)]
        stop = [] if self.stop_request is None else [self.stop_request]
        if any(isinstance(request, LogRequest) for request in self._waiting):
            due = ""  # ranks may have different metrics at a logging point
        if joint or stop or due:
            named = (
                f"{type(r).__name__}: {r.reason}, requested by {r.by}" for r in [*joint, *stop]
            )
            requested = "; ".join([*named, due] if due else named)
            self.joint_commits = (self.joint_commits[0] + 1, step, requested)

    def _add(self, request: Request, rank_local: bool) -> None:
        if rank_local and not self._is_rank_local_allowed:
            raise PipelineStateError(
                f"{request.by} makes a request with rank_local=True, which no hook has allowed; "
                "call args.requests.allow_rank_local() on every rank, in a before of on_loop"
            )
        if not rank_local or not self._agreement.several:
            self._make(request)
        elif request not in self._rank_local:  # a hook may repeat it until it is granted
            self._rank_local.append(request)

    def _grant_rank_local(self, count: int) -> None:
        """Make the rank-local requests of all ranks on this rank: a collective."""
        for rank, requests in enumerate(gather_objects(self.pop_rank_local())):
            for request in requests:
                by = f"{request.by} on rank {rank}"
                # Other requests are logged when they are executed.
                if isinstance(request, EvaluateRequest | LogRequest):
                    what = "an evaluation" if isinstance(request, EvaluateRequest) else "a log"
                    logger.info("%s requested %s: %s", by, what, request.reason)
                self._make(replace(request, by=by))

    def _make(self, request: Request) -> None:
        if isinstance(request, StopRequest):
            self.stop_request = self.stop_request or request
        elif isinstance(request, RollbackRequest):
            self.rollback_request = self.rollback_request or request
        else:
            self._waiting.append(request)
        self.pending = True
        for listener in self._listeners:
            listener(request)


def _caller() -> str:
    """Return the caller of the calling method, with file and line."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    if frame is None:  # an interpreter without access to its stack
        return "unknown"
    file = os.path.basename(frame.f_code.co_filename)
    return f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})"
