"""What is handed from the ranks of one job to those of another that are more, or fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

PartT = TypeVar("PartT")


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
