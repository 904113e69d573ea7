"""The processes that save and load a checkpoint together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.distributed.failures import failed_elsewhere
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError, StoreLockedError

T = TypeVar("T")

# What every rank raises when one of them does, so that one `except` does for all.
_KINDS = {
    kind.__name__: kind for kind in (StateError, CheckpointError, StoreLockedError, FileExistsError)
}


class Ranks:
    """Which process of how many this one is, and how they tell one another what they did.

    They exchange by groups of their own, over the CPU, so that a thread may save while the
    training goes on exchanging: one group is used by the calls that make the caller wait, one by
    :meth:`PendingSave.commit`. :meth:`close` gives them back; as a context manager, it does so.

    >>> Ranks.alone()
    Ranks(index=0, count=1)
    """

    def __init__(self, index: int, count: int, group: Any = None) -> None:
        self.index = index
        self.count = count
        self._group = group
        self.background = self

    @classmethod
    def alone(cls) -> Ranks:
        """This process, whatever others there are."""
        return cls(0, 1)

    @classmethod
    def of_job(cls, timeout_s: float = 1800.0, *, in_background: bool = True) -> Ranks:
        """All processes of the job that ``torch.distributed`` was set up for; else this one.

        A collective: every process calls it. They have to see one file system.

        Args:
            timeout_s: how long one waits for the others, as for a slow disk of theirs.
            in_background: whether a thread is to commit beside other calls.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()

        def with_group() -> Ranks:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            return cls(dist.get_rank(), dist.get_world_size(), group)

        ranks = with_group()
        if in_background:
            ranks.background = with_group()
        return ranks

    def close(self) -> None:
        """Give back the threads and connections of the groups; a second call does nothing.

        Every process does it, when all exchanges are over.
        """
        for ranks in (self, self.background):
            group, ranks._group = ranks._group, None
            if group is not None:
                dist.destroy_process_group(group)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Ranks(index={self.index}, count={self.count})"

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, in their order: a collective.

        Raises:
            CheckpointError: another process is gone, or does not come.
        """
        if self.count == 1:
            return [value]
        assert self._group is not None  # else it is closed
        try:
            return gather_objects(value, self._group)
        except RuntimeError as error:
            raise CheckpointError(f"another process of the job does not answer: {error}") from error

    def run_on_all(self, what: str, work: Callable[[], T]) -> list[T]:
        """Do something on every rank: what all of them returned, or an error on all: a collective.

        Args:
            what: is in progress, for the error.
            work: returns something small.

        Raises:
            CheckpointError: it failed on some rank; the one with the error has it as the cause.
                Where it is one of :data:`_KINDS`, all raise that.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        told = self.gather((result, None if failure is None else _told(failure)))
        if failure is not None:
            _raise(what, failure)
        for index, (_, problem) in enumerate(told):
            if problem is not None:
                kind, text = problem
                failed = _KINDS.get(kind, CheckpointError)
                raise failed_elsewhere(failed(f"{what} failed on rank {index}: {text}"))
        return [result for result, _ in told]

    def run_on_first(self, what: str, work: Callable[[], T]) -> T:
        """Do something on the first rank: what it returned, or an error on all: a collective."""

        def only_there() -> T | None:
            return work() if self.index == 0 else None

        result: Any = self.run_on_all(what, only_there)[0]
        return result  # type: ignore[no-any-return]  # of the first rank, which did the work


def _told(error: Exception) -> tuple[str, str]:
    return type(error).__name__, f"{type(error).__name__}: {error}"


def _raise(what: str, error: Exception) -> NoReturn:
    """The error as the caller knows it."""
    if isinstance(error, OSError) and not isinstance(error, FileExistsError):
        raise CheckpointError(f"{what} failed: {error}") from error
    raise error
