"""Errors of the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from robo_orchard_core.utils.config.errors import did_you_mean, suggest_name


class PipelineConfigError(ValueError):
    """Invalid argument of a trainer or hook; the message names the argument to change.

    Args:
        setting: path of the value in the argument of the trainer or the config of the hook, for
            its place in a file; empty for the place of the object.
    """

    def __init__(self, message: str, *, setting: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.setting = setting


class BatchProcessorError(TypeError):
    """Wrong result of a batch processor."""


class DataError(RuntimeError):
    """Data loader without a batch, or with an unexpected number of batches."""


class UnknownMetricError(LookupError):
    """Error for an unpublished metric name; the message lists the published names.

    Args:
        name: the unknown name.
        published: known names, or before the first step also patterns of names.
        who: name of the hook that waits for the metric.
        hint: further remedy.
        place: before the first step, the place of the setting that has the name.
    """

    def __init__(
        self,
        name: str,
        published: Iterable[str],
        who: str = "",
        hint: str = "",
        place: str = "",
    ) -> None:
        published = sorted(published)
        self.place = place
        near = self.similar = did_you_mean(name, published)
        super().__init__(
            (f"{place}: no hook is known to publish {name!r}" if place else "")
            + ("" if place else f"no metric {name!r} was published")
            + (f", which {who} waits for" if who else "")
            + (f"; {near}" if near else ".")
            + f" Published: {', '.join(published) or 'none'}"
            + (f". {hint}" if hint else "")
        )


class UnknownHookError(KeyError):
    """Error for a name that no hook has; the message has the similar name, or all names."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no hook is named {name!r}; {suggest_name(name, [*known], 'there is')}")

    def __str__(self) -> str:  # without the quotes of a KeyError
        return str(self.args[0])


class StateError(ValueError):
    """Saved state that does not fit the object; nothing was changed."""


def check_state_version(state: Mapping[str, Any], expected: int, owner: str) -> None:
    """Raise `StateError` unless the ``version`` of a saved state is the expected one.

    >>> check_state_version({"version": 2}, expected=1, owner="EMA")
    Traceback (most recent call last):
    robo_orchard_lab.pipeline.errors.StateError: expected a state of EMA of version 1, found ...
    """
    found = state.get("version")
    if type(found) is not int or found != expected:
        raise StateError(
            f"expected a state of {owner} of version {expected}, found version {found!r:.60}"
        )


class CheckpointError(StateError):
    """Checkpoint that can't be written or read; the message names path, cause and remedy.

    A failed write leaves existing files, a failed read leaves live objects unchanged.
    """


class StoreLockedError(CheckpointError):
    """Checkpoint directory in use by another process or store."""


class PipelineStateError(RuntimeError):
    """Operation that is impossible in the trainer's current state."""


class RunPreempted(SystemExit):  # named for the event, as in SystemExit
    """Run that was interrupted by a signal or a time limit, and is to be started again.

    A ``SystemExit``: uncaught, it ends the process with its exit code and without a traceback, so
    the rest of a script does not use a partly trained model.
    """


@dataclass(frozen=True, slots=True)
class RankFailure:
    """Root-cause failure of one rank, which ended the job."""

    rank: int
    type: str
    """Class of the error; ``Killed`` for a process that died, ``Stalled`` for a stalled job."""
    message: str
    hook: str | None = None
    """Hook that raised the error, with channel, function and source line."""
    location: str | None = None
    """File and line of the error."""

    def __str__(self) -> str:
        if self.type == "Stalled":
            return f"the run has stalled, detected by rank {self.rank}: {self.message}"
        where = f", raised in hook {self.hook}" if self.hook else ""
        return f"rank {self.rank} failed first: {self.type}: {self.message}{where}"


class RankFailed(RuntimeError):  # noqa: N818 - says what happened, as RunPreempted does
    """Failure of another rank, which ended this rank.

    The message is that of the other rank's error, see :attr:`failure`. The cause of this exception
    is the consequence on this rank, such as a closed connection.
    """

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure
