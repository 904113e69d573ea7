"""Tensors, or a process's shares of them, out of the shards that several processes have saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from robo_orchard_lab.pipeline.checkpoint.shards import (
    Region,
    SavedShard,
    ShareOf,
    TensorShare,
    check_shards,
)
from robo_orchard_lab.pipeline.errors import CheckpointError


class ShardReading:
    """Takes what is wanted out of one file of shards after the other.

    So it takes the memory of the result and of one file.
    """

    def __init__(self, shards: Iterable[SavedShard], share_of: ShareOf | None) -> None:
        """By what the headers of all files say; nothing is allocated yet.

        Raises:
            CheckpointError: the shards of a tensor do not make it up.
        """
        of_tensor: dict[str, list[SavedShard]] = {}
        for shard in shards:
            of_tensor.setdefault(shard.place.name, []).append(shard)
        self._shares: dict[str, TensorShare | None] = {}
        self._regions: dict[str, Region] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, of_one in of_tensor.items():
            check_shards(name, of_one)
            shape = of_one[0].shape
            share = None if share_of is None else share_of(name, shape)
            self._shares[name] = share
            self._regions[name] = Region.whole(shape) if share is None else share.region
            self._dtypes[name] = of_one[0].place.dtype

    @property
    def size(self) -> int:
        """How many bytes the result takes."""
        return sum(
            region.count * self._dtypes[name].itemsize for name, region in self._regions.items()
        )

    def wants(self, shards: Sequence[SavedShard]) -> bool:
        """Whether something of a file with these shards is needed."""
        return any(self._regions[s.place.name].overlap(s.region) for s in shards)

    def add(self, shards: Sequence[SavedShard], read: Mapping[str, torch.Tensor]) -> None:
        """Take what is needed of a file that was read, and verified.

        Raises:
            CheckpointError: it is another one than the shards are of.
        """
        expected = {s.place.name: (s.place.dtype, s.place.shape) for s in shards}
        if {name: (v.dtype, tuple(v.shape)) for name, v in read.items()} != expected:
            raise CheckpointError("a file of shards was changed while it was read")
        for shard in shards:
            name = shard.place.name
            region = self._regions[name]
            both = region.overlap(shard.region)
            if both is not None:
                part = read[name][shard.region.slices_of(both)]
                self._value(name)[region.slices_of(both)] = part

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was wanted, by name."""
        found = {}
        for name, share in self._shares.items():
            value = self._value(name)
            found[name] = value if share is None else share.make(value)
        return found

    def _value(self, name: str) -> torch.Tensor:
        if name not in self._values:
            self._values[name] = torch.empty(self._regions[name].sizes, dtype=self._dtypes[name])
        return self._values[name]
