"""Where tensors lie in a safetensors file.

A file is the length of the header as 8 bytes, little-endian; the header, which is JSON; and the
tensors' bytes, each after the other without a gap.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.pipeline.checkpoint.manifest import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.state import RESERVED_NAME
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

LENGTH_BYTES = 8
_ALIGNMENT = 64  # of the first tensor, in the file and so in memory
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's name, kind, and the bytes that it takes, counted from the header's end."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def of(self, data: memoryview) -> torch.Tensor:
        """The tensor in ``data``, which are the bytes after the header.

        Its storage begins and ends with it, as ``torch.Generator.set_state`` takes for granted.
        """
        count = (self.end - self.begin) // self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        found = torch.frombuffer(data, dtype=self.dtype, count=count, offset=self.begin)
        return found.view(self.shape)


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The places of a file's tensors, in the order of their names, and its beginning."""

    places: list[TensorInfo]
    beginning: bytes
    """The header and its length."""
    metadata: Mapping[str, str]
    """What the header says about the file."""

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return len(self.beginning) + max((place.end for place in self.places), default=0)

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> FileLayout:
        """The layout of a file with these tensors, the wide types first, so that all are aligned.

        Raises:
            StateError: one is of a kind that a file can't have; the message names it.
        """
        cls.check_kinds(tensors)
        ends: dict[str, tuple[int, int]] = {}
        offset = 0
        for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
            ends[name] = (offset, offset + tensors[name].numel() * tensors[name].element_size())
            offset = ends[name][1]
        places = [
            TensorInfo(name, tensor.dtype, tuple(tensor.shape), *ends[name])
            for name, tensor in tensors.items()
        ]
        about = {"format": "pt"} if metadata is None else dict(metadata)
        header = json.dumps(
            {
                RESERVED_NAME: about,
                **{
                    place.name: {
                        "dtype": _NAMES[place.dtype],
                        "shape": place.shape,
                        "data_offsets": (place.begin, place.end),
                    }
                    for place in places
                },
            },
            separators=(",", ":"),
        ).encode()
        header += b" " * (-(LENGTH_BYTES + len(header)) % _ALIGNMENT)
        return cls(places, len(header).to_bytes(LENGTH_BYTES, "little") + header, about)

    @staticmethod
    def check_kinds(tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors that a file can't have.

        Raises:
            StateError: the message names one.
        """
        for name, tensor in tensors.items():
            _check_kind(name, tensor)

    @classmethod
    def parse(cls, file: memoryview, limits: ReadLimits) -> FileLayout:
        """The layout of a file whose bytes these are.

        Raises:
            CheckpointError: the header has more than ``limits`` allow, is not one, or speaks of
                other bytes than there are.
        """
        length = cls.beginning_length(file[:LENGTH_BYTES], len(file), limits)
        return cls.parse_beginning(bytes(file[:length]), len(file), limits)

    @staticmethod
    def beginning_length(begin: bytes | memoryview, size: int, limits: ReadLimits) -> int:
        """How many bytes a file's header takes with its length, by the first 8 of all ``size``.

        Raises:
            CheckpointError: there are less, more than ``limits`` allow, or more than the file has.
        """
        if len(begin) < LENGTH_BYTES:
            raise CheckpointError(f"expected a header's length of 8 bytes, found {size} bytes")
        length = int.from_bytes(begin, "little")
        if length > limits.max_header_bytes:
            raise CheckpointError(
                f"its header has {length} bytes; at most {limits.max_header_bytes} are read"
            )
        if length > size - LENGTH_BYTES:
            raise CheckpointError(f"its header has {length} bytes, more than the file")
        return LENGTH_BYTES + length

    @classmethod
    def parse_beginning(cls, beginning: bytes, size: int, limits: ReadLimits) -> FileLayout:
        """The layout of a file of so many bytes, which begins like this.

        Raises:
            CheckpointError: see :meth:`parse`.
        """
        try:
            header = parse_json(beginning[LENGTH_BYTES:], max_depth=3)
        except JsonError as error:
            raise CheckpointError(f"its header can't be read: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError("its header is not a JSON object")
        metadata = _metadata(header.pop(RESERVED_NAME, {}))
        if len(header) > limits.max_tensors:
            raise CheckpointError(
                f"it has {len(header)} tensors; at most {limits.max_tensors} are read"
            )
        places = [_place(name, entry) for name, entry in header.items()]
        _check_places(places, begin=len(beginning), end=size)
        return cls(places, beginning, metadata)


def _check_kind(name: str, tensor: torch.Tensor) -> None:
    problem = None
    if name == RESERVED_NAME:
        problem = "safetensors has that name for itself"
    elif tensor.is_meta:
        problem = "it is a meta tensor, without values"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        problem = f"its layout is {tensor.layout}, expected a dense one; try .to_dense()"
    elif type(tensor) is not torch.Tensor:
        problem = f"it is a {type(tensor).__qualname__}, expected a plain tensor"
    elif tensor.dtype not in _NAMES:
        problem = f"its dtype is {tensor.dtype}, which safetensors does not have"
    if problem:
        raise StateError(f"{name!r} can't be saved: {problem}")


def _metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise CheckpointError("its header's metadata is not a mapping of texts")
    return metadata


def _place(name: str, entry: Any) -> TensorInfo:
    """The place that an entry of the header speaks of, checked by itself."""
    problem = f"the tensor {name!r:.80} has a wrong entry in the header: "
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(problem + "expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(problem + f"unknown dtype {entry['dtype']!r:.40}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(problem + f"shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(problem + f"data_offsets {offsets!r:.80}")
    if math.prod(size for size in shape if size) > _MAX_SIZE:
        raise CheckpointError(problem + f"shape {shape!r:.80}")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(
            problem + f"shape {shape!r:.80} of {dtype} does not take the bytes {offsets!r:.80}"
        )
    return TensorInfo(name, dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _MAX_SIZE for v in value)


def _check_places(places: list[TensorInfo], begin: int, end: int) -> None:
    """Whether the tensors cover the file's bytes from ``begin`` to ``end``, each of them once."""
    covered = 0
    for place in sorted(places, key=lambda place: (place.begin, place.end)):
        if place.begin != covered:
            raise CheckpointError(
                f"the tensor {place.name!r:.80} begins at byte {place.begin}, "
                f"the one before it ends at {covered}"
            )
        if (begin + place.begin) % place.dtype.itemsize:
            raise CheckpointError(f"the tensor {place.name!r:.80} is not aligned in the file")
        covered = place.end
    if covered != end - begin:
        raise CheckpointError(
            f"its tensors take {covered} bytes, the file has {end - begin} for them"
        )


# --- memory blocks ---------------------------------------------------------------------------
# Large blocks of memory that are quick to come by.


# Smaller ones are not worth a mapping of their own.
_MAPPED_FROM = 1 << 20


def allocate_buffer(size: int) -> torch.Tensor:
    """``size`` bytes on the CPU, of any content.

    A large one asks the system for large pages: writing to it for the first time is four times as
    fast as in pages of 4 KiB (307 MB: 23 ms in place of 100 ms).
    """
    if size < _MAPPED_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):  # which Linux has
        return torch.empty(size, dtype=torch.uint8)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)  # unmapped when no tensor refers to it


