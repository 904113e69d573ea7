"""Safetensors files in memory: layout, parsing and staging buffers.

A safetensors file is the length of the header as 8 bytes, little-endian; the header, in JSON; and
the bytes of the tensors, without gaps.

The safetensors package (0.8.0) does not serve: its reader accepts 553 of the 1,400 hostile files of
the tests (duplicate names, misaligned tensors, bool bytes above 1), and its writer copies into new
memory, which takes several times as long, and neither computes a digest nor flushes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch

from robo_orchard_core.utils.strict_json import JsonError, json_values, parse_json
from robo_orchard_lab.pipeline.checkpoint.manifest import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.state_tree import RESERVED_NAME
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError

# --- layout ----------------------------------------------------------------------------------

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
_MAX_HEADER_VALUES = 32  # per tensor: names, offsets and up to 8 dimensions, with room
_MAX_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, dtype, shape and byte range of a tensor, counted from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, data: memoryview) -> torch.Tensor:
        """View the tensor in ``data``, the bytes after the header."""
        # The storage has exactly the tensor's bytes, as torch.Generator.set_state requires.
        count = (self.end - self.begin) // self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        found = torch.frombuffer(data, dtype=self.dtype, count=count, offset=self.begin)
        return found.view(self.shape)


@dataclass(frozen=True)
class FileLayout:
    """Layout of a safetensors file: its header and its tensors."""

    tensors: list[TensorInfo]
    """Tensors in the order of the header."""
    header: bytes
    """Length and JSON of the header."""
    metadata: Mapping[str, str]

    @cached_property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + max((tensor.end for tensor in self.tensors), default=0)

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> FileLayout:
        """Lay out a file for tensors; wide dtypes come first, for alignment.

        Raises:
            StateError: safetensors can't hold a tensor; the message names the tensor.
        """
        _check_kinds(tensors)
        ranges: dict[str, tuple[int, int]] = {}
        offset = 0
        for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
            ranges[name] = (offset, offset + tensors[name].numel() * tensors[name].element_size())
            offset = ranges[name][1]
        infos = [
            TensorInfo(name, tensor.dtype, tuple(tensor.shape), *ranges[name])
            for name, tensor in tensors.items()
        ]
        metadata = {"format": "pt"} if metadata is None else dict(metadata)
        entries = {
            info.name: {
                "dtype": _NAMES[info.dtype],
                "shape": info.shape,
                "data_offsets": (info.begin, info.end),
            }
            for info in infos
        }
        header = json.dumps({RESERVED_NAME: metadata, **entries}, separators=(",", ":")).encode()
        header += b" " * (-(LENGTH_BYTES + len(header)) % _ALIGNMENT)
        return cls(infos, len(header).to_bytes(LENGTH_BYTES, "little") + header, metadata)

    @classmethod
    def parse(cls, begin: memoryview, size: int, limits: ReadLimits) -> FileLayout:
        """Parse the header of a file of ``size`` bytes; ``begin`` holds at least the header.

        Raises:
            CheckpointError: the header is invalid, exceeds ``limits``, or does not fit the file.
        """
        header = bytes(begin[: cls.header_length(begin[:LENGTH_BYTES], size, limits)])
        max_tensor_count(header, limits)
        try:
            document = parse_json(header[LENGTH_BYTES:], max_depth=3)
        except JsonError as error:
            raise CheckpointError(f"its header can't be read: {error}") from error
        if not isinstance(document, dict):
            raise CheckpointError("its header is not a JSON object")
        metadata = document.pop(RESERVED_NAME, {})
        if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
            raise CheckpointError("its header's metadata is not a mapping of strings")
        if len(document) > limits.max_tensors:
            raise CheckpointError(
                f"it has {len(document)} tensors; at most {limits.max_tensors} are read"
            )
        tensors = [_tensor_info(name, entry) for name, entry in document.items()]
        _check_ranges(tensors, begin=len(header), end=size)
        return cls(tensors, header, metadata)

    @staticmethod
    def header_length(begin: bytes | memoryview, size: int, limits: ReadLimits) -> int:
        """Return the length of a header, with its 8 length bytes in ``begin``.

        Raises:
            CheckpointError: the length exceeds ``limits`` or the ``size`` of the file in bytes.
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


def max_tensor_count(header: bytes | memoryview, limits: ReadLimits) -> int:
    """Return an upper bound of the tensors in a header, without parsing.

    Raises:
        CheckpointError: the bound exceeds ``limits``.
    """
    text = bytes(header)
    count = text.count(b"{") - 1 - text.count(b'"__metadata__":{')
    values = json_values(text)
    # A file of shards lists each tensor twice.
    if count > 2 * limits.max_tensors or values > _MAX_HEADER_VALUES * (limits.max_tensors + 1):
        raise CheckpointError(f"it has {count} tensors; at most {limits.max_tensors} are read")
    return max(count, 0)


