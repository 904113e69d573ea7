"""run_state.json: outcome, counters and last checkpoint of a run, replaced atomically.

:class:`StageFile` writes stage.json, the current stage of a run in progress, for ``watch``.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.distributed.failures import (
    failure_of,
    killed_failure,
    plain_text,
)
from robo_orchard_lab.pipeline.distributed.shutdown import before_forced_exit
from robo_orchard_lab.pipeline.errors import RankFailure, RunPreempted, StateError
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.run.durable import (
    RetriedWrite,
    make_folder,
    remove_leftovers,
    replace_file,
    set_aside,
)
from robo_orchard_lab.pipeline.run.event_log import EventLog

logger = logging.getLogger(__name__)

RUN_STATE_FILE = "run_state.json"
_MAX_BYTES = 1 << 20
RunOutcome: TypeAlias = Literal["running", "completed", "preempted", "failed"]

_CLOCKS_APART_S = 60.0  # tolerance between the clocks of two machines


class _Record(BaseModel):
    # Built on first use, to keep the import fast.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class RunError(_Record):
    """Error that ended a run."""

    type: str
    """Class of the error; ``Killed`` for a process that died."""
    message: str
    rank: int
    """Rank that failed first, as far as known."""
    hook: str | None = None
    """Hook that raised the error, with channel, function and source line; None outside hooks."""
    location: str | None = None
    """File and line of the error."""

    @classmethod
    def of(cls, failure: RankFailure) -> RunError:
        """Convert the failure of a rank."""
        return cls(**asdict(failure))


class SavedCheckpoint(_Record):
    """Complete checkpoint on disk."""

    path: str
    """Path, relative to the run folder if inside it."""
    step: int
    """Steps done."""
    non_finite: list[str] | None = None
    """First names of non-finite states, see :attr:`CheckpointInfo.non_finite`."""


class Rollback(_Record):
    """Return of the run to an earlier checkpoint."""

    from_step: int
    """Steps done before."""
    to_step: int
    """Steps of the checkpoint."""
    reason: str


class RunState(_Record):
    """Content of run_state.json."""

    version: Literal[1] = 1
    state: RunOutcome
    """``preempted``: to be started again; ``completed``: also a run that a hook stopped early."""
    progress: dict[str, int]
    """Counters at :attr:`updated_at`."""
    processes: int
    """World size."""
    process: ProcessIdentity
    """Process of the first rank."""
    started_at: datetime
    """Start of the run or of its resume by this process."""
    updated_at: datetime
    checkpoint: SavedCheckpoint | None = None
    """Last checkpoint of the run folder."""
    rollbacks: list[Rollback] = []
    """Rollbacks of the run, also by processes before; the last 20."""
    reason: str | None = None
    """Reason of the stop."""
    by: str | None = None
    """Hook that requested the stop."""
    exit_code: int | None = None
    """Exit code; None while the run is in progress, and after an error."""
    error: RunError | None = None
    """Error that ended the run; for a preempted run, the error of its last save."""


def read_run_state(folder: str | os.PathLike[str]) -> RunState:
    """Read the state of the run in a folder.

    A run in state ``running`` whose process has died on this machine is returned as ``failed`` with
    the error ``Killed``. For a process of another machine this is unknown.

    Raises:
        FileNotFoundError: no run was started in the folder.
        StateError: the file is damaged, or has a different version.
    """
    path = Path(folder) / RUN_STATE_FILE
    try:
        state = _read(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no run has been started in {folder}: no {path}") from None
    if state.state != "running" or not state.process.is_gone():
        return state
    of_others = f"ended by the launcher after another of {state.processes} ranks"
    failure = killed_failure(0, state.process, of_others if state.processes > 1 else "")
    return state.model_copy(update={"state": "failed", "error": RunError.of(failure)})


class RunStateFile:
    """Writer of ``run_state.json`` in a run folder.

    The file is replaced atomically and flushed at the start of a run, after each checkpoint, and at
    the end of the run or of a failed resume. The first rank writes the file; other ranks write
    after their own failure only. An error of writing, or a file of another running process, is
    logged and does not end the run. Without a ``folder``, nothing is written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        progress: TrainerProgress | None = None,
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._progress = progress or TrainerProgress()
        self._rank = rank
        self._processes = processes
        self._state: RunState | None = None  # last state written by this process
        self._lock = threading.Lock()  # checkpoints may be committed in another thread
        self._writes = RetriedWrite("the trainer")
        self.events = EventLog(self._progress)
        """Events of the run; the first rank records them while the run is in progress."""
        self.stage = StageFile(self._progress)
        """Current stage of the run; the first rank records it while the run is in progress."""
        self.at_end: dict[str, Callable[[], object]] = {}
        """Functions to call once when the outcome is written, by hook name; also after a failure,
        and before a forced exit."""
        self._recording = ExitStack()

    @contextmanager
    def around_run(self, requests: Requests) -> Iterator[None]:
        """Record the start and the outcome of the run in the body."""
        if self._folder is None:
            yield
            return
        if self._rank == 0:
            self._begin()

        def record(failure: RankFailure, exit_code: int | None = 1) -> None:
            self._failed(requests, exit_code=exit_code, error=RunError.of(failure))

        try:
            with before_forced_exit(record):
                yield
        except RunPreempted as stopped:
            cause = stopped.__cause__  # such as a failed last save
            error = None if cause is None else RunError.of(failure_of(cause, self._rank))
            self._end("preempted", requests, exit_code=_exit_code(stopped), error=error)
            raise
        except BaseException as error:
            record(failure_of(error, self._rank), _exit_code(error))
            raise
        self._end("completed", requests, exit_code=0)

    @contextmanager
    def around_resume(self) -> Iterator[None]:
        """Record a failure of the resume in the body."""
        if self._folder is None or self._rank != 0:
            yield
            return

        def record(failure: RankFailure, exit_code: int | None = 1) -> None:
            self._begin()
            self._end("failed", Requests(), exit_code=exit_code, error=RunError.of(failure))

        try:
            with before_forced_exit(record):
                yield
        except BaseException as error:
            record(failure_of(error, self._rank), _exit_code(error))
            raise

    def nothing_left(self) -> None:
        """Record a run as completed that was resumed at its end."""
        if self._folder is None or self._rank != 0:
            return
        with suppress(OSError, StateError):
            if _read(self._path).state == "completed":
                return
        self._begin()
        self._end("completed", Requests(), exit_code=0)

    def saved(
        self, path: str | os.PathLike[str], step: int, non_finite: Sequence[str] | None = None
    ) -> None:
        """Record a committed checkpoint. Call on every rank, from any thread."""
        if self._state is None or self._folder is None:
            return
        folder, target = self._folder.absolute(), Path(path).absolute()
        inside = target.is_relative_to(folder)
        shown = target.relative_to(folder) if inside else target
        names = None if non_finite is None else [*non_finite]
        self.events.add("save", str(shown), step)
        self._update(
            checkpoint=SavedCheckpoint(path=plain_text(shown), step=step, non_finite=names)
        )

    def rolled_back(self, from_step: int, reason: str) -> None:
        """Record the return from ``from_step`` to the current step. Call on every rank."""
        if self._state is not None:
            to_step = self._progress.global_step_id
            found = Rollback(from_step=from_step, to_step=to_step, reason=plain_text(reason))
            self.events.add("rollback", f"from step {from_step} to step {to_step}: {found.reason}")
            self._update(rollbacks=[*self._state.rollbacks, found][-20:])

    def retry(self) -> None:
        """Write the state again if the last write failed, or if the file disappeared."""
        if self._state is not None and (self._writes.failure or not self._path.exists()):
            self._update()

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / RUN_STATE_FILE

    def _begin(self) -> None:
        assert self._folder is not None
        kept: dict[str, Any] = {}
        try:
            before = _read(self._path)
        except StateError as error:
            with suppress(OSError):  # writing reports the error
                logger.warning("%s; the run moves the file to %s", error, set_aside(self._path))
        except OSError:
            pass  # no earlier run
        else:
            kept = {"checkpoint": before.checkpoint, "rollbacks": before.rollbacks}
            if before.state == "running" and before.process.is_another_running():
                logger.error(
                    "%s belongs to a run in progress, of process %d on %s, and is not updated for "
                    "this run; use a separate run folder for each run",
                    *(self._path, before.process.pid, before.process.host),
                )
                return
        now = _now()
        self._recording.enter_context(self.events.recording(self._folder))
        self._recording.enter_context(self.stage.recording(self._folder))
        done = self._progress.global_step_id
        kind, text = ("resume", f"resumed after step {done}") if done else ("start", "started")
        self.events.add(kind, f"{text}, world size {self._processes}")
        with self._lock:
            self._state = RunState(
                state="running",
                progress=self._counters(),
                processes=self._processes,
                process=ProcessIdentity.own(),
                started_at=now,
                updated_at=now,
                **kept,
            )
            with suppress(OSError):  # writing reports the error
                remove_leftovers(self._path)
            self._write(self._state)

    def _end(self, outcome: RunOutcome, requests: Requests, **found: Any) -> None:
        stop = requests.stop_request
        # A completed run was not interrupted, in spite of the request.
        if stop is not None and (outcome != "completed" or stop.exit_code is None):
            found |= {"reason": stop.reason, "by": stop.by}
        if self._state is not None and not self._has_remote_failure(self._state):
            self._update(state=outcome, **found)
        error, reason = found.get("error"), found.get("reason")
        why = reason if error is None else f"{error.type}: {error.message}"
        self.events.add("end", outcome if why is None else f"{outcome}: {why}")
        self._recording.close()
        while self.at_end:
            with suppress(Exception):  # an error here must not hide the run's own
                self.at_end.popitem()[1]()

    def _failed(self, requests: Requests, **found: Any) -> None:
        if self._rank == 0:
            self._end("failed", requests, **found)
            return
        with suppress(OSError, StateError):  # no such file: the folder is another machine's
            state = _read(self._path)
            started_at = state.started_at.timestamp()
            is_of_this_run = started_at > ProcessIdentity.own().started_at - _CLOCKS_APART_S
            if state.state == "running" and is_of_this_run:
                self._write(state.model_copy(update={"state": "failed", **found}))

    def _has_remote_failure(self, own: RunState) -> bool:
        """Return True if another rank already reported the root-cause failure."""
        if self._processes == 1:
            return False
        with suppress(OSError, StateError):
            found = _read(self._path)
            return found.state == "failed" and found.process == own.process
        return False

    def _update(self, **changes: Any) -> None:
        with self._lock:
            if self._state is None:
                return
            now = {"progress": self._counters(), "updated_at": _now()}
            self._state = self._state.model_copy(update={**changes, **now})
            self._write(self._state)

    def _counters(self) -> dict[str, int]:
        counters = self._progress.state_dict()
        del counters["version"]
        by_name = counters.pop("optimizer_steps", {})
        return counters | {f"optimizer_steps.{name}": n for name, n in by_name.items()}

    def _write(self, state: RunState) -> None:
        try:
            make_folder(self._path.parent)
            replace_file(self._path, state.model_dump_json(indent=2).encode() + b"\n")
        except OSError as error:
            what = f"writing {self._path}, which is now out of date,"
            self._writes.failed(what, error, "the run continues, and tries again")
        else:
            self._writes.succeeded(self._path)


