"""Cluster jobs of runs: state and job id, from the files of a submission and from SLURM.

The submitting command writes ``submission.json``, the job writes ``status.json``. Nothing is
unpickled: the pickles next to these files are for submitit's own processes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.experiment.run_folder import SUBMISSIONS
from robo_orchard_lab.report.files import Problems, items, mapping, read_object, text, whole

SUBMISSION_FILE = "submission.json"
STATUS_FILE = "status.json"
JOB_VARIABLE = "ROBO_ORCHARD_LAB_JOB"
"""Environment variable of a training in a job, with the folder of the submission."""
ACTIVE = ("queued", "running", "requeued")
_STATES = (*ACTIVE, "finished", "failed")
_ID = re.compile(r"[0-9]{1,20}")
_NUMBER = re.compile(r"[0-9]{4,9}")


@dataclass(frozen=True, slots=True)
class Job:
    """Newest cluster job of a run.

    Attributes:
        folder: Folder of the submission, with the logs.
        cluster: ``slurm`` or ``local``.
        id: Job id; for a local job, the id of its controlling process. None while unknown.
        state: queued, running, requeued, finished or failed.
        steps: Steps of the newest checkpoint at each start of the job.
        message: Reason of a failure; else "".
        exit_code: Exit code of a training that failed; else None.
    """

    folder: Path
    cluster: str
    id: str | None
    state: str
    steps: tuple[int, ...]
    message: str
    exit_code: int | None

    @property
    def is_active(self) -> bool:
        """Return True for a job that runs or waits."""
        return self.state in ACTIVE

    @property
    def log(self) -> Path:
        """Output of the first node, in the file that submitit names."""
        return self.folder / f"{self.id}_0_log.out"


def newest_submission(run: Path) -> Path | None:
    """Return the newest folder of submissions of a run, or None."""
    with suppress(OSError):
        names = [e.name for e in (run / SUBMISSIONS).iterdir() if _NUMBER.fullmatch(e.name)]
        if names:
            return run / SUBMISSIONS / max(names, key=int)
    return None


def read_job(run: Path, problems: Problems) -> Job | None:
    """Read the newest job of a run from its files, or None without one; never fails.

    A local job whose process has died is failed. For SLURM, see `with_slurm_states`.
    """
    if (folder := newest_submission(run)) is None:
        return None
    submission = read_object(folder / SUBMISSION_FILE, problems)
    status = read_object(folder / STATUS_FILE, problems)
    cluster = "slurm" if submission.get("cluster") == "slurm" else "local"
    ids = (str(found.get("job_id")) for found in (status, submission))
    job_id = next(filter(_ID.fullmatch, ids), None)
    state, message = text(status.get("state"), "queued", 20), text(status.get("message"))
    if job_id is None:
        state, message = "failed", "the submission was interrupted"
    if state not in _STATES:
        state = "failed"
        problems.add(f"{STATUS_FILE} is damaged: no state of a job")
    starts = (whole(mapping(start).get("step")) for start in items(status.get("starts")))
    job = Job(
        folder=folder,
        cluster=cluster,
        id=job_id,
        state=state,
        steps=tuple(step for step in starts if step is not None),
        message=message,
        exit_code=whole(status.get("exit_code")),
    )
    if job.is_active and cluster == "local" and _is_gone(submission.get("process")):
        return replace(job, state="failed", message="the process of the job died")
    return job


def _is_gone(process: Any) -> bool:
    with suppress(ValueError, TypeError):
        return ProcessIdentity.model_validate(process).is_gone()
    return False


def with_slurm_states(jobs: Iterable[Job | None]) -> list[Job | None]:
    """Return jobs with the states that SLURM knows, such as of cancelled jobs, by one ``sacct``.

    Jobs stay as they are if submitit or ``sacct`` is missing, or does not know them.
    """
    found = [*jobs]
    asked = [job for job in found if job is not None and job.cluster == "slurm" and job.is_active]
    if not asked or shutil.which("sacct") is None:
        return found
    try:
        from submitit.slurm.slurm import SlurmInfoWatcher
    except ImportError:
        return found
    watcher = SlurmInfoWatcher()
    for job in asked:
        if job.id is not None:
            watcher.register_job(job.id)
    watcher.update()
    return [
        _with_slurm_state(job, watcher.get_state(job.id, mode="cache"))
        if job is not None and job.id is not None and job in asked
        else job
        for job in found
    ]


def _with_slurm_state(job: Job, state: str) -> Job:
    word = state.upper().partition(" ")[0].rstrip("+")  # such as "CANCELLED by 1000"
    if word in ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD"):
        return replace(job, state="requeued" if job.steps else "queued")
    if word in ("", "UNKNOWN", "RUNNING", "COMPLETING", "RESIZING", "COMPLETED", "PREEMPTED"):
        return job  # the job's own files are as new, or newer
    return replace(job, state="failed", message=f"SLURM ended the job: {word}")
