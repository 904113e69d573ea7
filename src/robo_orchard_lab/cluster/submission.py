"""Submission of a run: settings of its job, the folder of the submission, and submitit's executors.

A submission is a new folder in the run folder::

    runs/spirals/submissions/0001/
      experiment.yaml        complete experiment, as validated at the submission
      submission.json        settings and job id, by the submitting command
      status.json            state and starts, by the job
      42_submission.sh       script for sbatch, by submitit
      42_submitted.pkl       `TrainingJob`, by submitit for its own process
      42_0_log.out           output of the training
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_lab.experiment.run_folder import SUBMISSIONS
from robo_orchard_lab.report.files import Problems
from robo_orchard_lab.report.jobs import (
    JOB_VARIABLE,
    SUBMISSION_FILE,
    Job,
    newest_submission,
    read_job,
    with_slurm_states,
)
from robo_orchard_lab.report.page import write

if TYPE_CHECKING:
    import submitit

    from robo_orchard_lab.experiment.config import ExperimentConfig

EXPERIMENT_FILE = "experiment.yaml"
SUBMISSION_LOG = "submission.log"
_LONGEST_MARGIN_S = 120.0
_OPTION = re.compile(r"[a-z][a-z-]*")
_OWN_OPTIONS = {
    "array": "one job trains one run",
    "cpus-per-task": "pass --cpus-per-node",
    "error": "logs are in the run folder",
    "gpus-per-node": "pass --gpus-per-node",
    "job-name": "it is the name of the experiment",
    "nodes": "pass --nodes",
    "ntasks": "one task on each node starts the processes",
    "ntasks-per-node": "one task on each node starts the processes",
    "open-mode": "logs are in the run folder",
    "output": "logs are in the run folder",
    "requeue": "it is set",
    "no-requeue": "the job could not continue",
    "signal": "pass --margin",
    "time": "pass --time",
}


class SubmissionError(ConfigError):
    """Job that can't be submitted; nothing runs."""


@dataclass(frozen=True)
class ClusterSettings:
    """Resources and limits of a job.

    Args:
        cluster: ``slurm``, or ``local`` for processes of this machine.
        time_s: Time limit of one start of the job, in seconds; SLURM's are whole minutes.
        margin_s: Time before the limit at which the run is saved; by default two minutes, and at
            most a quarter of the limit.
        nodes: Number of machines.
        gpus_per_node: Number of GPUs of each machine.
        cpus_per_node: Number of CPU cores of each machine; None for the default of SLURM.
        processes_per_node: Ranks on each machine; by default one for each GPU, at least one.
        max_requeues: Number of requeues after which the job fails.
        options: Further options of sbatch by name, without dashes; "" for a flag.
        setup: Shell commands that run before the training, such as ``module load cuda``.

    Raises:
        SubmissionError: Settings contradict each other.
    """

    cluster: Literal["slurm", "local"]
    time_s: float
    margin_s: float | None = None
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    processes_per_node: int | None = None
    max_requeues: int = 100
    options: Mapping[str, str] = field(default_factory=dict)
    setup: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.is_slurm:
            object.__setattr__(self, "time_s", 60.0 * math.ceil(self.time_s / 60))
        if self.time_s < 1:
            raise SubmissionError(f"expected a time limit of >= 1 s, found {self.time_s:g} s")
        if self.signal_delay_s >= self.time_s:
            raise SubmissionError(
                f"expected a margin below the time limit of {self.time_s:g} s, found "
                f"{self.signal_delay_s} s; pass a smaller --margin"
            )
        if not self.is_slurm and self.nodes > 1:
            raise SubmissionError(
                f"expected one node for local processes, found {self.nodes}; pass --cluster slurm "
                "on a machine with SLURM's commands"
            )
        if not self.is_slurm and (self.options or self.setup or self.cpus_per_node):
            others = {"setup": self.setup, "cpus-per-node": self.cpus_per_node}
            names = ", ".join([*self.options, *(name for name in others if others[name])])
            raise SubmissionError(f"expected no options of SLURM for a local job, found {names}")
        for name in self.options:
            if not _OPTION.fullmatch(name):
                raise SubmissionError(f"expected an option such as mem=64G, found {name!r}")
            if name in _OWN_OPTIONS:
                raise SubmissionError(f"the job sets {name} itself: {_OWN_OPTIONS[name]}")

    @property
    def is_slurm(self) -> bool:
        """Return True for a job of SLURM."""
        return self.cluster == "slurm"

    @property
    def signal_delay_s(self) -> int:
        """Time before the limit at which the run is saved, in whole seconds."""
        margin_s = min(_LONGEST_MARGIN_S, self.time_s / 4)
        return math.ceil(margin_s if self.margin_s is None else self.margin_s)

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks on each machine."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    def executor_parameters(self, name: str) -> dict[str, Any]:
        """Return the parameters of submitit's executor."""
        found: dict[str, Any] = {"signal_delay_s": self.signal_delay_s, "stderr_to_stdout": True}
        if not self.is_slurm:
            gpus = {"gpus_per_node": self.gpus_per_node}
            return {**found, "timeout_min": self.time_s / 60, "tasks_per_node": 1, **gpus}
        if self.gpus_per_node:
            found["gpus_per_node"] = self.gpus_per_node
        if self.setup:
            found["setup"] = [*self.setup]
        # Since SLURM 22.05, srun does not inherit the cores of a task.
        cores = [] if self.cpus_per_node is None else [f"--cpus-per-task={self.cpus_per_node}"]
        if self.cpus_per_node is not None:
            found["cpus_per_task"] = self.cpus_per_node
        flags = {option: value or True for option, value in self.options.items()}
        return {
            **found,
            "job_name": name,
            "time": int(self.time_s / 60),
            "nodes": self.nodes,
            "ntasks_per_node": 1,
            "srun_args": ["--kill-on-bad-exit=1", *cores],  # exit if the first node failed
            "additional_parameters": {"requeue": True, **flags},
        }

    def executor(self, folder: Path, name: str) -> submitit.Executor:
        """Return submitit's executor for a folder."""
        import submitit

        made = submitit.SlurmExecutor if self.is_slurm else submitit.LocalExecutor
        try:
            executor = made(folder, max_num_timeout=self.max_requeues)
        except RuntimeError as error:
            raise SubmissionError(f"{error}; --cluster local trains on this machine") from error
        executor.update_parameters(**self.executor_parameters(name))
        return executor


def find_cluster() -> Literal["slurm", "local"]:
    """Return ``slurm`` on a machine with SLURM's commands, else ``local``."""
    return "local" if shutil.which("sbatch") is None else "slurm"