def _check_kinds(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise StateError if safetensors can't hold a tensor."""
    for name, tensor in tensors.items():
        if name == RESERVED_NAME:
            problem = "safetensors reserves the name"
        elif tensor.is_meta:
            problem = "it is a meta tensor, without values"
        elif tensor.layout is not torch.strided or tensor.is_nested:
            problem = f"its layout is {tensor.layout}, expected a dense one; try .to_dense()"
        elif type(tensor) is not torch.Tensor:
            problem = f"it is a {type(tensor).__qualname__}, expected a plain tensor"
        elif tensor.dtype not in _NAMES:
            problem = f"its dtype is {tensor.dtype}, which safetensors does not have"
        else:
            continue
        raise StateError(f"{name!r} can't be saved: {problem}")


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    """Check an entry of the header by itself."""
    problem = f"the tensor {name!r:.80} has an invalid entry in the header: "
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
            problem + f"shape {shape!r:.80} of {dtype} does not match the bytes {offsets!r:.80}"
        )
    return TensorInfo(name, dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _MAX_SIZE for v in value)


def _check_ranges(tensors: list[TensorInfo], begin: int, end: int) -> None:
    """Raise CheckpointError unless tensors cover the bytes from ``begin`` to ``end`` once."""
    covered = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != covered:
            raise CheckpointError(
                f"the tensor {tensor.name!r:.80} begins at byte {tensor.begin}, "
                f"expected byte {covered}, the end of the previous tensor"
            )
        if (begin + tensor.begin) % tensor.dtype.itemsize:
            raise CheckpointError(f"the tensor {tensor.name!r:.80} is not aligned in the file")
        covered = tensor.end
    if covered != end - begin:
        raise CheckpointError(
            f"its tensors have {covered} bytes, expected {end - begin}, the rest of the file"
        )


# --- finite values ---------------------------------------------------------------------------


