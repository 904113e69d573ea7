"""Tensors as the bytes of files, in memory that is kept from one save to the next."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Lock

import torch

from robo_orchard_lab.pipeline.checkpoint.safetensors_layout import TensorLayout

# --- memory blocks ---------------------------------------------------------------------------
# Large blocks of memory that are quick to come by.


# Smaller ones are not worth a mapping of their own.
_MAPPED_FROM = 1 << 20


def new_block(size: int) -> torch.Tensor:
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


def bytes_of(block: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes on the CPU, itself."""
    return block.numpy().data


_ALIGNMENT = 4096  # of each file, so that it can be written past the system's cache

_Signature = tuple[dict[str, str] | None, tuple[tuple[str, torch.dtype, torch.Size], ...]]


class TensorImage:
    """A block of memory in which files of tensors lie side by side."""

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        """Room for ``size`` bytes, see :meth:`size_of`; pinned for copies from a CUDA device."""
        self._block = (
            torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else new_block(size)
        )
        self._layouts: list[TensorLayout] = []
        self._files: list[memoryview] = []
        self._targets: list[torch.Tensor] = []

    @property
    def size(self) -> int:
        """How many bytes it has room for."""
        return self._block.numel()

    @staticmethod
    def size_of(layouts: Sequence[TensorLayout]) -> int:
        """How many bytes such files take at most."""
        return sum(layout.size + _ALIGNMENT for layout in layouts)

    def fill(
        self, files: Sequence[tuple[TensorLayout, Mapping[str, torch.Tensor]]]
    ) -> list[memoryview]:
        """Copy tensors of any device into it, and wait for that: the contents of each file."""
        layouts = [layout for layout, _ in files]
        if [*map(id, layouts)] != [*map(id, self._layouts)]:
            self._lay_out(layouts)
        sources = [tensors[place.name] for layout, tensors in files for place in layout.places]
        _copy_all(self._targets, sources)
        return self._files

    def _lay_out(self, layouts: list[TensorLayout]) -> None:
        self._layouts, self._files, self._targets = layouts, [], []
        offset = -self._block.data_ptr() % _ALIGNMENT
        for layout in layouts:
            image = bytes_of(self._block[offset : offset + layout.size])
            image[: len(layout.beginning)] = layout.beginning
            data = image[len(layout.beginning) :]
            self._targets += [place.of(data) for place in layout.places]
            self._files.append(image)
            offset += layout.size + (-layout.size % _ALIGNMENT)


class ImagePool:
    """Images that are used again, so that a copy into them costs the copy and no new memory.

    A state of the same names, types and shapes as the last one is not laid out anew, either.

    Args:
        pinned: have them pinned where tensors are on CUDA devices, which then copy into them at
            full speed. It takes long to make such a one.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._from_devices = False
        self._free: list[TensorImage] = []
        self._layouts: dict[str, tuple[_Signature, TensorLayout]] = {}
        self._lock = Lock()

    def layout(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        metadata: dict[str, str] | None = None,
    ) -> TensorLayout:
        """The layout of the file of that name, with these tensors and this in its header.

        Raises:
            StateError: one is of a kind that a file can't have; the message names it.
        """
        self._from_devices = self._from_devices or any(map(_is_on_device, tensors.values()))
        kinds = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        signature = (metadata, kinds)
        known = self._layouts.get(name)
        if known is not None and known[0] == signature:
            TensorLayout.check_kinds(tensors)
            return known[1]
        layout = TensorLayout.of(tensors, metadata)
        self._layouts[name] = (signature, layout)
        return layout

    def take(self, layouts: Sequence[TensorLayout]) -> TensorImage:
        """An image with room for these files, to be given back."""
        size = TensorImage.size_of(layouts)
        with self._lock:
            fitting = [image for image in self._free if image.size >= size]
            if fitting:
                found = min(fitting, key=lambda image: image.size)
                self._free.remove(found)
                return found
            self._free.clear()  # too small for what is saved now
        # A state that grows a little fits next time.
        return TensorImage(size + size // 32, pinned=self._pinned and self._from_devices)

    def give_back(self, image: TensorImage) -> None:
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
