"""What is handed from the ranks of one job to those of another that are more, or fewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed

# --- host group ------------------------------------------------------------------------------
# The processes of the job, connected for what lies in the host's memory.


_made: tuple[Any, Any] | None = None


def host_group() -> Any:
    """The process group to exchange CPU tensors by, so that no device is waited for.

    Made once for a job, where the job's own group has no CPU backend: a collective, so that all
    ranks have to ask for it first at the same place.
    """
    global _made
    world = torch.distributed.group.WORLD
    if "cpu:" in torch.distributed.get_backend_config():
        return world
    if _made is None or _made[0] is not world:
        _made = (world, torch.distributed.new_group(backend="gloo"))  # a collective, once
    return _made[1]


def gather_numbers(numbers: list[int]) -> list[list[int]]:
    """The numbers of each rank, as many on all of them, in the order of the ranks: a collective."""
    return GatheredNumbers(numbers).wait()


class GatheredNumbers:
    """The numbers of each rank, as many on all of them, on their way: a collective."""

    def __init__(self, numbers: list[int]) -> None:
        # Arrays, since no tensor is to be read from: that would look like waiting for a device.
        self._own = np.array(numbers, dtype=np.int64)
        shape = torch.distributed.get_world_size(), len(numbers)
        self._rows = np.empty(shape, dtype=np.int64)
        self._work = torch.distributed.all_gather(
            [torch.from_numpy(row) for row in self._rows],
            torch.from_numpy(self._own),
            group=host_group(),
            async_op=True,
        )

    def wait(self) -> list[list[int]]:
        """All of them, in the order of the ranks."""
        self._work.wait()
        found: list[list[int]] = self._rows.tolist()
        return found


def broadcast_object(value: Any, rank: int) -> Any:
    """What a rank gives, to all ranks; pickled on its way: a collective."""
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=rank, group=host_group())
    return shared[0]


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """What each rank gave, in the order of the ranks; pickled on its way: a collective.

    By default of :func:`host_group`; ``group`` is another one of all ranks.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value, group=group or host_group())
    return found


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