def non_finite_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors with NaN or infinite values; a device sync.

    Reads each tensor once, by its sum, which is six times as fast as ``isfinite``.
    """
    floating = {n: t for n, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    if not floating:
        return []
    sums = [_float_sum(tensor.detach()) for tensor in floating.values()]
    totals = torch.stack([total.to(sums[0].device) for total in sums]).tolist()  # device sync
    suspects = [n for n, total in zip(floating, totals, strict=True) if not math.isfinite(total)]
    return [name for name in suspects if not floating[name].isfinite().all()]  # sums may overflow


def has_non_finite(layout: FileLayout, data: memoryview) -> bool:
    """Return False if all floating values of a file are finite; reads the file once.

    May return True for finite values. ``data`` holds the bytes after the header.
    """
    ranges: dict[torch.dtype, tuple[int, int]] = {}
    for info in layout.tensors:
        if info.dtype.is_floating_point or info.dtype.is_complex:
            begin, end = ranges.get(info.dtype, (info.begin, info.end))
            ranges[info.dtype] = min(begin, info.begin), max(end, info.end)
    # A range may include tensors of another dtype of equal width, and then other numbers.
    blocks = [
        TensorInfo("", dtype, ((end - begin) // dtype.itemsize,), begin, end).view(data)
        for dtype, (begin, end) in ranges.items()
    ]
    return not all(math.isfinite(_float_sum(block)) for block in blocks)


def _float_sum(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.sum(dtype=None if tensor.itemsize >= 4 else torch.float32).float()


# --- staging buffers -------------------------------------------------------------------------

_MAPPED_FROM = 1 << 20  # a mapping of its own does not pay off for fewer bytes
_MAX_COPY_THREADS = 4
_BYTES_PER_THREAD = 32 << 20
_LARGE_BYTES = 1 << 20
_FILE_ALIGNMENT = 4096  # allows direct I/O

_Signature = tuple[dict[str, str] | None, tuple[tuple[str, torch.dtype, torch.Size], ...]]


def allocate_buffer(size: int) -> torch.Tensor:
    """Allocate ``size`` uninitialized bytes on the CPU."""
    # The first write to huge pages is four times as fast: 307 MB in 23 ms instead of 100 ms.
    if size < _MAPPED_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has huge pages
        return torch.empty(size, dtype=torch.uint8)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)  # unmapped with the last tensor


def buffer_view(buffer: torch.Tensor) -> memoryview:
    """Return the memory of a CPU tensor of bytes, without a copy."""
    return buffer.numpy().data


def _copy_tensors(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, has_devices: bool) -> None:
    """Copy the second tensor of each pair into the first; from devices without waiting."""

    @torch.no_grad()
    def copy(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for target, source in pairs:
            target.copy_(source, non_blocking=has_devices)

    large = [pair for pair in pairs if pair[1].nbytes >= _LARGE_BYTES]
    size = sum(source.nbytes for _, source in large)
    threads = min(_MAX_COPY_THREADS, os.cpu_count() or 1, size // _BYTES_PER_THREAD)
    if has_devices or threads < 2 or torch.get_num_threads() > 1:  # torch's threads copy as well
        copy(pairs)
        return
    turns = iter(large)  # shared by the threads; small tensors would wait for the interpreter lock
    pool = ThreadPoolExecutor(threads - 1, "copy-state")
    helpers = [pool.submit(copy, turns) for _ in range(threads - 1)]
    pool.shutdown(wait=False)  # a thread without a core is not waited for
    try:
        copy(turns)
        copy(pair for pair in pairs if pair[1].nbytes < _LARGE_BYTES)
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


class StagingBuffer:
    """Block of memory for several safetensors files; pinned for copies from a CUDA device."""

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self._buffer = (
            torch.empty(size, dtype=torch.uint8, pin_memory=True)
            if pinned
            else allocate_buffer(size)
        )
        self._layouts: list[FileLayout] = []
        self._files: list[memoryview] = []
        self._targets: list[torch.Tensor] = []

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return self._buffer.numel()

    @staticmethod
    def size_of(layouts: Sequence[FileLayout]) -> int:
        """Return the required capacity for files of these layouts."""
        return sum(layout.size + _FILE_ALIGNMENT for layout in layouts)

    def fill(
        self, files: Sequence[tuple[FileLayout, Mapping[str, torch.Tensor]]]
    ) -> list[memoryview]:
        """Copy tensors of any device, wait for the copies, and return the files' contents."""
        layouts = [layout for layout, _ in files]
        if [*map(id, layouts)] != [*map(id, self._layouts)]:
            self._lay_out(layouts)
        sources = [tensors[info.name] for layout, tensors in files for info in layout.tensors]
        on_devices = [source for source in sources if not source.is_cpu]
        _copy_tensors([*zip(self._targets, sources, strict=True)], has_devices=bool(on_devices))
        for device in {source.device for source in on_devices}:
            torch.accelerator.synchronize(device)  # device sync: waits for the copies
        return self._files

    def _lay_out(self, layouts: list[FileLayout]) -> None:
        self._layouts, self._files, self._targets = layouts, [], []
        offset = -self._buffer.data_ptr() % _FILE_ALIGNMENT
        for layout in layouts:
            file = buffer_view(self._buffer[offset : offset + layout.size])
            file[: len(layout.header)] = layout.header
            data = file[len(layout.header) :]
            self._targets += [info.view(data) for info in layout.tensors]
            self._files.append(file)
            offset += layout.size + (-layout.size % _FILE_ALIGNMENT)


class StagingPool:
    """Pool of staging buffers and layouts for repeated saves of a similar state.

    With ``pinned``, pinned memory is used once a saved tensor is on a CUDA device: copies run at
    full speed, but allocating is slow.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._has_device_tensors = False
        self._free: list[StagingBuffer] = []
        self._layouts: dict[str, tuple[_Signature, FileLayout]] = {}
        self._lock = Lock()

    def layout(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        metadata: dict[str, str] | None = None,
    ) -> FileLayout:
        """Return a file's layout, reused if names, dtypes, shapes and metadata are unchanged."""
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._has_device_tensors = True
        kinds = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        signature = (metadata, kinds)
        known = self._layouts.get(name)
        if known is not None and known[0] == signature:
            _check_kinds(tensors)
            return known[1]
        layout = FileLayout.of(tensors, metadata)
        self._layouts[name] = (signature, layout)
        return layout

    def acquire(self, layouts: Sequence[FileLayout]) -> StagingBuffer:
        """Return a buffer with room for files of these layouts."""
        size = StagingBuffer.size_of(layouts)
        with self._lock:
            fitting = [buffer for buffer in self._free if buffer.size >= size]
            if fitting:
                found = min(fitting, key=lambda buffer: buffer.size)
                self._free.remove(found)
                return found
            self._free.clear()  # too small for the current state
        # The margin fits a state that grows a little.
        return StagingBuffer(size + size // 32, pinned=self._pinned and self._has_device_tensors)

    def release(self, buffer: StagingBuffer) -> None:
        """Keep a buffer for a later :meth:`acquire`."""
        with self._lock:
            self._free.append(buffer)

    def clear(self) -> None:
        """Free the buffers of the pool."""
        with self._lock:
            self._free.clear()
