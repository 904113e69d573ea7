"""Statistics of features: computed for each episode, merged over episodes.

Keys and shapes are those of lerobot: ``min``, ``max``, ``mean``, ``std``, ``count`` and the
quantiles ``q01`` to ``q99``; shape (D,) over all axes but the last, or (3, 1, 1) in [0, 1] of a
camera. ``std`` is the population's. Merged quantiles are weighted means, as in lerobot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
Statistics = Mapping[str, NDArray[Any]]
_LARGE_IMAGE = 300
_SMALL_IMAGE = 150


def array_statistics(values: NDArray[Any]) -> Statistics:
    """Return statistics of an array of shape (rows, ..., D), or (rows,).

    >>> found = array_statistics(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> [found[name].tolist() for name in ("mean", "std", "count")]
    [[2.0, 5.0], [1.0, 0.0], [2]]
    """
    flat = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    exact = flat.astype(np.float64)
    kind = flat.dtype if flat.dtype.kind in "iub" else np.float64
    quantiles = np.quantile(exact, [*QUANTILES.values()], axis=0)
    return {
        "min": flat.min(axis=0).astype(kind),
        "max": flat.max(axis=0).astype(kind),
        "mean": exact.mean(axis=0),
        "std": exact.std(axis=0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


class ImageStatistics:
    """Statistics of RGB images, exact for uint8, from one histogram per channel."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)
        self._images = 0

    def add(self, image: NDArray[np.uint8]) -> None:
        """Add an image of shape (H, W, 3); of large ones, some rows and columns, as in lerobot."""
        height, width = image.shape[:2]
        if max(height, width) >= _LARGE_IMAGE:
            step = max(1, max(height, width) // _SMALL_IMAGE)
            image = image[::step, ::step]
        offsets = np.arange(0, 768, 256, dtype=np.int16)
        counts = np.bincount((image + offsets).ravel(), minlength=768)
        self._counts += counts.reshape(3, 256)
        self._images += 1

    def result(self) -> Statistics:
        """Return the statistics, of shape (3, 1, 1) and in [0, 1]; requires an image."""
        levels = np.arange(256) / 255
        share = self._counts / self._counts.sum(axis=1, keepdims=True)
        mean = share @ levels
        variance = (share * (levels - mean[:, None]) ** 2).sum(axis=1)
        below = np.cumsum(share, axis=1)
        found = {
            "min": levels[(self._counts > 0).argmax(axis=1)],
            "max": levels[255 - (self._counts[:, ::-1] > 0).argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(variance),
            **{name: levels[(below >= q - 1e-12).argmax(axis=1)] for name, q in QUANTILES.items()},
        }
        shaped = {name: value.reshape(3, 1, 1) for name, value in found.items()}
        return {**shaped, "count": np.array([self._images])}


def stack_statistics(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of several parts, such as episodes, stacked along a new first axis."""
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def merge_statistics(stacked: Statistics) -> Statistics:
    """Merge along the first axis, by the parallel algorithm of Chan et al.

    >>> parts = [array_statistics(np.array([[0.0], [2.0]])), array_statistics(np.array([[4.0]]))]
    >>> merged = merge_statistics(stack_statistics(parts))
    >>> merged["mean"].tolist(), merged["std"].round(3).tolist(), merged["count"].tolist()
    ([2.0], [1.633], [3])
    """
    weight = stacked["count"].reshape(-1, *[1] * (stacked["mean"].ndim - 1))
    weight = weight / weight.sum()
    mean = (stacked["mean"] * weight).sum(axis=0)
    variance = ((stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2) * weight).sum(axis=0)
    return {
        "min": stacked["min"].min(axis=0),
        "max": stacked["max"].max(axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": stacked["count"].sum(axis=0),
        **{name: (stacked[name] * weight).sum(axis=0) for name in QUANTILES if name in stacked},
    }
