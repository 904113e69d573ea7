"""What is done with a batch: from the model to its outputs and its loss."""

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
# How many samples a batch has, and how many batches there are.


def count_samples(batch: Any) -> int:
    """The length of the first tensor in a batch, or 1 for a batch without one.

    >>> count_samples({"image": torch.zeros(8, 3), "label": torch.zeros(8)})
    8
    >>> count_samples("text")
    1
    """
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], torch.Tensor):
        first: torch.Tensor = batch[0]  # as most batches are; half the time of looking around
        if first.dim() > 0:
            return len(first) or 1
    return first_length(batch) or 1


def count_batches(dataloader: Any) -> int | None:
    """How many batches one pass over the data has, or None where only passing over it tells.

    >>> count_batches([1, 2, 3]), count_batches(iter([1, 2, 3]))
    (3, None)
    """
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None


def first_length(value: Any) -> int | None:
    """The length of the first tensor in a nested batch, or None where there is none."""
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.dim() > 0 else None
    if isinstance(value, (list, tuple)):
        parts: Iterable[Any] = value
    elif isinstance(value, Mapping):
        parts = value.values()
    else:
        return None
    for part in parts:  # half the time of a generator, and hooks count every batch
        length = first_length(part)
        if length is not None:
            return length
    return None


# --- weighted loss ---------------------------------------------------------------------------
# The arithmetic of losses that come with weights, in a run and in the replay of a part of it.


@dataclass(frozen=True, slots=True)
class LossWeighting:
    """What made the gradients of an accumulation window those of its weighted mean."""

    reference: torch.Tensor
    """What weights are divided by ahead of the backward pass, so that half precision holds them."""
    gradient_factor: torch.Tensor
    """What all gradients are multiplied by at the end of the window."""


def as_loss_weight(weight: Any, loss: torch.Tensor) -> torch.Tensor:
    """What a batch processor says that a loss weighs, as a tensor of its own on the loss's device.

    The value of a tensor is not looked at, which would wait for the device.

    Raises:
        BatchProcessorError: it is no weight.
    """
    dtype = torch.float32 if loss.device.type == "mps" else torch.float64
    if isinstance(weight, torch.Tensor) and weight.numel() == 1:
        # A copy: the processor may write its next weight into the same tensor.
        return weight.detach().reshape(()).to(device=loss.device, dtype=dtype, copy=True)
    number = isinstance(weight, Real) and not isinstance(weight, bool)  # NumPy's as well
    if not number or not 0 <= weight < math.inf:
        raise BatchProcessorError(
            "the weight of a loss must be a number >= 0 or a tensor of one, such as how many "
            f"tokens it is the mean of; got {weight!r:.80}"
        )
    return torch.full((), float(weight), dtype=dtype, device=loss.device)


def zero_if_unweighted(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The loss, or zero where it weighs nothing: the mean over nothing may be NaN."""
    return torch.where(weight > 0, loss, 0.0)


def scale_loss(loss: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """What to run the backward pass of, in the place of a mean loss of such a weight."""
    return loss * (weight / reference).to(loss.dtype)


def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply the gradients that there are; each process what it has of them."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_tensor(parameter.grad)
            by_device.setdefault(gradient.device, []).append(gradient)
    with torch.no_grad():
        for device, gradients in by_device.items():
            torch._foreach_mul_(gradients, factor.to(device))


ForwardResult: TypeAlias = (
    tuple[Any, torch.Tensor | None] | tuple[Any, torch.Tensor, float | torch.Tensor]
)
"""Outputs and loss, and maybe what the loss weighs."""


class BatchProcessor(Protocol):
    """What the trainer asks of a batch processor."""

    @property
    def need_backward(self) -> bool:
        """Whether a backward pass and an update follow."""
        ...

    def forward(self, model: Any, batch: Any) -> ForwardResult:
        """The outputs and the loss of a batch, and maybe what that weighs."""
        ...


class SimpleBatchProcessor(ABC):
    """A batch processor of one method.

    >>> class Regression(SimpleBatchProcessor):
    ...     def forward(self, model, batch):
    ...         outputs = model(batch["input"])
    ...         return outputs, torch.nn.functional.mse_loss(outputs, batch["target"])

    With gradient accumulation, batches weigh what they have samples. Where the trainer can't see
    how many (it looks at the length of the first tensor), define ``count_samples(batch) -> int``.

    Metrics are updated with what ``metric_inputs(outputs, batch)`` gives, where you define it: a
    tuple, in the order of ``metric.update``'s parameters, or a mapping by their names. Without it,
    a batch that is a pair (inputs, targets) gives the outputs and the targets:

    >>> class Classification(Regression):
    ...     def metric_inputs(self, outputs, batch):
    ...         return outputs.argmax(1), batch["target"]

    Args:
        need_backward: with False, the trainer runs :meth:`forward` without gradients, and neither
            a backward pass nor an update follows.
    """

    need_backward: bool = True

    def __init__(self, need_backward: bool = True) -> None:
        self.need_backward = need_backward

    @abstractmethod
    def forward(self, model: Any, batch: Any) -> ForwardResult:
        """The outputs and the loss of a batch, and maybe what that weighs.

        Args:
            model: as the trainer prepared it.
            batch: as the data loader gave it, on the accelerator's device.

        Returns:
            The outputs, of any type, which hooks see; and the loss, a scalar tensor: the mean
            over the samples of the batch. None where :attr:`need_backward` is False.

            Where it is the mean over something else, such as the tokens of texts that differ in
            length, return ``(outputs, loss, weight)`` with how many there are: a number >= 0, or a
            tensor of one element that stays on its device. An update then is that of the mean over
            all of its micro-batches and processes. A loss that weighs 0 does not count, and may be
            NaN, as long as its gradient is not. Return a weight in every step, or in none.
        """

    @staticmethod
    def from_callable(
        forward: Callable[[Any, Any], ForwardResult],
        need_backward: bool = True,
    ) -> SimpleBatchProcessor:
        """A batch processor whose forward is ``forward(model, batch)``."""
        if not callable(forward):
            raise TypeError(
                f"forward must be callable as forward(model, batch), got {type(forward).__name__}"
            )
        # As a class's own method, so that a step has no call more than with a subclass.
        members = {"forward": staticmethod(forward)}
        cls = type("CallableBatchProcessor", (SimpleBatchProcessor,), members)
        processor: SimpleBatchProcessor = cls(need_backward)
        return processor


class SupervisedProcessor(SimpleBatchProcessor):
    """Of batches that are pairs (inputs, targets): ``loss(model(inputs), targets)``.

    >>> processor = SupervisedProcessor(torch.nn.MSELoss())
    >>> model = torch.nn.Identity()
    >>> outputs, loss = processor.forward(model, (torch.ones(2, 1), torch.zeros(2, 1)))
    >>> loss
    tensor(1.)

    The outputs are the model's. Metrics are updated with these and the targets.

    Args:
        loss: from outputs and targets to the mean over the samples, a scalar tensor; a function or
            a module of ``torch.nn``. One with tensors of its own, such as weights of classes, is
            moved to the device of the outputs; it is not trained.
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
        """The model's outputs, and their loss.

        Raises:
            BatchProcessorError: the batch is no pair.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise BatchProcessorError(
                "SupervisedProcessor takes batches that are pairs (inputs, targets), got a "
                f"{type(batch).__name__}{length}; change what the dataset gives, or write a "
                "SimpleBatchProcessor of your own"
            )
        inputs, targets = batch
        outputs = model(inputs)
        if self._module is not None:
            self._module.to(outputs.device)
        return outputs, self.loss(outputs, targets)
