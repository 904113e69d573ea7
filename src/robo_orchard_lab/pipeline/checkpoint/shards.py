"""The part of a tensor that one process writes to a file of shards, or takes from such files.

The files are those of torch's distributed checkpoint with its safetensors storage: the header
says where in the whole tensor each one begins. ``torch.distributed.checkpoint.load`` with a
``HuggingFaceStorageReader`` reads them, and ``consolidate_safetensors_files`` joins them. They are
written by the store itself, since torch's writer would copy the shards once more, and tell no
digest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, TypeAlias

import torch

from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.pipeline.checkpoint.tensor_files import (
    FileLayout,
    TensorInfo,
)
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded

_INFO = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"
_SHAPE = "full_shape"
"""Beside what torch writes, which takes the shape from the shards that there are."""


@dataclass(frozen=True, slots=True)
class Region:
    """A box within a tensor: where it begins and how large it is, in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.sizes)

    def within(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape has all of it."""
        return len(shape) == len(self.offsets) and all(
            offset + size <= full
            for offset, size, full in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def overlap(self, other: Region) -> Region | None:
        """What is in both; None for nothing.

        >>> Region((0, 2), (4, 3)).overlap(Region((2, 0), (4, 4)))
        Region(offsets=(2, 2), sizes=(2, 2))
        """
        begins = [max(pair) for pair in zip(self.offsets, other.offsets, strict=True)]
        ends = [min(pair) for pair in zip(self._ends(), other._ends(), strict=True)]
        sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
        return Region(tuple(begins), tuple(sizes)) if all(size > 0 for size in sizes) else None

    def slices_of(self, part: Region) -> tuple[slice, ...]:
        """Where in a tensor of this region a region within it lies."""
        return tuple(
            slice(inner - outer, inner - outer + size)
            for outer, inner, size in zip(self.offsets, part.offsets, part.sizes, strict=True)
        )

    def _ends(self) -> list[int]:
        return [offset + size for offset, size in zip(self.offsets, self.sizes, strict=True)]


@dataclass(frozen=True, slots=True)
class TensorShare:
    """What a process takes of a saved tensor."""

    region: Region
    make: Callable[[torch.Tensor], torch.Tensor]
    """From the values of the region, on the CPU, to what the loaded state is to have."""


ShareOf: TypeAlias = Callable[[str, tuple[int, ...]], TensorShare | None]
"""What to take of a tensor, by its place in a state and its whole shape; None for all of it.

It is asked about what is the job's, and about what was saved in shards."""


@dataclass(frozen=True, slots=True)
class SavedShard:
    """A shard as a file's header tells of it."""

    place: TensorInfo
    region: Region
    shape: tuple[int, ...]
    """Of the whole tensor."""


def local_regions(tensors: Mapping[str, torch.Tensor]) -> dict[str, Region]:
    """What this process has of sharded tensors, as torch's own writer of checkpoints would say it.

    Args:
        tensors: by name; each a ``DTensor``. One that is none of this process's is left out.

    Raises:
        StateError: a process has one in several pieces.
    """
    from torch.distributed.checkpoint.default_planner import create_default_local_save_plan

    regions: dict[str, Region] = {}
    for item in create_default_local_save_plan(dict(tensors), is_coordinator=True).items:
        name, data = item.index.fqn, item.tensor_data
        if data is None or name in regions:
            raise StateError(
                f"{name!r} can be neither saved nor loaded: a process has it in several pieces"
            )
        regions[name] = Region(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return regions


def shards_to_write(
    tensors: Mapping[str, torch.Tensor], processes: int
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What this process writes of sharded tensors, and what its file's header says about it.

    Of what several processes have, one writes. No exchange is made.

    Args:
        tensors: by name; each a ``DTensor``.
        processes: how many save together.

    Raises:
        StateError: one is divided in a way that is not known, or among more processes.
    """
    regions = local_regions(tensors)
    parts: dict[str, torch.Tensor] = {}
    info: dict[str, Any] = {}
    for name, tensor in tensors.items():
        assert is_sharded(tensor)
        mesh = tensor.device_mesh
        if mesh.size() > processes:
            raise StateError(
                f"{name!r} can't be saved: it is divided among {mesh.size()} processes, and "
                f"{processes} of them save; give the Ranks of the job"
            )
        for placement in tensor.placements:
            if not (placement.is_replicate() or placement.is_shard()):
                raise StateError(f"{name!r} can't be saved: it is placed as {placement}")
        if name not in regions or not _is_to_write(tensor, regions[name]):
            continue
        parts[name] = tensor.to_local()
        info[name] = {_OFFSETS: regions[name].offsets, _SHAPE: tuple(tensor.shape)}
    header = {"format": "pt", "DCP_VERSION": "1.0", _INFO: json.dumps(info)}
    return parts, header


def shards_of(layout: FileLayout) -> list[SavedShard]:
    """The shards in a file of that layout.

    Raises:
        CheckpointError: its header does not say where they belong, or speaks of nonsense.
    """
    try:
        found = parse_json(layout.metadata.get(_INFO, "").encode(), max_depth=4)
    except JsonError as error:
        raise CheckpointError(f"it does not tell where its shards belong: {error}") from error
    if not isinstance(found, dict) or set(found) != {place.name for place in layout.places}:
        raise CheckpointError("it does not tell where each of its shards belongs")
    return [_saved_shard(place, found[place.name]) for place in layout.places]


def check_shards(name: str, shards: Sequence[SavedShard]) -> None:
    """Whether shards make up one tensor, each element of it once.

    Raises:
        CheckpointError: they don't.
    """
    kinds = {(shard.shape, shard.place.dtype) for shard in shards}
    if len(kinds) > 1:
        raise CheckpointError(f"the shards of {name!r:.80} are those of different tensors")
    ((shape, _),) = kinds
    regions = [shard.region for shard in shards]
    found = sum(region.count for region in regions)
    if found != math.prod(shape) or not _are_apart(regions):
        raise CheckpointError(
            f"the shards of {name!r:.80} have {found} elements, expected each of the "
            f"{math.prod(shape)} of {list(shape)} once; a process's file is missing, or another's"
        )


def cut(tensor: torch.Tensor, share: TensorShare | None) -> torch.Tensor:
    """A process's share of a whole tensor, in memory of its own; None: the tensor itself."""
    if share is None:
        return tensor
    part = tensor[Region.whole(tensor.shape).slices_of(share.region)]
    return share.make(part.clone(memory_format=torch.contiguous_format))


def _is_to_write(tensor: Any, region: Region) -> bool:
    """Whether this process is the first of those that have the same part, and that is not empty.

    Of a tensor without elements the first process writes its part, by which it is known.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if not tensor.numel():
        return not any(coordinate)
    return bool(region.count) and not any(
        index and placement.is_replicate()
        for index, placement in zip(coordinate, tensor.placements, strict=True)
    )


def _saved_shard(place: TensorInfo, entry: Any) -> SavedShard:
    problem = f"it places the shard {place.name!r:.80} at {entry!r:.120}"
    if not isinstance(entry, dict) or set(entry) != {_OFFSETS, _SHAPE}:
        raise CheckpointError(problem)
    offsets, shape = entry[_OFFSETS], entry[_SHAPE]
    for numbers in (offsets, shape):
        if not isinstance(numbers, list) or len(numbers) != len(place.shape):
            raise CheckpointError(problem)
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise CheckpointError(problem)
    region = Region(tuple(offsets), place.shape)
    if not region.within(shape) or math.prod(shape) >= 2**63:
        raise CheckpointError(problem)
    return SavedShard(place, region, tuple(shape))


def _are_apart(regions: Sequence[Region]) -> bool:
    ordered = sorted(regions, key=lambda region: region.offsets)
    dimensions = range(len(ordered[0].offsets))
    divided = [d for d in dimensions if len({r.offsets[d] for r in ordered}) > 1]
    if len(divided) == 1:  # as almost always; the shards lie in a row
        at = divided[0]
        return all(
            before.offsets[at] + before.sizes[at] <= after.offsets[at]
            for before, after in pairwise(ordered)
        )
    return all(one.overlap(other) is None for one, other in combinations(ordered, 2))


# --- shard reading ---------------------------------------------------------------------------
# Tensors, or a process's shares of them, out of the shards that several processes have saved.


class ShardAssembler:
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
