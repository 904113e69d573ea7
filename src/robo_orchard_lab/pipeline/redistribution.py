"""What is handed from the ranks of one job to those of another that are more, or fewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

PartT = TypeVar("PartT")
WholeT = TypeVar("WholeT")


def joined_by_rank(
    parts: Sequence[PartT], processes: int, join: Callable[[Sequence[PartT]], WholeT]
) -> list[WholeT]:
    """What each rank of a job goes on from, of what the ranks of another one had.

    Args:
        parts: of the ranks that there were, in their order.
        processes: how many ranks there are.
        join: makes one of those that a rank takes over, see :func:`parts_for_rank`; of none for a
            rank that was not there.

    >>> joined_by_rank(["a", "b", "c"], 2, "".join), joined_by_rank(["a"], 2, "".join)
    (['a', 'bc'], ['a', ''])
    """
    return [join(parts_for_rank(parts, rank, processes)) for rank in range(processes)]


def parts_for_rank(parts: Sequence[PartT], rank: int, processes: int) -> Sequence[PartT]:
    """Which parts of a whole a rank takes over, so that each is somewhere, once.

    A rank has its own; the last has those of all ranks that are no more, and a rank that was not
    there has none.

    >>> [parts_for_rank(["a", "b", "c"], rank, 2) for rank in range(2)]
    [['a'], ['b', 'c']]
    >>> [parts_for_rank(["a"], rank, 2) for rank in range(2)]
    [['a'], []]
    """
    return parts[rank:] if rank == processes - 1 else parts[rank : rank + 1]