def buffer_view(block: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes on the CPU, itself."""
    return block.numpy().data


_ALIGNMENT = 4096  # of each file, so that it can be written past the system's cache

_Signature = tuple[dict[str, str] | None, tuple[tuple[str, torch.dtype, torch.Size], ...]]


class StagingBuffer:
    """A block of memory in which files of tensors lie side by side."""

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        """Room for ``size`` bytes, see :meth:`size_of`; pinned for copies from a CUDA device."""
        self._block = (
            torch.empty(size, dtype=torch.uint8, pin_memory=True)
            if pinned
            else allocate_buffer(size)
        )
        self._layouts: list[FileLayout] = []
        self._files: list[memoryview] = []
        self._targets: list[torch.Tensor] = []

    @property
    def size(self) -> int:
        """How many bytes it has room for."""
        return self._block.numel()

    @staticmethod
    def size_of(layouts: Sequence[FileLayout]) -> int:
        """How many bytes such files take at most."""
        return sum(layout.size + _ALIGNMENT for layout in layouts)

    def fill(
        self, files: Sequence[tuple[FileLayout, Mapping[str, torch.Tensor]]]
    ) -> list[memoryview]:
        """Copy tensors of any device into it, and wait for that: the contents of each file."""
        layouts = [layout for layout, _ in files]
        if [*map(id, layouts)] != [*map(id, self._layouts)]:
            self._lay_out(layouts)
        sources = [tensors[place.name] for layout, tensors in files for place in layout.places]
        _copy_all(self._targets, sources)
        return self._files

    def _lay_out(self, layouts: list[FileLayout]) -> None:
        self._layouts, self._files, self._targets = layouts, [], []
        offset = -self._block.data_ptr() % _ALIGNMENT
        for layout in layouts:
            image = buffer_view(self._block[offset : offset + layout.size])
            image[: len(layout.beginning)] = layout.beginning
            data = image[len(layout.beginning) :]
            self._targets += [place.of(data) for place in layout.places]
            self._files.append(image)
            offset += layout.size + (-layout.size % _ALIGNMENT)


class StagingPool:
    """Images that are used again, so that a copy into them costs the copy and no new memory.

    A state of the same names, types and shapes as the last one is not laid out anew, either.

    Args:
        pinned: have them pinned where tensors are on CUDA devices, which then copy into them at
            full speed. It takes long to make such a one.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._from_devices = False
        self._free: list[StagingBuffer] = []
        self._layouts: dict[str, tuple[_Signature, FileLayout]] = {}
        self._lock = Lock()

    def layout(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        metadata: dict[str, str] | None = None,
    ) -> FileLayout:
        """The layout of the file of that name, with these tensors and this in its header.

        Raises:
            StateError: one is of a kind that a file can't have; the message names it.
        """
        self._from_devices = self._from_devices or any(map(_is_on_device, tensors.values()))
        kinds = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        signature = (metadata, kinds)
        known = self._layouts.get(name)
        if known is not None and known[0] == signature:
            FileLayout.check_kinds(tensors)
            return known[1]
        layout = FileLayout.of(tensors, metadata)
        self._layouts[name] = (signature, layout)
        return layout

    def take(self, layouts: Sequence[FileLayout]) -> StagingBuffer:
        """An image with room for these files, to be given back."""
        size = StagingBuffer.size_of(layouts)
        with self._lock:
            fitting = [image for image in self._free if image.size >= size]
            if fitting:
                found = min(fitting, key=lambda image: image.size)
                self._free.remove(found)
                return found
            self._free.clear()  # too small for what is saved now
        # A state that grows a little fits next time.
        return StagingBuffer(size + size // 32, pinned=self._pinned and self._from_devices)

    def give_back(self, image: StagingBuffer) -> None:
        """Keep an image for the next who asks."""
        with self._lock:
            self._free.append(image)

    def clear(self) -> None:
        """Give up all memory that nobody uses."""
        with self._lock:
            self._free.clear()


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    devices = set()
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            on_device = source.device.type != "cpu"
            target.copy_(source, non_blocking=on_device)
            if on_device:
                devices.add(source.device)
    for device in devices:
        torch.accelerator.synchronize(device)  # waits for the copies


def _is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda
