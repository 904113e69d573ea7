"""Batches as plain values and tensors, as far as they can be, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def pack_batch(batch: Any, lost: list[str], place: str = "batch") -> Any:
    """A batch as what a checkpoint's state can hold.

    Tensors and NumPy arrays, with their layout in memory, numbers, texts, lists, tuples and
    mappings come back; of a named tuple or a mapping of another class, what is in it.

    Args:
        batch: any object.
        lost: takes the places and types of what can't be saved.
        place: its name in ``lost``.

    >>> lost = []
    >>> pack_batch({"x": (1, 2.0), "f": print}, lost)
    {'map': {'x': (1, 2.0), 'f': {'lost': 'builtin_function_or_method'}}}
    >>> lost
    ["batch['f'] (builtin_function_or_method)"]
    """
    if batch is None or type(batch) in (bool, int, float, str):
        return batch
    if isinstance(batch, torch.Tensor) and _is_dense(batch):
        return _pack_tensor(batch.detach())
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf":
        return {"numpy": torch.from_numpy(np.ascontiguousarray(batch))}
    if isinstance(batch, np.generic) and batch.dtype.kind in "biuf":
        return batch.item()
    if isinstance(batch, (list, tuple)):
        items = [pack_batch(item, lost, f"{place}[{i}]") for i, item in enumerate(batch)]
        return tuple(items) if isinstance(batch, tuple) else items
    if isinstance(batch, Mapping) and all(isinstance(key, (str, int)) for key in batch):
        return {
            "map": {key: pack_batch(item, lost, f"{place}[{key!r}]") for key, item in batch.items()}
        }
    kind = type(batch).__name__
    lost.append(f"{place} ({kind})")
    return {"lost": kind}


def unpack_batch(packed: Any) -> Any:
    """The batch that :func:`pack_batch` packed; None in the place of what was lost.

    Its tensors are copies: those read from a file lie there at any address, and torch adds up
    numbers in another order where they are not aligned as in memory of their own.
    """
    if isinstance(packed, torch.Tensor):
        return packed.clone()
    if isinstance(packed, (list, tuple)):
        return type(packed)(map(unpack_batch, packed))
    if not isinstance(packed, dict):
        return packed
    ((mark, content), *rest) = packed.items()
    if mark == "map":
        return {key: unpack_batch(item) for key, item in content.items()}
    if mark == "numpy":
        return content.clone().numpy()
    if mark == "tensor":
        order = rest[0][1]
        return content.clone().permute([order.index(dim) for dim in range(len(order))])
    return None


def _pack_tensor(tensor: torch.Tensor) -> Any:
    if tensor.is_contiguous():
        return tensor
    # Files hold contiguous tensors. Which dimension lies next to which decides about the kernels
    # that torch picks, and so about the last bit of what they compute.
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return {"tensor": tensor.permute(order), "order": order}


def _is_dense(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.device.type != "meta"
        and tensor.dtype != torch.complex128  # which safetensors lacks
    )