def _read(path: Path) -> RunState:
    try:
        return RunState.model_validate_json(read_bounded(path))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise StateError(f"{path} can't be read as the state of a run: {problems}") from error


def read_bounded(path: Path) -> bytes:
    """Read a small regular file, without following links or waiting for pipes.

    Raises:
        StateError: the file is too large, a link or no regular file.
        OSError: the file can't be read.
    """
    flags = sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "BINARY"))
    try:
        descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StateError(f"{path} is a link; expected the file itself") from None
        raise
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StateError(f"{path} is no regular file")
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise StateError(f"{path} has more than {_MAX_BYTES} bytes, the most that are read")
    return content


def _exit_code(error: BaseException) -> int | None:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return None


def _now() -> datetime:
    return datetime.now(UTC)


STAGE_FILE = "stage.json"
Stage: TypeAlias = Literal["starting", "training", "evaluating", "saving"]

_EVERY_S = 1.0
_LONGEST_DETAIL = 100
_BYTES = 1024  # of the file, so that each write covers the one before


class StageFile:
    """Writer of ``stage.json`` in the run folder; the file is removed when the run ends.

    The file is written when the stage changes, and at commit points with requests at most once a
    second; a step writes nothing. It is written in place, with one call and no flush: replacing a
    file costs a hundred times as much. A reader that sees a torn file reads again. A write that
    fails is skipped, since the file matters only while the run is in progress.
    """

    def __init__(self, progress: TrainerProgress) -> None:
        self._progress = progress
        self._path: Path | None = None
        self._descriptor: int | None = None
        self._now = ("", "")
        self._since = ""
        self._due_at = self._loop_began_at = 0.0
        self._first_step = 0
        self._find_limits: Callable[[], dict[str, int | None]] = dict

    @contextmanager
    def recording(self, folder: Path) -> Iterator[None]:
        """Record stages in the body, the first of them ``starting``."""
        self._path, self._now, self._find_limits = folder / STAGE_FILE, ("", ""), dict
        with suppress(OSError):
            self._path.unlink()  # of a killed process
        self.enter("starting")
        try:
            yield
        finally:
            with suppress(OSError):
                self._path.unlink()
            self._close()
            self._path = None

    def begin_loop(self, find_limits: Callable[[], dict[str, int | None]]) -> None:
        """Record ``training``; the pace of the run is measured from here.

        Args:
            find_limits: returns limits of the run by name, to record; called for each write.
        """
        self._find_limits = find_limits
        self._first_step, self._loop_began_at = self._progress.global_step_id, monotonic()
        self.enter("training")

    def enter(self, stage: Stage, detail: str = "") -> None:
        """Record a stage, or new counters of the same stage."""
        if self._path is None or ((stage, detail) == self._now and monotonic() < self._due_at):
            return
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        if (stage, detail) != self._now:
            self._now, self._since = (stage, detail), at
        document = {
            "version": 1,
            "stage": stage,
            "detail": detail[:_LONGEST_DETAIL],
            "since": self._since,
            "at": at,
            "step": self._progress.global_step_id,
            "epoch": self._progress.epoch_id,
            "first_step": self._first_step,
            "loop_seconds": round(monotonic() - self._loop_began_at, 3),
            **self._find_limits(),
        }
        with suppress(OSError):  # events.jsonl and run_state.json report a full disk
            self._write(self._path, json.dumps(document).encode())
        self._due_at = monotonic() + _EVERY_S

    def _write(self, path: Path, data: bytes) -> None:
        if self._descriptor is None or not path.exists():  # the run folder was removed
            self._close()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # follows no link
            self._descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, data.ljust(_BYTES - 1) + b"\n")

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
