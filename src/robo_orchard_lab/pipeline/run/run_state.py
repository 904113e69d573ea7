"""What became of a run, in a file that is true at any time."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from robo_orchard_lab.pipeline.distributed.failures import failure_of, killed, plain_text
from robo_orchard_lab.pipeline.distributed.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.distributed.shutdown import before_hard_end
from robo_orchard_lab.pipeline.errors import RankFailure, RunPreempted, StateError
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.run.durable import remove_leftovers, replace_file

logger = logging.getLogger(__name__)

RUN_STATE_FILE = "run_state.json"
_MAX_BYTES = 1 << 20
RunOutcome: TypeAlias = Literal["running", "completed", "preempted", "failed"]

_CLOCKS_APART_S = 60.0  # those of two machines


class _Record(BaseModel):
    # Built when first used, which who only imports the trainer need not wait for.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class RunError(_Record):
    """What has ended a run."""

    type: str
    """The error's class, or ``Killed`` where the process is gone without a word."""
    message: str
    rank: int
    """Of the process that failed first, as far as that can be told."""
    hook: str | None = None
    """The hook that raised it, with its channel, function and source line; None where the error
    came from no hook."""
    location: str | None = None
    """The file and line that raised it."""

    @classmethod
    def of(cls, failure: RankFailure) -> RunError:
        """What has failed on a rank, as the file tells it."""
        return cls(**asdict(failure))


class SavedCheckpoint(_Record):
    """A checkpoint that is on the disk as a whole."""

    path: str
    """From the run's folder where it is in there."""
    step: int
    """How many steps were done."""


class RunState(_Record):
    """A run as its file tells it."""

    version: Literal[1] = 1
    state: RunOutcome
    """``preempted`` is one that is to be started again; ``completed`` also one that a hook has
    ended early, with its reason."""
    progress: dict[str, int]
    """The counters at :attr:`updated_at`: of a run that has ended, its last ones."""
    processes: int
    """How many take part."""
    process: ProcessIdentity
    """The one of the first rank."""
    started_at: datetime
    """When this process began with the run, or went on with it."""
    updated_at: datetime
    checkpoint: SavedCheckpoint | None = None
    """The last one in the folder's history."""
    reason: str | None = None
    """Why it was stopped."""
    by: str | None = None
    """The hook that asked for that."""
    exit_code: int | None = None
    """What the process was to end with; None while it runs, and where an error decides."""
    error: RunError | None = None
    """What has ended the run; of a preempted one, what has gone wrong with its last save."""


