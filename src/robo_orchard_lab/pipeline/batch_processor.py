"""Batch processors: from a model and a batch to outputs and loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from numbers import Real
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from robo_orchard_lab.pipeline.errors import BatchProcessorError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.sharded_tensors import local_tensor

logger = job_logger(__name__)


_MAX_DESCRIBED = 16
"""Most parts of a mapping or sequence in a description."""
_MAX_COUNTED = 1000
"""Most parts of a mapping or sequence to count elements of, which costs 0.2 us each."""
_reported: set[str] = set()
"""Structures of batches whose number of samples is a guess, already reported."""


def count_samples(batch: Any) -> int:
    """Return the number of samples of a batch without dataset indices, by its structure.

    The first dimension that all tensors share, or the length that all lists of similar samples
    share, else 1. If they disagree, a warning describes the guess once.

    >>> count_samples({"image": torch.zeros(8, 3), "label": torch.zeros(8)})
    8
    >>> count_samples(([torch.zeros(3, 5, 5)] * 2, [{"box": torch.zeros(n, 4)} for n in (1, 4)]))
    2
    >>> count_samples(["a text", "another text"])
    2
    """
    kind = type(batch)
    if kind in (tuple, list, dict):  # the most frequent batches, in a tenth of the time
        length = _common_length(batch.values() if kind is dict else batch)
        is_unsure = kind is list and len(batch) > 1 and len({_kind(part) for part in batch}) == 1
        if length is not None and not is_unsure:
            return length or 1
    # Readings of a list of similar items: of tensors or lists, these are samples in the first
    # reading only, else also in the second. The third takes all items for fields.
    readings: list[dict[int, None]] = [{}, {}, {}]  # ordered sets of lengths
    has_fields = kind is tuple and not _holds_scalars(batch)
    for part in batch if has_fields else (batch,):
        _add_lengths(part, readings)
    counts = [next(iter(readings[i])) for i in (1, 0, 2) if len(readings[i]) == 1]
    count = counts[0] if counts else next(iter(readings[2]), 1)
    if len(set(counts)) != 1 and batch is not None:
        _report_guess(batch, count, has_lengths=bool(readings[2]))
    return count or 1


def count_batches(dataloader: Any) -> int | None:
    """Return the length of a loader or dataset, or None if unknown.

    >>> count_batches([1, 2, 3]), count_batches(iter([1, 2, 3]))
    (3, None)
    """
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None


def _common_length(parts: Iterable[Any]) -> int | None:
    """Return the first dimension of all parts; None if a part has none or another one."""
    length = None
    for part in parts:
        if not isinstance(part, torch.Tensor) or part.dim() == 0:
            return None
        size = part.size(0)  # len() of a tensor runs in Python
        if length is None:
            length = size
        elif size != length:
            return None
    return length


def _values(value: Any) -> Iterable[Any]:
    """Return the fields of a mapping, sequence or dataclass; nothing of other values."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return ()


def _add_lengths(value: Any, readings: Sequence[dict[int, None]]) -> None:
    """Add the first dimensions of tensors, and the lengths of lists of samples, to readings."""
    inner = readings
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim > 0:
            for lengths in readings:
                lengths[len(value)] = None
        return
    # A tuple without names may be a list of samples, too: torchvision's zip(*samples).
    if isinstance(value, (list, tuple)) and value and not hasattr(value, "_fields"):
        if _holds_scalars(value):
            inner = ()
        elif len({_kind(item) for item in value}) == 1:
            is_unsure = isinstance(value[0], (torch.Tensor, np.ndarray, list))
            inner = readings[-2:] if is_unsure else readings[-1:]
        for lengths in readings[: len(readings) - len(inner)]:
            lengths[len(value)] = None
    if inner:
        for part in _values(value):
            _add_lengths(part, inner)


def _holds_scalars(value: Sequence[Any]) -> bool:
    """Return True for strings, and for a list of numbers: a tuple may be an image's size."""
    kinds = (str, int, float) if isinstance(value, list) else str
    return bool(value) and all(isinstance(item, kinds) for item in value)


def _kind(value: Any) -> object:
    """Return a key that is equal for similar samples."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        # Images differ in height and width, sequences in length.
        return value.ndim if value.ndim > 2 else tuple(value.shape[1:])
    names = tuple(value) if isinstance(value, Mapping) else ()
    return type(value), names, tuple(_kind(part) for part in _values(value))


def describe_batch(value: Any, *, shapes: bool, depth: int = 3) -> str:
    """Return the types in a batch, with the shapes of tensors on request.

    >>> describe_batch({"x": torch.zeros(2, 3), "names": ["a", "b"]}, shapes=False)
    'dict(x: Tensor, names: list(str))'
    >>> describe_batch({"x": torch.zeros(2, 3), "names": ["a", "b"]}, shapes=True)
    'dict(x: float32[2, 3], names: list(2 x str))'
    """
    if shapes and isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
    parts = list(_values(value)) if depth else []
    count = len(parts)
    kinds = [describe_batch(p, shapes=shapes, depth=depth - 1) for p in parts[:_MAX_DESCRIBED]]
    if not kinds:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        kinds = [f"{name}: {kind}" for name, kind in zip(value, kinds, strict=False)]
    elif isinstance(value, list) and len(set(kinds)) == 1:
        # The length differs between batches, so it is no part of their structure.
        return f"{type(value).__qualname__}({f'{count} x ' if shapes else ''}{kinds[0]})"
    if count > len(kinds):
        kinds.append(f"and {count - len(kinds)} more" if shapes else "...")
    return f"{type(value).__qualname__}({', '.join(kinds)})"


def count_elements(value: Any) -> int:
    """Return the number of elements of the tensors and arrays in a batch, of long lists in part."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return math.prod(value.shape)
    return sum(map(count_elements, islice(_values(value), _MAX_COUNTED)))


