"""Study of a sweep in a database, and recovery of trials whose process died."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_core.utils.process_identity import ProcessIdentity

STORAGE_VARIABLE = "ROBO_ORCHARD_LAB_TRIAL_STORAGE"
"""Environment variable of a run with the storage of its study: an address may hold a password."""

FIRST = "first_trial"
"""User attribute of a repeated trial: number of the trial that it continues."""
SWEEPER = "sweeper"
"""User attribute of a trial: process that executes its run."""
SURPLUS = "surplus"
"""User attribute of a trial beyond the number of trials; without a run."""
FAILED = "failed"
"""User attribute of a trial whose run failed: the error. A trial that failed without this attribute
lost its process, and is repeated."""
PRUNED = "pruned_at"
"""User attribute of a pruned trial: the step."""

_HEARTBEAT_S = 10
_GRACE_S = 60


def open_storage(storage: str) -> optuna.storages.BaseStorage:
    """Open the storage of an address.

    Args:
        storage: Address of a database for SQLAlchemy, such as ``sqlite:///study.db`` or
            ``postgresql://user@host/name``; another text is the file of Optuna's journal.

    Raises:
        ConfigError: The database can't be reached, or its driver is missing.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if "://" not in storage:
        backend = JournalFileBackend(storage)
        return optuna.storages.JournalStorage(backend)
    is_sqlite = storage.startswith("sqlite:")
    # Threads of a sweep wait for minutes between two uses: no connection stays open.
    engine = {"connect_args": {"timeout": 60}} if is_sqlite else {"poolclass": NullPool}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(
                storage,
                engine_kwargs=engine,
                heartbeat_interval=_HEARTBEAT_S,
                grace_period=_GRACE_S,
            )
    except (ImportError, SQLAlchemyError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        scheme = storage.partition("://")[0]  # the rest may hold a password
        raise ConfigError(
            f"the {scheme} database of the study can't be opened: {reason}; expected an address "
            "for SQLAlchemy, such as postgresql://user@host/name, and an installed driver, such as "
            "psycopg"
        ) from error


def recover(study: optuna.Study, folder: Path) -> None:
    """Repeat the trials that lost their process: killed, interrupted, or silent for a minute.

    A repeated trial has the parameters and the values of the old one, and continues its run from
    the newest checkpoint. Sweeps with a common folder do this one at a time.
    """
    unclaimed_before = datetime.now() - timedelta(seconds=_GRACE_S)
    with FileLock(folder / ".recover.lock"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if SWEEPER in trial.user_attrs:
                is_lost = ProcessIdentity.model_validate(trial.user_attrs[SWEEPER]).is_gone()
            else:  # just created, or killed at this instant
                start = trial.datetime_start
                is_lost = start is not None and start < unclaimed_before
            if is_lost:
                with suppress(ValueError):  # finished meanwhile
                    study.tell(trial.number, state=TrialState.FAIL)
        for chain in chains(study):
            if chain.is_lost:
                _repeat(study, chain.last)


def _repeat(study: optuna.Study, trial: FrozenTrial) -> None:
    kept = {name: trial.user_attrs[name] for name in (PRUNED,) if name in trial.user_attrs}
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**kept, FIRST: _first(trial)},
            system_attrs=trial.system_attrs,  # of the sampler, such as a cell of a grid
            intermediate_values=trial.intermediate_values,
        )
    )


def _first(trial: FrozenTrial) -> int:
    number: int = trial.user_attrs.get(FIRST, trial.number)
    return number


@dataclass(frozen=True)
class TrialChain:
    """Trial of a sweep: its first attempt, and the repeats after lost processes.

    Attributes:
        number: Number in the sweep, from 0; it names the run folder.
        first: Number of the first attempt in the study, where repeats have numbers of their own.
        last: Newest attempt; its state is the trial's.
    """

    number: int
    first: int
    last: FrozenTrial

    @property
    def is_lost(self) -> bool:
        """Return True if the newest attempt lost its process."""
        return self.last.state == TrialState.FAIL and FAILED not in self.last.user_attrs

    @property
    def is_finished(self) -> bool:
        """Return True if the trial has a result, was pruned, or its run failed."""
        return self.last.state.is_finished() and not self.is_lost


def chains(study: optuna.Study) -> list[TrialChain]:
    """Return the trials of a sweep, each with its newest attempt, without surplus ones."""
    newest: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if not trial.user_attrs.get(SURPLUS):
            newest[_first(trial)] = trial
    return [TrialChain(n, first, newest[first]) for n, first in enumerate(sorted(newest))]


def newest_attempt(study: optuna.Study, number: int) -> FrozenTrial:
    """Return the newest attempt of the trial that has an attempt with a number in the study."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if _first(trial) == _first(trials[number])][-1]
