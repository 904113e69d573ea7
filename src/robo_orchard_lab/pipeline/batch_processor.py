"""Batch processors: from a model and a batch to outputs and loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, TypeAlias

import torch

from robo_orchard_lab.pipeline.errors import BatchProcessorError
from robo_orchard_lab.pipeline.sharded_tensors import local_tensor

# --- batch size ------------------------------------------------------------------------------


def count_samples(batch: Any) -> int:
    """Return the length of the first tensor in a batch, or 1 without a tensor.

    >>> count_samples({"image": torch.zeros(8, 3), "label": torch.zeros(8)})
    8
    >>> count_samples("text")
    1
    """
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], torch.Tensor):
        first: torch.Tensor = batch[0]  # the most frequent case, in half the time
        if first.dim() > 0:
            return len(first) or 1
    return first_length(batch) or 1


def sample_counter(batch_processor: Any) -> Callable[[Any], int]:
    """Return the processor's ``count_samples`` method, or :func:`count_samples`."""
    return getattr(batch_processor, "count_samples", None) or count_samples


def count_batches(dataloader: Any) -> int | None:
    """Return the length of a loader or dataset, or None if unknown.

    >>> count_batches([1, 2, 3]), count_batches(iter([1, 2, 3]))
    (3, None)
    """
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None


def first_length(value: Any) -> int | None:
    """Return the length of the first tensor in a nested batch, or None without a tensor."""
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.dim() > 0 else None
    if isinstance(value, (list, tuple)):
        parts: Iterable[Any] = value
    elif isinstance(value, Mapping):
        parts = value.values()
    else:
        return None
    for part in parts:  # half the time of a generator, for every batch
        length = first_length(part)
        if length is not None:
            return length
    return None


# --- weighted loss ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LossWeighting:
    """Factors for the gradients of an accumulation window's weighted mean."""

    reference: torch.Tensor
    """Divisor of weights before the backward pass, to stay in the range of half precision."""
    gradient_factor: torch.Tensor
    """Factor of all gradients at the end of the window."""


def as_loss_weight(weight: Any, loss: torch.Tensor) -> torch.Tensor:
    """Return the weight of a loss as a new scalar tensor on the loss's device.

    A tensor's value is not checked, which would sync the device.

    Raises:
        BatchProcessorError: ``weight`` is no finite number >= 0 and no tensor of one element.
    """
    dtype = torch.float32 if loss.device.type == "mps" else torch.float64
    if isinstance(weight, torch.Tensor) and weight.numel() == 1:
        # A copy: the processor may reuse the tensor.
        return weight.detach().reshape(()).to(device=loss.device, dtype=dtype, copy=True)
    is_number = isinstance(weight, Real) and not isinstance(weight, bool)  # NumPy's as well
    if not is_number or not 0 <= weight < math.inf:
        raise BatchProcessorError(
            "the weight of a loss must be a number >= 0 or a tensor of one element, such as the "
            f"number of tokens in its mean; got {weight!r:.80}"
        )
    return torch.full((), float(weight), dtype=dtype, device=loss.device)


