"""Shards of tensors: saving a process's shards, and assembling tensors or shares from files.

Files of shards have the safetensors layout of torch's distributed checkpoint, whose
``HuggingFaceStorageReader`` reads them and ``consolidate_safetensors_files`` joins them. Torch's
writer would copy the shards once more, and computes no digest.

A *share* is the region of a saved tensor that one process loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.pipeline.checkpoint.tensor_files import FileLayout, TensorInfo
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded

_INFO = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"
_SHAPE = "full_shape"  # our addition: torch infers the shape from the shards


@dataclass(frozen=True, slots=True)
class Region:
    """Box within a tensor: offset and size in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Return the region of a complete tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def is_within(self, shape: Sequence[int]) -> bool:
        """Return True if a tensor of this shape contains the region."""
        return len(shape) == len(self.offsets) and all(
            end <= full for end, full in zip(self._ends(), shape, strict=True)
        )

    def overlap(self, other: Region) -> Region | None:
        """Return the intersection, or None if the regions are disjoint.

        >>> Region((0, 2), (4, 3)).overlap(Region((2, 0), (4, 4)))
        Region(offsets=(2, 2), sizes=(2, 2))
        """
        begins = [max(pair) for pair in zip(self.offsets, other.offsets, strict=True)]
        ends = [min(pair) for pair in zip(self._ends(), other._ends(), strict=True)]
        sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
        return Region(tuple(begins), tuple(sizes)) if all(size > 0 for size in sizes) else None

    def slices_of(self, part: Region) -> tuple[slice, ...]:
        """Return the slices of a contained region, relative to this region."""
        return tuple(
            slice(inner - outer, inner - outer + size)
            for outer, inner, size in zip(self.offsets, part.offsets, part.sizes, strict=True)
        )

    def _ends(self) -> list[int]:
        return [offset + size for offset, size in zip(self.offsets, self.sizes, strict=True)]


@dataclass(frozen=True, slots=True)
class TensorShare:
    """Region of a saved tensor for a process to load, and its conversion."""

    region: Region
    make: Callable[[torch.Tensor], torch.Tensor]
    """Converts the region's values, on the CPU, to the loaded tensor."""


ShareOf: TypeAlias = Callable[[str, tuple[int, ...]], TensorShare | None]
"""Function of a tensor's name and full shape; returns the share to load, or None for all of it.

Called for tensors of the job and for tensors saved in shards."""


@dataclass(frozen=True, slots=True)
class SavedShard:
    """Shard in a file, from the file's header."""

    info: TensorInfo
    region: Region
    shape: tuple[int, ...]
    """Shape of the complete tensor."""


def local_regions(tensors: Mapping[str, torch.Tensor]) -> dict[str, Region]:
    """Return this process's region of each ``DTensor``, if not empty, by torch's own planner.

    Raises:
        StateError: this process holds a tensor in several pieces.
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
    tensors: Mapping[str, torch.Tensor], world_size: int
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the shards of ``DTensor``s for this process to write, and their file's metadata.

    Of replicated shards, the first process writes. No collective.

    Raises:
        StateError: a tensor has an unsupported placement, or is sharded over more processes.
    """
    regions = local_regions(tensors)
    parts: dict[str, torch.Tensor] = {}
    info: dict[str, Any] = {}
    for name, tensor in tensors.items():
        assert is_sharded(tensor)
        mesh = tensor.device_mesh
        if mesh.size() > world_size:
            raise StateError(
                f"{name!r} can't be saved: it is sharded over {mesh.size()} processes, and "
                f"{world_size} of them save; pass the Ranks of the job"
            )
        for placement in tensor.placements:
            if not (placement.is_replicate() or placement.is_shard()):
                raise StateError(f"{name!r} can't be saved: it is placed as {placement}")
        if name not in regions or not _should_write(tensor, regions[name]):
            continue
        parts[name] = tensor.to_local()
        info[name] = {_OFFSETS: regions[name].offsets, _SHAPE: tuple(tensor.shape)}
    header = {"format": "pt", "DCP_VERSION": "1.0", _INFO: json.dumps(info)}
    return parts, header


def shards_of(layout: FileLayout) -> list[SavedShard]:
    """Return the shards in a file, or raise CheckpointError for an invalid header."""
    try:
        found = parse_json(layout.metadata.get(_INFO, "").encode(), max_depth=4)
    except JsonError as error:
        raise CheckpointError(f"its header has no valid {_INFO}: {error}") from error
    if not isinstance(found, dict) or set(found) != {info.name for info in layout.tensors}:
        raise CheckpointError(f"{_INFO} in its header does not list the tensors of the file")
    return [_saved_shard(info, found[info.name]) for info in layout.tensors]


def cut(tensor: torch.Tensor, share: TensorShare | None) -> torch.Tensor:
    """Copy a process's share out of a complete tensor; without a share, return the tensor."""
    if share is None:
        return tensor
    part = tensor[Region.whole(tensor.shape).slices_of(share.region)]
    return share.make(part.clone(memory_format=torch.contiguous_format))


