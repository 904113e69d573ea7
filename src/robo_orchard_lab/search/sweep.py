"""Sweep: trials of one experiment file in child processes, several at a time."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.cluster.submission import ClusterSettings, cancel, launcher, submit
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.existing_run import find_existing_run
from robo_orchard_lab.experiment.overrides import from_arguments
from robo_orchard_lab.report.files import Problems
from robo_orchard_lab.report.jobs import Job, read_job, with_slurm_states
from robo_orchard_lab.search.space import SweepSpace, make_pruner
from robo_orchard_lab.search.storage import (
    FAILED,
    FIRST,
    PRUNED,
    STORAGE_VARIABLE,
    SURPLUS,
    SWEEPER,
    chains,
    open_storage,
    recover,
)

HOOK = "sweep"
"""Name of the hook `SweepTrial` in the experiment of a trial."""

_USAGE, _STOPPED = 2, (75, 130, 143)  # exit codes of `robo-orchard-lab train`
_POLL_S = 1.0
_ASK_SLURM_S = 60.0


class SweepError(ConfigError):
    """A sweep that can't start or continue."""


class _NoResultError(Exception):
    """Failure of a trial's run, or its stop, after which another trial continues."""


@dataclass(frozen=True)
class _Slot:
    """Cores and environment variables of one job."""

    cores: list[int]
    environment: dict[str, str]


