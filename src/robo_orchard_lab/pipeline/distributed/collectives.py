"""Collectives over host memory, and redistribution of per-rank state to a new world size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed

_cached_group: tuple[Any, Any] | None = None  # world group, and its CPU group


def host_group() -> Any:
    """Return the process group for CPU tensors.

    The first call is a collective if the world group has no CPU backend: all ranks call it at the
    same point.
    """
    global _cached_group
    world = torch.distributed.group.WORLD
    if "cpu:" in torch.distributed.get_backend_config():
        return world
    if _cached_group is None or _cached_group[0] is not world:
        _cached_group = (world, torch.distributed.new_group(backend="gloo"))  # a collective, once
    return _cached_group[1]


def gather_numbers(numbers: list[int]) -> list[list[int]]:
    """Gather equally many numbers from each rank, in rank order; a collective."""
    return GatheredNumbers(numbers).wait()


class GatheredNumbers:
    """Asynchronous gather of equally many numbers from each rank; a collective."""

    def __init__(self, numbers: list[int]) -> None:
        # NumPy arrays: a read from a tensor would count as a device sync.
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
        """Wait, and return the numbers in rank order."""
        self._work.wait()
        found: list[list[int]] = self._rows.tolist()
        return found


def broadcast_object(value: Any, rank: int) -> Any:
    """Broadcast a picklable object from one rank; a collective."""
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=rank, group=host_group())
    return shared[0]


@torch.no_grad()
def broadcast_tensors(tensors: Sequence[torch.Tensor]) -> None:
    """Copy tensors of the first rank to all ranks; one broadcast for each device."""
    groups: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor.detach())
    for group in groups.values():
        flat = torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in group])
        torch.distributed.broadcast(flat, src=0)  # a collective
        for tensor, part in zip(group, flat.split([t.nbytes for t in group]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Gather picklable objects from all ranks, in rank order; a collective.

    Uses :func:`host_group` unless ``group`` is given.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value, group=group or host_group())
    return found


PartT = TypeVar("PartT")
WholeT = TypeVar("WholeT")


def join_by_rank(
    parts: Sequence[PartT], processes: int, join: Callable[[Sequence[PartT]], WholeT]
) -> list[WholeT]:
    """Redistribute the states of saved ranks, in rank order, to a new world size.

    ``join`` merges the states of :func:`parts_for_rank` for one rank.

    >>> join_by_rank(["a", "b", "c"], 2, "".join), join_by_rank(["a"], 2, "".join)
    (['a', 'bc'], ['a', ''])
    """
    return [join(parts_for_rank(parts, rank, processes)) for rank in range(processes)]


def parts_for_rank(parts: Sequence[PartT], rank: int, processes: int) -> Sequence[PartT]:
    """Return the saved parts that a rank takes over at a new world size.

    A rank keeps its own part, the last rank also takes those of all missing ranks, and a new rank
    gets none.

    >>> [parts_for_rank(["a", "b", "c"], rank, 2) for rank in range(2)]
    [['a'], ['b', 'c']]
    >>> [parts_for_rank(["a"], rank, 2) for rank in range(2)]
    [['a'], []]
    """
    return parts[rank:] if rank == processes - 1 else parts[rank : rank + 1]