class ShardAssembler:
    """Assembler of tensors, or of their shares, from files of shards, one file at a time."""

    def __init__(self, shards: Iterable[SavedShard], share_of: ShareOf | None) -> None:
        """Raise CheckpointError unless shards cover each tensor once; allocate nothing yet."""
        of_tensor: dict[str, list[SavedShard]] = {}
        for shard in shards:
            of_tensor.setdefault(shard.info.name, []).append(shard)
        self._shares: dict[str, TensorShare | None] = {}
        self._regions: dict[str, Region] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, of_one in of_tensor.items():
            _check_shards(name, of_one)
            shape = of_one[0].shape
            share = None if share_of is None else share_of(name, shape)
            self._shares[name] = share
            self._regions[name] = Region.whole(shape) if share is None else share.region
            self._dtypes[name] = of_one[0].info.dtype

    @property
    def size(self) -> int:
        """Size of the result in bytes."""
        return sum(
            region.numel * self._dtypes[name].itemsize for name, region in self._regions.items()
        )

    def needs(self, shards: Sequence[SavedShard]) -> bool:
        """Return True if the result needs any of these shards."""
        return any(self._regions[s.info.name].overlap(s.region) for s in shards)

    def add(self, shards: Sequence[SavedShard], tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the needed regions of a verified file."""
        expected = {s.info.name: (s.info.dtype, s.info.shape) for s in shards}
        if {name: (v.dtype, tuple(v.shape)) for name, v in tensors.items()} != expected:
            raise CheckpointError("a file of shards was changed while it was read")
        for shard in shards:
            name = shard.info.name
            region = self._regions[name]
            both = region.overlap(shard.region)
            if both is not None:
                part = tensors[name][shard.region.slices_of(both)]
                self._value(name)[region.slices_of(both)] = part

    def tensors(self, values: bool = True) -> dict[str, torch.Tensor]:
        """Return the assembled tensors by name; meta tensors without ``values``."""
        found = {}
        for name, share in self._shares.items():
            if not values:
                region, dtype = self._regions[name], self._dtypes[name]
                found[name] = torch.empty(region.sizes, dtype=dtype, device="meta")
                continue
            value = self._value(name)
            found[name] = value if share is None else share.make(value)
        return found

    def _value(self, name: str) -> torch.Tensor:
        if name not in self._values:
            self._values[name] = torch.empty(self._regions[name].sizes, dtype=self._dtypes[name])
        return self._values[name]


def _check_shards(name: str, shards: Sequence[SavedShard]) -> None:
    kinds = {(shard.shape, shard.info.dtype) for shard in shards}
    if len(kinds) > 1:
        raise CheckpointError(f"the shards of {name!r:.80} are those of different tensors")
    ((shape, _),) = kinds
    regions = [shard.region for shard in shards]
    found = sum(region.numel for region in regions)
    if found != math.prod(shape) or not _are_disjoint(regions):
        raise CheckpointError(
            f"the shards of {name!r:.80} have {found} elements, expected each of the "
            f"{math.prod(shape)} of {list(shape)} once; a file is missing or of another save"
        )


def _should_write(tensor: Any, region: Region) -> bool:
    """Return True on the first process with a non-empty region."""
    coordinate = tensor.device_mesh.get_coordinate()
    if not tensor.numel():  # an empty shard records the tensor
        return not any(coordinate)
    return bool(region.numel) and not any(
        index and placement.is_replicate()
        for index, placement in zip(coordinate, tensor.placements, strict=True)
    )


def _saved_shard(info: TensorInfo, entry: Any) -> SavedShard:
    problem = f"its header places the shard {info.name!r:.80} at {entry!r:.120}"
    if not isinstance(entry, dict) or set(entry) != {_OFFSETS, _SHAPE}:
        raise CheckpointError(problem)
    offsets, shape = entry[_OFFSETS], entry[_SHAPE]
    for numbers in (offsets, shape):
        if not isinstance(numbers, list) or len(numbers) != len(info.shape):
            raise CheckpointError(problem)
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise CheckpointError(problem)
    region = Region(tuple(offsets), info.shape)
    if not region.is_within(shape) or math.prod(shape) >= 2**63:
        raise CheckpointError(problem)
    return SavedShard(info, region, tuple(shape))


def _are_disjoint(regions: Sequence[Region]) -> bool:
    """Return True for regions that are cells of a grid, as of every ``DTensor``, each once."""
    filled = [region for region in regions if region.numel]
    offsets = {region.offsets for region in filled}
    steps = [dict(pairwise(sorted({*of_one}))) for of_one in zip(*offsets, strict=True)]
    return len(offsets) == len(filled) and all(
        next_offsets.get(offset, offset + size) >= offset + size
        for region in filled
        for next_offsets, offset, size in zip(steps, region.offsets, region.sizes, strict=True)
    )