def zero_if_unweighted(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the loss, or 0 if the weight is 0: a mean over nothing may be NaN."""
    return torch.where(weight > 0, loss, 0.0)


def scale_loss(loss: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return ``loss * weight / reference`` in the loss's dtype."""
    return loss * (weight / reference).to(loss.dtype)


def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply all gradients in place; of sharded gradients the local shard."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_tensor(parameter.grad)
            by_device.setdefault(gradient.device, []).append(gradient)
    with torch.no_grad():
        for device, gradients in by_device.items():
            torch._foreach_mul_(gradients, factor.to(device))


# --- batch processors ------------------------------------------------------------------------


ForwardResult: TypeAlias = (
    tuple[Any, torch.Tensor | None] | tuple[Any, torch.Tensor, float | torch.Tensor]
)
"""Outputs, loss and, optionally, the weight of the loss."""


class BatchProcessor(Protocol):
    """Interface of a batch processor to the trainer."""

    @property
    def need_backward(self) -> bool:
        """True if a backward pass and an update follow."""
        ...

    def forward(self, model: Any, batch: Any) -> ForwardResult:
        """Return outputs, loss and, optionally, the weight of the loss."""
        ...


class SimpleBatchProcessor(ABC):
    """Batch processor with one method to implement.

    >>> class Regression(SimpleBatchProcessor):
    ...     def forward(self, model, batch):
    ...         outputs = model(batch["input"])
    ...         return outputs, torch.nn.functional.mse_loss(outputs, batch["target"])

    Gradient accumulation weights batches by their number of samples: the length of the first
    tensor. Define ``count_samples(batch) -> int`` to count otherwise.

    Metrics are updated with the outputs and targets of a batch (inputs, targets). For other
    batches, define ``metric_inputs(outputs, batch)``, which returns the arguments of
    ``metric.update`` as a tuple or a mapping by name:

    >>> class Classification(Regression):
    ...     def metric_inputs(self, outputs, batch):
    ...         return outputs.argmax(1), batch["target"]

    Args:
        need_backward: run a backward pass and an update. With False, :meth:`forward` runs without
            gradients.
    """

    need_backward: bool = True

    def __init__(self, need_backward: bool = True) -> None:
        self.need_backward = need_backward

    @abstractmethod
    def forward(self, model: Any, batch: Any) -> ForwardResult:
        """Return the outputs and the loss of a batch.

        Args:
            model: as the trainer prepared it.
            batch: as loaded, on the accelerator's device.

        Returns:
            Outputs of any type, for hooks, and a scalar loss: the mean over the batch's samples.
            The loss may be None if :attr:`need_backward` is False.

            If the loss is a mean over other items, such as tokens, return
            ``(outputs, loss, weight)`` with the number of items: a number >= 0, or a tensor of one
            element, which is not read. An update then uses the mean over all micro-batches and
            processes. A loss of weight 0 is ignored and may be NaN, unlike its gradient. Return a
            weight in every step or in none.
        """

    @staticmethod
    def from_callable(
        forward: Callable[[Any, Any], ForwardResult],
        need_backward: bool = True,
    ) -> SimpleBatchProcessor:
        """Return a batch processor that calls ``forward(model, batch)``."""
        if not callable(forward):
            raise TypeError(
                f"forward must be callable as forward(model, batch), got {type(forward).__name__}"
            )
        # A method of a new class, so that a step costs no additional call.
        members = {"forward": staticmethod(forward)}
        cls = type("CallableBatchProcessor", (SimpleBatchProcessor,), members)
        processor: SimpleBatchProcessor = cls(need_backward)
        return processor


class SupervisedProcessor(SimpleBatchProcessor):
    """Batch processor of (inputs, targets) batches: ``loss(model(inputs), targets)``.

    >>> processor = SupervisedProcessor(torch.nn.MSELoss())
    >>> model = torch.nn.Identity()
    >>> outputs, loss = processor.forward(model, (torch.ones(2, 1), torch.zeros(2, 1)))
    >>> loss
    tensor(1.)

    Metrics are updated with outputs and targets.

    Args:
        loss: function or module that maps outputs and targets to a scalar, the mean over samples.
            A module with tensors, such as class weights, is moved to the outputs' device; it is
            not trained.
    """

    def __init__(self, loss: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(
                f"loss must be callable as loss(outputs, targets), got {type(loss).__name__}"
            )
        self.loss = loss
        has_tensors = isinstance(loss, torch.nn.Module) and bool(loss.state_dict())
        self._module: Any = loss if has_tensors else None

    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        """Return the model's outputs and their loss.

        Raises:
            BatchProcessorError: the batch is no pair.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise BatchProcessorError(
                "SupervisedProcessor requires batches that are pairs (inputs, targets), got a "
                f"{type(batch).__name__}{length}; change the dataset, or subclass "
                "SimpleBatchProcessor"
            )
        inputs, targets = batch
        outputs = model(inputs)
        if self._module is not None:
            self._module.to(outputs.device)
        return outputs, self.loss(outputs, targets)
