"""Job of a run: training in a child process, a save before the limit, and the requeue."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.cluster.submission import (
    EXPERIMENT_FILE,
    ClusterSettings,
    launcher,
    start,
)
from robo_orchard_lab.experiment.run_folder import RUN_STATE, STARTS
from robo_orchard_lab.report.files import Problems, items, mapping, read_object, whole
from robo_orchard_lab.report.jobs import JOB_VARIABLE, STATUS_FILE, SUBMISSION_FILE
from robo_orchard_lab.report.page import write

LOCAL_STARTS = 6
"""Number of times that submitit's local executor starts a job (1.5)."""


class JobError(RuntimeError):
    """Job that failed, or can't be requeued."""


class _TrainingEndedError(Exception):
    """End of the training while the job was asked to requeue."""


@dataclass
class TrainingJob:
    """Function that submitit runs on each node: it trains a run, and is requeued until completion.

    Before the time limit, or at a preemption with the same signal, submitit calls `checkpoint` on
    the first node: the training saves and stops, and submitit requeues the job. A run that stopped
    by itself with a request to be started again, as by the hook ``TimeLimit``, is requeued as well.
    SIGTERM, as from ``scancel``, saves the run and ends the job.

    A job fails after two starts without a further saved step, unless it was preempted early.

    Args:
        folder: Folder of the submission.
        run_folder: Run folder.
        options: Further options of ``train``.
        resume: Value of ``--resume`` for this start.
        recorded_before: Number of starts of the run before the job.
        settings: Resources and limits.
    """

    folder: str
    run_folder: str
    options: tuple[str, ...]
    resume: str
    recorded_before: int
    settings: ClusterSettings

    def __post_init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._has_begun = time.monotonic()
        self._is_stopping = self._is_cancelled = self._wants_requeue = False
        self._before: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the constructor's arguments: submitit pickles them for the next start."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the arguments."""
        vars(self).update(state)
        self.__post_init__()

    def __call__(self) -> str:
        """Train until the run is completed; return the final state of the job.

        Raises:
            JobError: The training failed, or the run can't progress.
        """
        environment = JobEnvironment()
        if environment.global_rank != 0:
            self._train(environment)  # the first node decides, and reports
            return "finished"
        self._begin(environment)
        try:
            signal.signal(signal.SIGTERM, self._cancel)
            with suppress(_TrainingEndedError):
                self._train(environment)
            self._check_outcome()
        except Exception as error:
            self._record("failed", message=str(error))
            raise
        except KeyboardInterrupt:  # of submitit's local executor at the limit
            self._record("failed", message="the job was ended before the run was saved")
            raise
        signal.signal(_requeue_signal(), signal.SIG_IGN)
        self._record("finished")
        return "finished"

    def checkpoint(self) -> DelayedSubmission:
        """Save and stop the training; return the next start. Called by submitit's handler."""
        if not self._wants_requeue:
            self._stop()
            self._wait()
            if self._outcome() not in ("preempted", ""):
                raise _TrainingEndedError  # completed or failed meanwhile
        self._check_progress()
        self._record("requeued")
        if not self.settings.is_slurm and self._starts_of_job() >= LOCAL_STARTS:
            start(Path(self.folder))
        # Also with `resume: never`, the next start continues the run that this job has begun.
        is_begun = _recorded(self.run_folder) > self.recorded_before
        return DelayedSubmission(replace(self, resume="auto" if is_begun else self.resume))

    def _begin(self, environment: JobEnvironment) -> None:
        status = self._status()
        self._before = self._run_state()
        start = {
            "job_id": environment.job_id,
            "host": socket.gethostname(),
            "at": _now(),
            "step": _saved_step(self._before),
        }
        starts = [*items(status.get("starts")), start]
        self._record(
            "running", job_id=environment.job_id, starts=starts, message="", exit_code=None
        )

    def _train(self, environment: JobEnvironment) -> None:
        """Run the training to its end."""
        # The shell ignores submitit's signal for all processes of the training: some configurations
        # of SLURM send it to each process of a job.
        ignoring = ["sh", "-c", f'trap "" {JobEnvironment.USR_SIG}; exec "$@"', "sh"]
        variables = {
            JOB_VARIABLE: self.folder,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, self.settings.signal_delay_s - 10)),
        }
        self._child = subprocess.Popen(
            [*ignoring, *self._command(environment)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **variables},
        )
        try:
            if self._is_stopping:  # by a signal before the start
                self._child.terminate()
            self._wait()
        finally:
            _kill(self._child)

    def _command(self, environment: JobEnvironment) -> list[str]:
        return [
            *_launcher(self.settings, environment),
            *("-m", "robo_orchard_lab", "train", str(Path(self.folder, EXPERIMENT_FILE))),
            *("--run_folder", self.run_folder, "--resume", self.resume, *self.options),
        ]

    def _wait(self) -> None:
        """Wait for the end of the training, also in a signal handler that interrupts the wait."""
        if self._child is not None and self._child.returncode is None:
            # Popen.wait has a lock, and the interrupted wait may hold it.
            with suppress(ChildProcessError):  # its end was just noticed
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)

    def _stop(self) -> None:
        """Ask the training to save and to stop, once: a second signal ends it without a save."""
        if not self._is_stopping:
            self._is_stopping = True
            if self._child is not None:
                self._child.terminate()

    def _cancel(self, number: int, frame: FrameType | None) -> None:
        self._is_cancelled = True
        self._stop()

    def _check_outcome(self) -> None:
        """Requeue a run that is to be started again; raise JobError for a failed one."""
        assert self._child is not None
        code = self._child.wait()
        # torchrun exits with 1 after a signal, also if the run was at its end.
        if code == 0 or (self._is_stopping and self._outcome() == "completed"):
            return
        if self._is_cancelled:
            raise JobError("the job was cancelled; submit the run again to resume it")
        if self._outcome() == "preempted":
            self._wants_requeue = True
            signal.raise_signal(_requeue_signal())  # submitit's handler requeues, and exits
        self._record("failed", exit_code=code)
        raise JobError(f"the training ended with exit code {code}; the log has the error")

    def _check_progress(self) -> None:
        """Refuse a requeue that would repeat this start without end.

        Raises:
            JobError: With the remedy.
        """
        starts = items(self._status().get("starts"))
        if len(starts) > self.settings.max_requeues:
            raise JobError(
                f"the job was requeued {self.settings.max_requeues:,} times, which is "
                "--max-requeues; submit it again to resume the run"
            )
        step = _saved_step(self._run_state())
        training_s = self.settings.time_s - self.settings.signal_delay_s
        used_s = time.monotonic() - self._has_begun
        is_short = not self._wants_requeue and used_s < training_s / 2  # preempted
        at_starts = [mapping(start).get("step") for start in starts[-2:]]
        if at_starts == [step, step] and not is_short:
            raise JobError(
                f"two starts of the job saved no step after step {step}, and it would be requeued "
                f"without end; {training_s:g} of its {self.settings.time_s:g} s are for the start "
                "of the program and the training: submit the run again with a longer --time"
            )

    def _outcome(self) -> str:
        """Return the outcome of the run in this start; "" if the training did not begin."""
        state = self._run_state()
        if state == self._before:
            return ""
        is_stopped = state.get("exit_code") == 128 + signal.SIGTERM  # also while it resumed
        return "preempted" if is_stopped else str(state.get("state"))

    def _run_state(self) -> dict[str, Any]:
        return read_object(Path(self.run_folder, RUN_STATE), Problems())

    def _starts_of_job(self) -> int:
        status = self._status()
        own = [mapping(start).get("job_id") for start in items(status.get("starts"))]
        return own.count(status.get("job_id"))

    def _status(self) -> dict[str, Any]:
        return read_object(Path(self.folder, STATUS_FILE), Problems())

    def _record(self, state: str, **changes: Any) -> None:
        status = {"version": 1, **self._status(), **changes, "state": state, "updated_at": _now()}
        write(Path(self.folder, STATUS_FILE), json.dumps(status, indent=2) + "\n")