def require_submitit() -> None:
    """Refuse a submission without submitit, with the command that installs it."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise SubmissionError(
            "a job requires submitit, which is not installed; "
            'pip install "robo-orchard-hooks[cluster]"'
        ) from None


def check_experiment(experiment: ExperimentConfig) -> None:
    """Refuse an experiment that could not save when the job is stopped, or resume afterwards.

    Raises:
        SubmissionError: With the option that adds what is missing.
    """
    from robo_orchard_lab.pipeline.hooks.preemption import PreemptionConfig

    if experiment.checkpoint is None:
        raise SubmissionError("a job that is requeued must save: remove checkpoint: null")
    hooks = [hook for hook in experiment.hooks.values() if isinstance(hook, PreemptionConfig)]
    if not any("SIGTERM" in hook.signals and hook.save_checkpoint for hook in hooks):
        raise SubmissionError(
            "expected a hook that saves on SIGTERM, as the job ends before its limit; pass "
            '--hooks.preemption "{class_type: Preemption}", or add it to the file'
        )


def submit(
    experiment: ExperimentConfig,
    settings: ClusterSettings,
    *,
    trust: Sequence[str] = (),
    allow: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> Job:
    """Submit a job that trains an experiment in its run folder, and return the job.

    The job trains a copy of the validated experiment: later changes of its file do not matter.

    Args:
        experiment: Validated experiment, see also `check_experiment`.
        settings: Resources and limits.
        trust: Packages and classes that the experiment may name.
        allow: As ``train --allow``.
        variables: Environment variables of the job, in addition to those of this process; in no
            file of the submission.

    Raises:
        SubmissionError: The run has a job that is not finished, or the submission failed.
        OSError: The run folder can't be written.
    """
    run = experiment.folder().absolute()
    refuse_active_job(run)
    folder = _make_folder(run)
    try:
        _fill(folder, run, experiment, settings, trust, allow)
        start(folder, variables)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    job = read_job(run, Problems())
    assert job is not None
    return job


def refuse_active_job(run: Path) -> None:
    """Refuse to train a run whose job runs or waits, except in the job.

    Raises:
        SubmissionError: With the command that cancels the job.
    """
    job = read_job(run, Problems())
    if job is None or os.environ.get(JOB_VARIABLE) == str(job.folder.absolute()):
        return
    [job] = with_slurm_states([job])
    if job is not None and job.is_active:
        raise SubmissionError(
            f"the run in {run} is job {job.id}, {job.state}; wait for it, or cancel it: "
            f"{cancel_command(job)} (of a job that SLURM no longer knows, remove {job.folder})"
        )


def sbatch_script(
    experiment: ExperimentConfig,
    settings: ClusterSettings,
    *,
    trust: Sequence[str] = (),
    allow: str | None = None,
) -> str:
    """Return the script that `submit` passes to sbatch; nothing is submitted or kept."""
    run = experiment.folder().absolute()
    with TemporaryDirectory() as place:
        folder, commands = Path(place, SUBMISSIONS), Path(place, "bin")
        for path in (folder, commands):
            path.mkdir()
        for name in ("sbatch", "srun"):  # submitit requires srun, and writes the script for sbatch
            (commands / name).write_text("#!/bin/sh\necho Submitted batch job 0\n")
            (commands / name).chmod(0o755)
        _fill(folder, run, experiment, settings, trust, allow)
        start(folder, {"PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', os.defpath)}"})
        script = (folder / "0_submission.sh").read_text()
        return script.replace(str(folder), str(_next_folder(run)))


def _fill(
    folder: Path,
    run: Path,
    experiment: ExperimentConfig,
    settings: ClusterSettings,
    trust: Sequence[str],
    allow: str | None,
) -> None:
    """Write the files of a submission."""
    write(folder / EXPERIMENT_FILE, experiment.replace(run_folder=None).to_str("yaml"))
    options = [part for package in trust for part in ("--trust", package)]
    options += [] if allow is None else ["--allow", allow]
    record = {
        "version": 1,
        "cluster": settings.cluster,
        "name": experiment.name,
        "run_folder": str(run),
        "resume": experiment.resume,
        "options": options,
        "settings": asdict(settings),
    }
    write(folder / SUBMISSION_FILE, json.dumps(record, indent=2) + "\n")


def start(folder: Path, variables: Mapping[str, str] | None = None) -> None:
    """Submit the job of a folder, in a process of its own: a local job outlives the terminal."""
    with open(folder / SUBMISSION_LOG, "ab") as log:
        done = subprocess.run(
            [sys.executable, "-m", "robo_orchard_lab.cluster", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(variables or {})},
            start_new_session=True,
            check=False,
        )
    if done.returncode:
        lines = (folder / SUBMISSION_LOG).read_text("utf-8", "replace").splitlines()
        reason = next(filter(None, map(str.strip, reversed(lines))), "no output")
        raise SubmissionError(f"the job can't be submitted: {reason}")


def cancel_command(job: Job) -> str:
    """Return the command that saves the run and ends its job."""
    return f"{'scancel' if job.cluster == 'slurm' else 'kill'} {job.id}"


def cancel(job: Job) -> None:
    """Save the run of an active job, and end the job."""
    subprocess.run(cancel_command(job).split(), check=False)


def launcher(processes: int, *options: str) -> list[str]:
    """Return the command that starts Python on a number of ranks of one machine."""
    if processes == 1 and not options:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return [*torchrun, *(options or ("--standalone",))]


def _next_folder(run: Path) -> Path:
    newest = newest_submission(run)
    return run / SUBMISSIONS / f"{1 if newest is None else int(newest.name) + 1:04d}"


def _make_folder(run: Path) -> Path:
    """Create the next folder of submissions.

    The folder is new: submitit's job waits for its pickle there and loads it, and finds no other.
    """
    folder = _next_folder(run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    return folder
