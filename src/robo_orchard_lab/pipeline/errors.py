"""The errors that a pipeline raises about what it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class PipelineConfigError(ValueError):
    """A trainer or hook can't be built from its arguments; the message names the one to change."""


class BatchProcessorError(TypeError):
    """A batch processor returned something else than ``(outputs, loss)``."""


class DataError(RuntimeError):
    """The data loader gave no batch where an epoch needs at least one."""


class StateError(ValueError):
    """A saved state does not fit what it is loaded into; nothing was changed."""


def check_state_version(state: Mapping[str, Any], expected: int, owner: str) -> None:
    """Raise `StateError` unless the ``version`` of a saved state is the expected one.

    >>> check_state_version({"version": 2}, expected=1, owner="EMA")
    Traceback (most recent call last):
    robo_orchard_lab.pipeline.errors.StateError: expected a state of EMA of version 1, found ...
    """
    found = state.get("version")
    if found != expected:
        raise StateError(
            f"expected a state of {owner} of version {expected}, found version {found!r}"
        )


class CheckpointError(StateError):
    """A checkpoint can't be written or read; the message says which, why, and what to do.

    What was there before a write is still there, and nothing that was loaded into is changed.
    """


class StoreLockedError(CheckpointError):
    """Another process, or another store of this one, writes checkpoints into the same root."""


class PipelineStateError(RuntimeError):
    """A trainer is asked for something that it can't do where it is."""


class RunPreempted(SystemExit):  # an exit, of which it is one kind
    """A run was interrupted, by a signal or a time limit, and is to be started again.

    As an exit that nobody catches, it ends the process with its code and without a traceback, so
    that what follows in a script does not take the model for a trained one.
    """


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What has ended one process of a job, and with it all of them."""

    rank: int
    type: str
    """The error's class; ``Killed`` of a process that is gone without a word, ``Stalled`` where
    the job has made no progress for too long."""
    message: str
    hook: str | None = None
    """The hook that raised it, with its channel, function and source line."""
    location: str | None = None
    """The file and line that raised it."""

    def __str__(self) -> str:
        if self.type == "Stalled":
            return f"the run has stalled, as rank {self.rank} found: {self.message}"
        where = f", raised in hook {self.hook}" if self.hook else ""
        return f"rank {self.rank} failed first: {self.type}: {self.message}{where}"


class RankFailed(RuntimeError):  # noqa: N818 - says what happened, as RunPreempted does
    """Another process of the job failed first, so that this one can't go on.

    The message is that of the other one's error; what it had this process run into, such as a
    connection that is closed, is the cause of this one. :attr:`failure` tells it in parts.
    """

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure
