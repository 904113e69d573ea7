"""Interface of policies, their normalization and their batch processor.

A batch has LeRobot's keys: ``observation.state`` (B, S), ``observation.images.NAME`` (B, 3, H, W)
in [0, 1], ``action`` (B, T, A) and ``action_is_pad`` (B, T), True where an episode has ended.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from robo_orchard_core.utils.config.references import reference_to
from robo_orchard_lab.pipeline.batch_processor import SimpleBatchProcessor

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


STATE = "observation.state"
IMAGES = "observation.images."
ACTION = "action"
PADDING = "action_is_pad"
OBSERVATION_LIMIT = 5.0
"""Largest absolute value of a normalized observation."""


class Policy(nn.Module, ABC):
    """Policy that predicts a chunk of actions from one observation.

    A subclass defines `forward` and `predict_normalized`. Its constructor accepts plain data only
    and passes its own arguments to this one, so that `config` rebuilds the policy. Normalizers are
    submodules, so the ``state_dict`` contains the statistics.

    Args:
        statistics: of the dataset, by feature; they also determine the sizes of states and actions.
        inputs: names of vector features that are concatenated to the state.
        chunk_size: frames that one prediction has, T.
        n_action_steps: frames that are executed before the next prediction.
        action_normalization: of actions.
        arguments: further arguments of the subclass.

    Raises:
        ValueError: an argument is out of range, or a feature has no statistics.
    """

    def __init__(
        self,
        statistics: Statistics,
        *,
        inputs: Sequence[str],
        chunk_size: int,
        n_action_steps: int,
        action_normalization: Normalization = "mean_std",
        **arguments: Any,
    ) -> None:
        super().__init__()
        if not 1 <= n_action_steps <= chunk_size:
            raise ValueError(
                "expected 1 <= n_action_steps <= chunk_size, found n_action_steps="
                f"{n_action_steps} and chunk_size={chunk_size}"
            )
        if not inputs:
            raise ValueError(f"expected names of features in inputs, such as {STATE}, found none")
        state = [statistics_of(statistics, name) for name in inputs]
        kinds = [kind for kind in state[0] if all(kind in each for each in state)]
        self.inputs = tuple(inputs)
        self.sizes = tuple(len(each["mean"]) for each in state)
        self.chunk_size = chunk_size
        self.n_action_steps = n_action_steps
        self.state_normalizer = Normalizer(
            {kind: [value for each in state for value in each[kind]] for kind in kinds},
            limit=OBSERVATION_LIMIT,
        )
        self.action_normalizer = Normalizer(statistics_of(statistics, ACTION), action_normalization)
        self.state_dim = sum(self.sizes)
        self.action_dim = len(self.action_normalizer.offset)
        self.config: dict[str, Any] = {
            "class_type": reference_to(type(self)),
            "statistics": {name: dict(values) for name, values in statistics.items()},
            "inputs": [*inputs],
            "chunk_size": chunk_size,
            "n_action_steps": n_action_steps,
            **arguments,
        }
        """Class and arguments, as plain data."""

    @abstractmethod
    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the training loss, a scalar: the mean over the frames that are not padding."""

    @abstractmethod
    def predict_normalized(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return normalized actions of shape (B, T, A)."""

    @torch.no_grad()
    def predict_actions(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return actions of shape (B, T, A) in the units of the dataset, in evaluation mode.

        Random numbers come from torch's RNG of the device.

        Args:
            observation: features of shape (B, ...) on the policy's device.
        """
        was_training = self.training
        if was_training:
            self.eval()
        try:
            return self.action_normalizer.inverse(self.predict_normalized(observation))
        finally:
            if was_training:
                self.train()

    def normalized_state(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the normalized inputs as one tensor of shape (B, S).

        Raises:
            ValueError: an input is missing or has another shape.
        """
        values = []
        for name, size in zip(self.inputs, self.sizes, strict=True):
            value = feature_of(observation, name)
            if value.dim() != 2 or value.shape[1] != size:
                raise ValueError(
                    f"expected {name} of shape [batch, {size}], found {[*value.shape]}; this "
                    "policy uses one frame, without delta timestamps"
                )
            values.append(value)
        normalized: torch.Tensor = self.state_normalizer(
            values[0] if len(values) == 1 else torch.cat(values, dim=1)
        )
        return normalized

    def normalized_actions(
        self, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalized actions (B, T, A), and their padding mask (B, T).

        Raises:
            ValueError: actions are missing or have another shape.
        """
        actions = feature_of(batch, ACTION)
        expected = (self.chunk_size, self.action_dim)
        if actions.shape[1:] != expected:
            raise ValueError(
                f"expected action of shape [batch, {expected[0]}, {expected[1]}], found "
                f"{[*actions.shape]}; set chunk_size: {self.chunk_size} of the dataset, the "
                "chunk_size of the policy"
            )
        padding = batch.get(PADDING)
        if padding is None:
            padding = torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)
        return self.action_normalizer(actions), padding


def mean_without_padding(error: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Return the mean of an error (B, T, A) over the frames that are not padding (B, T).

    >>> error = torch.tensor([[[1.0], [3.0]], [[5.0], [99.0]]])
    >>> mean_without_padding(error, torch.tensor([[False, False], [False, True]]))
    tensor(3.)
    """
    is_padding = padding.unsqueeze(-1)
    count = (~padding).sum() * error.shape[-1]
    return error.masked_fill(is_padding, 0.0).sum() / count.clamp(min=1)


class PolicyProcessor(SimpleBatchProcessor):
    """Batch processor of policies: ``model(batch)`` is the loss.

    The weight of a loss is the number of frames in its mean, without padding. Several processes and
    accumulated micro-batches then equal one process with one batch.
    """

    def forward(
        self, model: Any, batch: Mapping[str, torch.Tensor]
    ) -> tuple[None, torch.Tensor, float | torch.Tensor]:
        """Return no outputs, the loss, and its weight."""
        padding = batch.get(PADDING)
        actions = feature_of(batch, ACTION)
        weight = actions[..., 0].numel() if padding is None else (~padding).sum()
        return None, model(batch), weight


def statistics_of(statistics: Statistics, name: str) -> Mapping[str, Sequence[Any]]:
    """Return the statistics of one feature; a missing one is a ValueError."""
    if name not in statistics:
        raise ValueError(
            f"expected statistics of {name!r}, found those of {', '.join(statistics) or 'nothing'}"
        )
    return statistics[name]


def feature_of(batch: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return one feature of a batch; a missing one is a ValueError."""
    try:
        return batch[name]
    except KeyError:
        raise ValueError(f"expected {name!r} in a batch, found {', '.join(batch)}") from None


def sinusoidal_embedding(position: torch.Tensor, size: int) -> torch.Tensor:
    """Return sines and cosines of positions: shape (...) to (..., size), with an even size.

    Wavelengths grow geometrically from 2 pi to 10,000 times 2 pi (Vaswani et al. 2017).

    >>> sinusoidal_embedding(torch.tensor([0.0]), 4)
    tensor([[0., 0., 1., 1.]])
    """
    exponent = torch.arange(size // 2, device=position.device, dtype=torch.float32) / (size // 2)
    angle = position.unsqueeze(-1) * torch.exp(-math.log(10_000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
