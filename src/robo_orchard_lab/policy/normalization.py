"""Normalization of observations and actions by the statistics of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

Statistics: TypeAlias = Mapping[str, Mapping[str, Sequence[Any]]]
"""Per feature of a dataset: ``mean``, ``std``, ``min`` and ``max`` as nested lists of numbers."""
Normalization: TypeAlias = Literal["mean_std", "min_max"]

MIN_SCALE = 1e-6
"""Smallest divisor. A constant value becomes 0 instead of a division by zero."""


class Normalizer(nn.Module):
    """Affine map of raw values to normalized values, and back.

    >>> normalizer = Normalizer({"mean": [1.0, 2.0], "std": [2.0, 0.0]}, limit=5.0)
    >>> normalizer(torch.tensor([[3.0, 2.0], [99.0, 2.0]]))
    tensor([[1., 0.],
            [5., 0.]])
    >>> normalizer.inverse(torch.tensor([1.0, 0.0]))
    tensor([3., 2.])

    Offset and scale are buffers of the ``state_dict``: weights and statistics travel together.

    Args:
        statistics: of one feature.
        mode: ``mean_std`` to mean 0 and standard deviation 1; ``min_max`` to the range [-1, 1].
        limit: clamp normalized values to [-limit, limit]; None: no clamp.

    Raises:
        ValueError: a statistic is missing, not finite, or of another length.
    """

    offset: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        statistics: Mapping[str, Sequence[Any]],
        mode: Normalization = "mean_std",
        limit: float | None = None,
    ) -> None:
        super().__init__()
        if mode == "mean_std":
            offset, scale = _tensor(statistics, "mean"), _tensor(statistics, "std")
        elif mode == "min_max":
            low, high = _tensor(statistics, "min"), _tensor(statistics, "max")
            offset, scale = (high + low) / 2, (high - low) / 2
        else:
            raise ValueError(f"expected mode mean_std or min_max, found {mode!r}")
        if offset.shape != scale.shape:
            raise ValueError(
                f"expected statistics of one shape, found {[*offset.shape]} and {[*scale.shape]}"
            )
        # A constant keeps its value in both directions; divided by MIN_SCALE, noise would be large.
        self.register_buffer("offset", offset)
        self.register_buffer("scale", torch.where(scale < MIN_SCALE, 1.0, scale))
        self.limit = limit

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return normalized values of the same shape; statistics broadcast to the last axes."""
        normalized = (values - self.offset) / self.scale
        return normalized if self.limit is None else normalized.clamp(-self.limit, self.limit)

    def inverse(self, normalized: torch.Tensor) -> torch.Tensor:
        """Return raw values."""
        return normalized * self.scale + self.offset


def _tensor(statistics: Mapping[str, Sequence[Any]], name: str) -> torch.Tensor:
    if name not in statistics:
        raise ValueError(f"expected the statistic {name!r}, found {', '.join(statistics) or None}")
    values = torch.tensor(statistics[name], dtype=torch.float32, device="cpu")
    if not torch.isfinite(values).all():
        raise ValueError(
            f"expected finite statistics, found {name} = {values.tolist()}; "
            "remove the episodes with NaN or infinite values from the dataset"
        )
    return values.to(torch.get_default_device())  # meta where only shapes are wanted