def read_run_state(folder: str | os.PathLike[str]) -> RunState:
    """What became of the run in a folder.

    A file that says ``running``, of a process that is gone from this machine, is told as ``failed``
    with the error ``Killed``. Of another machine's process, that can't be told.

    Raises:
        FileNotFoundError: no run has been started in that folder.
        StateError: the file is damaged, or of another version.
    """
    path = Path(folder) / RUN_STATE_FILE
    try:
        state = _read(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no run has been started in {folder}: no {path}") from None
    if state.state != "running" or not state.process.is_gone():
        return state
    of_others = f"ended by the launcher when another one of the {state.processes} was"
    failure = killed(0, state.process, of_others if state.processes > 1 else "")
    return state.model_copy(update={"state": "failed", "error": RunError.of(failure)})


class RunStateFile:
    """Keeps ``run_state.json`` in the folder of a run.

    It is replaced as a whole, and is on the disk, when a run begins, after each checkpoint, and
    when the run ends, also where it can't be resumed. The first rank writes it; another one only
    where it fails, since the first may then have no chance to. A file that can't be written, or
    that another process still keeps, ends no run: the log says so.

    Args:
        folder: the run's folder; None keeps no file.
        progress: the counters of the run.
        rank: of this process.
        processes: how many take part.
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
        self._state: RunState | None = None  # what this process has last written
        self._changing = threading.Lock()  # a checkpoint may be committed in another thread

    @contextmanager
    def around_run(self, requests: Requests) -> Iterator[None]:
        """Say that the run is running, and in the end what became of it."""
        if self._folder is None:
            yield
            return
        if self._rank == 0:
            self._begin()

        def tell(failure: RankFailure) -> None:
            self._failed(requests, exit_code=1, error=RunError.of(failure))

        try:
            with before_hard_end(tell):
                yield
        except RunPreempted as stopped:
            cause = stopped.__cause__  # such as the last save, which has failed
            error = None if cause is None else self._told(cause)
            self._end("preempted", requests, exit_code=_exit_code(stopped), error=error)
            raise
        except BaseException as error:
            self._fail(error, requests)
            raise
        self._end("completed", requests, exit_code=0)

    @contextmanager
    def around_resume(self) -> Iterator[None]:
        """Say that a run has failed which can't go on from what was saved; else nothing."""
        if self._folder is None or self._rank != 0:
            yield
            return

        def tell(failure: RankFailure, exit_code: int | None = 1) -> None:
            self._begin()
            self._end("failed", Requests(), exit_code=exit_code, error=RunError.of(failure))

        try:
            with before_hard_end(tell):
                yield
        except BaseException as error:
            tell(failure_of(error, self._rank), _exit_code(error))
            raise

    def nothing_left(self) -> None:
        """A run that was resumed at its end is completed, whatever had become of it before."""
        if self._folder is None or self._rank != 0:
            return
        with suppress(OSError, StateError):
            if _read(self._path).state == "completed":
                return
        self._begin()
        self._end("completed", Requests(), exit_code=0)

    def saved(self, path: str | os.PathLike[str], step: int) -> None:
        """A checkpoint is on the disk; to be told on every rank, from any thread."""
        if self._state is None or self._folder is None:
            return
        folder, target = self._folder.absolute(), Path(path).absolute()
        inside = target.is_relative_to(folder)
        shown = target.relative_to(folder) if inside else target
        self._update(checkpoint=SavedCheckpoint(path=plain_text(shown), step=step))

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / RUN_STATE_FILE

    def _begin(self) -> None:
        assert self._folder is not None
        checkpoint = None
        with suppress(OSError, StateError):  # there was no run before this one
            before = _read(self._path)
            checkpoint = before.checkpoint
            if before.state == "running" and before.process.is_another_that_runs():
                logger.error(
                    "%s is that of a run that still goes on, by process %d on %s; it is left to "
                    "that one, and does not tell of this one; give each run a folder of its own",
                    *(self._path, before.process.pid, before.process.host),
                )
                return
        now = _now()
        with self._changing:
            self._state = RunState(
                state="running",
                progress=self._counters(),
                processes=self._processes,
                process=ProcessIdentity.own(),
                started_at=now,
                updated_at=now,
                checkpoint=checkpoint,
            )
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self._path)
            except OSError:
                pass  # which writing will tell
            self._write(self._state)

    def _end(self, outcome: RunOutcome, requests: Requests, **found: Any) -> None:
        stop = requests.stop_request
        # A run that is completed all the same was not interrupted.
        if stop is not None and (outcome != "completed" or stop.exit_code is None):
            found |= {"reason": stop.reason, "by": stop.by}
        if self._state is not None and not self._failed_elsewhere(self._state):
            self._update(state=outcome, **found)

    def _fail(self, error: BaseException, requests: Requests) -> None:
        self._failed(requests, exit_code=_exit_code(error), error=self._told(error))

    def _failed(self, requests: Requests, **found: Any) -> None:
        if self._rank == 0:
            self._end("failed", requests, **found)
            return
        with suppress(OSError, StateError):  # no such file: the folder is another machine's
            state = _read(self._path)
            if state.state == "running" and _began_with_this_process(state):
                self._write(state.model_copy(update={"state": "failed", **found}))

    def _told(self, error: BaseException) -> RunError:
        return RunError.of(failure_of(error, self._rank))

    def _failed_elsewhere(self, own: RunState) -> bool:
        """Whether another rank has told its failure, of which this rank's end follows."""
        if self._processes == 1:
            return False
        with suppress(OSError, StateError):
            told = _read(self._path)
            return told.state == "failed" and told.process == own.process
        return False

    def _update(self, **changes: Any) -> None:
        with self._changing:
            if self._state is None:
                return
            now = {"progress": self._counters(), "updated_at": _now()}
            self._state = self._state.model_copy(update={**changes, **now})
            self._write(self._state)

    def _counters(self) -> dict[str, int]:
        counters = self._progress.state_dict()
        del counters["version"]
        return counters

    def _write(self, state: RunState) -> None:
        try:
            replace_file(self._path, state.model_dump_json(indent=2).encode() + b"\n")
        except OSError as error:
            logger.error("can't write %s, which is no longer true: %s", self._path, error)


def _began_with_this_process(state: RunState) -> bool:
    """Whether it is the run of this rank, and not one that has this folder already."""
    return state.started_at.timestamp() > ProcessIdentity.own().started_at - _CLOCKS_APART_S


def _read(path: Path) -> RunState:
    try:
        return RunState.model_validate_json(_content(path))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise StateError(f"{path} can't be read as the state of a run: {problems}") from error


def _content(path: Path) -> bytes:
    """What is in the file itself: nobody waits for a pipe, or reads what has no end."""
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
        raise StateError(
            f"{path} is larger than the {_MAX_BYTES} bytes that a run's state may have"
        )
    return content


def _exit_code(error: BaseException) -> int | None:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return None


def _now() -> datetime:
    return datetime.now(UTC)