@dataclass
class Sweep:
    """Search of the best values for some fields of an experiment file.

    Each trial is a run of ``robo-orchard-lab train`` in its own process and run folder,
    ``FOLDER/trials/NUMBER``. A killed sweep continues when it is started again: the study has the
    finished trials, and the runs of the others resume from their checkpoints. Several sweeps,
    also on several machines, share a study whose storage all of them reach.

    Args:
        file: Experiment file.
        space: Search space.
        folder: Folder of the sweep.
        storage: Storage of the study, see `open_storage`; a SQLite file in the folder by default.
        study: Name of the study; the name of the folder by default.
        arguments: Fields of each run, such as ``--trainer.max_epoch=3``.
        trust: Packages and classes that the experiment may name.
        processes: World size of each run.
        document: Experiment as plain data; a study accepts no other one.
        cluster: Settings of jobs that train the trials; by default, child processes train them.
        report: Called with a line about each event.
    """

    file: Path
    space: SweepSpace
    folder: Path
    storage: str = ""
    study: str = ""
    arguments: Sequence[str] = ()
    trust: Sequence[str] = ()
    processes: int = 1
    document: Any = None
    cluster: ClusterSettings | None = None
    report: Callable[[str], object] = print
    _stopping: threading.Event = field(default_factory=threading.Event, init=False)
    _claiming: threading.Lock = field(default_factory=threading.Lock, init=False)
    _runs: set[subprocess.Popen[bytes]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.storage = self.storage or default_storage(self.folder)
        self.study = self.study or self.folder.resolve().name

    def open(self) -> optuna.Study:
        """Create or load the study, an `optuna.Study` like any other.

        Raises:
            SweepError: The study belongs to another experiment or metric.
            ConfigError: The sampler or the pruner is invalid.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=open_storage(self.storage),
            study_name=self.study,
            direction=self.space.direction,
            sampler=self.space.make_sampler(),
            pruner=make_pruner(self.space.pruner),
            load_if_exists=True,
        )
        own = {"experiment": json.dumps(self.document, sort_keys=True), "metric": self.space.metric}
        for name, value in own.items():
            if study.user_attrs.get(name, value) != value:
                raise SweepError(
                    f"the study {self.study!r} in {self.folder} is of another {name}; use another "
                    "folder, or restore the file and the options of its first start"
                )
            study.set_user_attr(name, value)
        study.set_user_attr("pruner", self.space.pruner)  # for the runs
        return study

    def run(self, trials: int, jobs: int = 1) -> None:
        """Run trials until the study has a number of them, those of other sweeps included.

        Args:
            trials: Number of trials, >= 1; repeats after lost processes don't count.
            jobs: Number of trials at a time, >= 1; each has its own cores and devices.

        Raises:
            SweepError: A run refuses its arguments, as every further run would.
            KeyboardInterrupt: After the runs in progress were saved and stopped.
        """
        self.open()  # creates the study before the workers load it
        with ThreadPoolExecutor(jobs) as pool:
            workers = [pool.submit(self._work, trials, slot) for slot in _slots(jobs)]
            try:
                for worker in wait(workers, return_when=FIRST_EXCEPTION).done:
                    worker.result()
            finally:
                self.stop()

    def stop(self) -> None:
        """Save and stop the runs in progress; start no further trial."""
        self._stopping.set()
        for process in [*self._runs]:
            with suppress(ProcessLookupError):
                process.terminate()

    def _work(self, trials: int, slot: _Slot) -> None:
        study = self.open()
        while not self._stopping.is_set():
            with ExitStack() as claim:  # one worker decides at a time
                claim.enter_context(self._claiming)
                recover(study, self.folder)
                if self._has_work(study, trials):
                    objective = partial(self._objective, trials=trials, slot=slot, claim=claim)
                    study.optimize(objective, n_trials=1, catch=(_NoResultError,))
                    continue
            if all(chain.is_finished for chain in chains(study)):
                return
            self._stopping.wait(_POLL_S)  # others run the last trials, and may die

    def _has_work(self, study: optuna.Study, trials: int) -> bool:
        found = chains(study)
        is_waiting = any(chain.last.state == TrialState.WAITING for chain in found)
        return is_waiting or len(found) < trials

    def _objective(self, trial: optuna.Trial, trials: int, slot: _Slot, claim: ExitStack) -> float:
        """Run a trial; return its result."""
        first = trial.user_attrs.get(FIRST, trial.number)
        number = sum(chain.first < first for chain in chains(trial.study))
        if number >= trials:
            trial.set_user_attr(SURPLUS, True)  # two sweeps created the last trial at once
            raise _NoResultError
        trial.study.sampler = self.space.make_sampler(number)
        trial.set_user_attr(SWEEPER, ProcessIdentity.own().model_dump())
        parameters = self.space.parameters
        values = {name: parameters[name].suggest(trial, name) for name in parameters}
        claim.close()
        folder = self.folder / "trials" / f"{number:04d}"
        train = self._train if self.cluster is None else self._train_in_job
        code, log = train(self._fields(trial, folder, values), folder, slot)
        if code in _STOPPED or (code != 0 and self._stopping.is_set()):
            raise _NoResultError  # without FAILED: the next start continues the run
        if code == _USAGE:
            raise SweepError(f"trial {number} can't start: {_last_error(log)}")
        if code != 0:
            trial.set_user_attr(FAILED, _last_error(log))
            self.report(f"trial {number} failed: {_last_error(log)}")
            raise _NoResultError
        return self._result(trial, number)

    def _result(self, trial: optuna.Trial, number: int) -> float:
        frozen = trial.study.get_trials(deepcopy=False)[trial.number]
        values = frozen.intermediate_values
        if not values:
            problem = f"trial {number} published no {self.space.metric}"
            raise SweepError(f"{problem}; evaluate in the run, or name another metric")
        pick = min if self.space.direction == "minimize" else max
        steps = sorted(values)
        value = values[steps[-1]] if self.space.value == "last" else pick(values.values())
        state = "completed"
        if PRUNED in frozen.user_attrs:
            state = f"pruned at step {frozen.user_attrs[PRUNED]}"
        self.report(f"trial {number} {state}: {self.space.metric} {value:.6g}")
        if PRUNED in frozen.user_attrs:
            raise optuna.TrialPruned
        return value

    def _fields(self, trial: optuna.Trial, folder: Path, values: dict[str, Any]) -> tuple[str, ...]:
        """Return the fields of a trial's run, as arguments."""
        hook = {
            "class_type": "SweepTrial",
            "study": self.study,
            "trial": trial.number,
            "metric": self.space.metric,
        }
        fields = {**values, "run_folder": str(folder), f"hooks.{HOOK}": hook}
        return tuple(f"--{name}={json.dumps(value)}" for name, value in fields.items())

    def _train(self, fields: Sequence[str], folder: Path, slot: _Slot) -> tuple[int, Path]:
        """Run the command of a trial to its end; return the exit code and the log."""
        command = [
            *launcher(self.processes),
            *("-m", "robo_orchard_lab", "train", str(self.file)),
            *(part for package in self.trust for part in ("--trust", package)),
            *(*self.arguments, *fields),
        ]
        folder.mkdir(parents=True, exist_ok=True)
        self._wait_for_earlier(folder)
        path = folder.with_suffix(".log")
        with open(path, "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closes with this process
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment, STORAGE_VARIABLE: self.storage},
                start_new_session=True,  # Ctrl-C goes to the sweep, which stops its runs
            )
        with suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, slot.cores)
        self._runs.add(process)
        try:
            if self._stopping.is_set():
                process.terminate()
            return process.wait(), path
        finally:
            self._runs.discard(process)
            assert process.stdin is not None
            process.stdin.close()

    def _train_in_job(self, fields: Sequence[str], folder: Path, slot: _Slot) -> tuple[int, Path]:
        """Train a trial in a job to its end; return the exit code and the log."""
        assert self.cluster is not None
        self._end_job(folder)  # of a sweep that was killed
        trust = [*self.trust]
        overrides, _ = from_arguments([*self.arguments, *fields])
        experiment = ExperimentConfig.load(
            self.file, trust=trust, overrides=overrides, environ=os.environ
        )
        submit(experiment, self.cluster, trust=trust, variables={STORAGE_VARIABLE: self.storage})
        job = self._end_job(folder, is_wanted=True)
        assert job is not None
        if job.state == "finished":
            return 0, job.log
        if job.exit_code is None:  # not of the training: killed, or without progress
            self.report(f"{folder}: job {job.id}: {job.message}")
        return job.exit_code or 1, job.log

    def _end_job(self, folder: Path, *, is_wanted: bool = False) -> Job | None:
        """Wait for the end of the newest job in a folder; cancel one that is not wanted."""
        asked_at = -_ASK_SLURM_S
        is_cancelled = False
        while True:
            job = read_job(folder, Problems())
            if time.monotonic() - asked_at >= _ASK_SLURM_S:
                [job], asked_at = with_slurm_states([job]), time.monotonic()
            if job is None or not job.is_active:
                return job
            if not is_cancelled and (self._stopping.is_set() or not is_wanted):
                cancel(job)
                is_cancelled = True
            time.sleep(_POLL_S)

    def _wait_for_earlier(self, folder: Path) -> None:
        """Wait until the process of an earlier sweep has stopped the run in a folder."""
        while not self._stopping.wait(0):
            existing = find_existing_run(folder)
            if existing is None or not existing.is_running:
                return
            self._stopping.wait(_POLL_S)


def default_storage(folder: Path) -> str:
    """Return the storage of a sweep's own study, a SQLite file in its folder."""
    return f"sqlite:///{folder.resolve() / 'study.db'}"


def _slots(jobs: int) -> list[_Slot]:
    """Divide cores and CUDA devices among jobs; with fewer than jobs, all share them."""
    import torch

    cores = sorted(os.sched_getaffinity(0))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [name for name in (named or "").split(",") if name]
    if named is None:
        devices = [str(index) for index in range(torch.cuda.device_count())]
    found = []
    for job in range(jobs):
        own = cores[job::jobs] if len(cores) >= jobs else cores
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(len(own)))}
        if devices:
            own_devices = devices[job::jobs] if len(devices) >= jobs else devices
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own_devices)
        found.append(_Slot(own, environment))
    return found


def _last_error(log: Path) -> str:
    """Return the last error in the log of a trial, or its last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return str(error)
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if "error:" in line]
    found = (errors or lines or ["no output"])[-1].partition("error: ")
    return f"{found[2] or found[0]} (see {log})"