def submit_folder(folder: Path) -> None:
    """Submit the job of a folder, whose files this library has just written; record the job id."""
    found = json.loads((folder / SUBMISSION_FILE).read_bytes())
    settings = ClusterSettings(**found["settings"])
    run = found["run_folder"]
    training = TrainingJob(
        folder=str(folder),
        run_folder=run,
        options=tuple(found["options"]),
        resume=found["resume"],
        recorded_before=_recorded(run),
        settings=settings,
    )
    job = settings.executor(folder, found["name"]).submit(training)
    process = None
    if not settings.is_slurm:
        own, controller = ProcessIdentity.own(), psutil.Process(int(job.job_id))
        changes = {"pid": controller.pid, "started_at": controller.create_time()}
        process = own.model_copy(update=changes).model_dump()
    record = {**found, "job_id": job.job_id, "process": process, "submitted_at": _now()}
    write(folder / SUBMISSION_FILE, json.dumps(record, indent=2) + "\n")


def _launcher(settings: ClusterSettings, environment: JobEnvironment) -> Sequence[str]:
    if settings.nodes == 1:
        return launcher(settings.ranks_per_node)
    # The first rank is on the first node: when its processes end, the state of the run is final.
    return launcher(
        settings.ranks_per_node,
        f"--nnodes={settings.nodes}",
        f"--node-rank={environment.global_rank}",
        f"--master-addr={environment.hostnames[0]}",
        f"--master-port={20000 + int(environment.job_id) % 10000}",
    )


def _recorded(run_folder: str) -> int:
    """Return the number of recorded starts of a run."""
    return len([*Path(run_folder, STARTS).glob("*.json")])


def _saved_step(state: dict[str, Any]) -> int:
    return whole(mapping(state.get("checkpoint")).get("step")) or 0


def _requeue_signal() -> signal.Signals:
    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the processes of a training that still run, as when the job is killed."""
    try:
        started = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    child.kill()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
