"""Ranks for saving and loading a checkpoint together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.distributed.failures import mark_remote_failure
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError, StoreLockedError

T = TypeVar("T")

# Errors that all ranks raise if one rank does, so that one `except` suffices.
_KINDS = {
    kind.__name__: kind for kind in (StateError, CheckpointError, StoreLockedError, FileExistsError)
}


class Ranks:
    """Process index and world size, with gloo groups to exchange results and errors.

    One group serves blocking calls, another one :meth:`PendingSave.commit`, so that a thread can
    save while training communicates.

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
        """Return this process as the only rank."""
        return cls(0, 1)

    @classmethod
    def of_job(cls, timeout_s: float = 1800.0, *, in_background: bool = True) -> Ranks:
        """Return all processes of ``torch.distributed``, or this process alone. A collective.

        All processes must share a file system.

        Args:
            timeout_s: maximum wait for other ranks, for example for their disks.
            in_background: create a second group, for commits in a thread.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()

        timeout = timedelta(seconds=timeout_s)
        groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(1 + in_background)]
        ranks = [cls(dist.get_rank(), dist.get_world_size(), group) for group in groups]
        ranks[0].background = ranks[-1]
        return ranks[0]

    def close(self) -> None:
        """Destroy the groups, on every process after all exchanges; a second call does nothing."""
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
        """Gather the values of all ranks, in their order. A collective.

        Raises:
            CheckpointError: another rank died or timed out.
        """
        if self.count == 1:
            return [value]
        assert self._group is not None  # else it is closed
        try:
            return gather_objects(value, self._group)
        except RuntimeError as error:
            raise CheckpointError(f"another process of the job does not answer: {error}") from error

    def run_on_all(self, what: str, work: Callable[[], T]) -> list[T]:
        """Run a function on every rank; return all results or raise on all. A collective.

        Args:
            what: description for errors, such as "saving step 3".
            work: function with a small result.

        Raises:
            CheckpointError: the function failed on some rank, and its error is the cause on that
                rank. Errors in :data:`_KINDS` keep their type.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        report = None if failure is None else (type(failure).__name__, str(failure))
        reports = self.gather((result, report))
        if isinstance(failure, OSError) and not isinstance(failure, FileExistsError):
            raise CheckpointError(f"{what} failed: {failure}") from failure
        if failure is not None:
            raise failure
        for index, (_, problem) in enumerate(reports):
            if problem is not None:
                kind, text = problem
                error_type = _KINDS.get(kind, CheckpointError)
                raise mark_remote_failure(
                    error_type(f"{what} failed on rank {index}: {kind}: {text}")
                )
        return [result for result, _ in reports]

    def run_on_first(self, what: str, work: Callable[[], T]) -> T:
        """Run a function on the first rank; return its result or raise on all. A collective."""
        result: Any = self.run_on_all(what, lambda: work() if self.index == 0 else None)[0]
        return result  # type: ignore[no-any-return]  # the first rank did the work