def _report_guess(batch: Any, count: int, has_lengths: bool) -> None:
    structure = describe_batch(batch, shapes=False)
    if structure in _reported:
        return
    _reported.add(structure)
    logger.warning(
        "a batch of type %s %s; it counts as %d. Define count_samples(batch) on the batch "
        "processor: means of losses, accumulation windows and samples per second use the number",
        structure,
        "has tensors and lists of different lengths, so that its number of samples is a guess"
        if has_lengths
        else "has no tensor to count its samples by",
        count,
    )


@dataclass(frozen=True, slots=True)
class LossWeighting:
    """Factors for the gradients of an accumulation window's weighted mean."""

    reference: torch.Tensor
    """Divisor of weights before the backward pass, to stay in the range of half precision."""
    gradient_factor: torch.Tensor
    """Factor of all gradients at the end of the window."""


def as_loss_weight(weight: Any, loss: torch.Tensor) -> torch.Tensor:
    """Return the weight of a loss as a new scalar tensor on the loss's device.

    Raises a ``BatchProcessorError`` unless ``weight`` is a finite number >= 0 or a tensor of one
    element, whose value is not checked: that would sync the device.
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


def multiply_all(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply tensors by a tensor of one element, all on one device.

    torch has no public name for its fused kernels; without them, one kernel per tensor runs.
    """
    if hasattr(torch, "_foreach_mul_"):
        torch._foreach_mul_(tensors, factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor)


def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply all gradients in place; of sharded gradients the local shard."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_tensor(parameter.grad)
            by_device.setdefault(gradient.device, []).append(gradient)
    with torch.no_grad():
        for device, gradients in by_device.items():
            multiply_all(gradients, factor.to(device))


NamedSteps: TypeAlias = Generator[tuple[str, torch.Tensor], Any, Any]
"""Generator that yields the name of an optimizer and its loss, and returns the outputs.

A yield evaluates to True if the optimizer was stepped, False if its update was skipped, and None
within an accumulation window and in an evaluation."""
ForwardResult: TypeAlias = (
    tuple[Any, torch.Tensor | None]
    | tuple[Any, torch.Tensor, float | torch.Tensor]
    | tuple[Any, Mapping[str, torch.Tensor]]
    | NamedSteps
    | Iterator[tuple[str, torch.Tensor]]  # named steps without outputs, as many annotate them
)
"""Outputs, loss and, optionally, the weight of the loss. With several optimizers: outputs and
losses by optimizer, or named steps."""


class BatchProcessor(Protocol):
    """Interface of a batch processor to the trainer."""

    @property
    def need_backward(self) -> bool:
        """True if a backward pass and an update follow."""
        ...

    def forward(self, model: Any, batch: Any) -> ForwardResult:
        """Return outputs, loss and, optionally, its weight; or named losses."""
        ...


class SimpleBatchProcessor(ABC):
    """Batch processor with one method to implement.

    >>> class Regression(SimpleBatchProcessor):
    ...     def forward(self, model, batch):
    ...         outputs = model(batch["input"])
    ...         return outputs, torch.nn.functional.mse_loss(outputs, batch["target"])

    Losses and gradients are weighted by the number of samples: of dataset indices, or else
    :func:`count_samples`. Define ``count_samples(batch) -> int`` to count otherwise.

    Evaluations use :meth:`forward`, or ``evaluation_forward`` where defined, which may return named
    values instead of a loss (see :class:`Evaluator`):

    >>> class Policy(Regression):
    ...     def evaluation_forward(self, model, batch):
    ...         outputs = model(batch["input"])
    ...         error = outputs - batch["target"]
    ...         return outputs, {"loss": error.square().mean(), "l1": error.abs().mean()}

    Metrics are updated with the outputs and targets of a batch (inputs, targets). For other
    batches, define ``metric_inputs``, which returns the arguments of ``metric.update`` as a tuple
    or a mapping by name:

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
            Outputs of any type, for hooks, and a scalar loss, the mean over the batch's samples;
            None is allowed without a backward pass.

            For a mean over other items, such as tokens, return ``(outputs, loss, weight)`` with
            their number >= 0, or a tensor of one element, which is not read; in every step or in
            none. An update then uses the mean over all micro-batches and processes. A loss of
            weight 0 is ignored and may be NaN, unlike its gradient.

            With several optimizers, return ``(outputs, {"g": loss, "d": loss})``, or define a
            generator: ``yield "d", loss`` runs the backward pass, and the update at an accumulation
            boundary, before the code continues; see :data:`NamedSteps`.
        """

    @staticmethod
    def from_callable(
        forward: Callable[[Any, Any], ForwardResult],
        need_backward: bool = True,
        *,
        evaluation_forward: Callable[[Any, Any], Any] | None = None,
    ) -> SimpleBatchProcessor:
        """Return a batch processor that calls ``forward(model, batch)``, and in evaluations
        ``evaluation_forward(model, batch)`` where given."""
        given = {"forward": forward, "evaluation_forward": evaluation_forward}
        members = {}
        for name, function in given.items():
            if callable(function):
                # A method of a new class, so that a step costs no additional call.
                members[name] = staticmethod(function)
            elif name == "forward" or function is not None:
                raise TypeError(
                    f"{name} must be callable as {name}(model, batch), got "
                    f"{type(function).__name__}"
                )
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

    Args:
        loss: function or module that maps outputs and targets to a scalar, the mean over samples.
            A module's tensors, such as class weights, are moved to the outputs' device, and are
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
