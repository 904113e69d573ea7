"""Measuring a model on whole sets of data, alone or within a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device

from robo_orchard_lab.pipeline.batch_processor import (
    BatchProcessor,
    as_loss_weight,
    count_samples,
    zero_if_unweighted,
)
from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat
from robo_orchard_lab.pipeline.errors import BatchProcessorError, PipelineConfigError
from robo_orchard_lab.pipeline.evaluation_loader import EvaluationLoader, check_dataloaders
from robo_orchard_lab.pipeline.isolation import (
    evaluation_mode,
    first_rank_buffers,
    isolated_rng,
)
from robo_orchard_lab.pipeline.metrics import DeferredMetrics, WeightedSum, resolve
from robo_orchard_lab.pipeline.metrics.exchange import StateReduction
from robo_orchard_lab.pipeline.metrics.torchmetrics import (
    MetricArguments,
    MetricInputs,
    MetricsLike,
    TorchMetrics,
)
from robo_orchard_lab.pipeline.model import ddp_of
from robo_orchard_lab.pipeline.sharding import is_sharded_model, reshard

# --- result ----------------------------------------------------------------------------------
# What an evaluation has summed up, to be reduced over the ranks and read.


class MeanLoss:
    """A mean over the samples of all ranks; no value where no rank has any.

    A :class:`DeferredMetrics`.
    """

    def __init__(self, name: str, loss_sum: WeightedSum, device: torch.device) -> None:
        self._name = name
        self._names = [name]
        self._total = loss_sum.to_tensor(device)

    def names(self) -> Sequence[str]:
        return self._names

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [(self._total, "sum")]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        total, weight = reduced[0].tolist()
        values = {self._name: total / weight} if weight else {}
        self._names = list(values)
        return values


class JoinedMetrics:
    """Several deferred metrics as one."""

    def __init__(self, parts: Sequence[DeferredMetrics]) -> None:
        self._parts = parts

    def names(self) -> Sequence[str]:
        return [name for part in self._parts for name in part.names()]

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [state for part in self._parts for state in part.states()]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        values: dict[str, float] = {}
        begin = 0
        for part in self._parts:
            end = begin + len(part.states())
            values.update(part.values(reduced[begin:end]))
            begin = end
        return values


# --- evaluator -------------------------------------------------------------------------------
# A model's loss and metrics on whole sets of data.


_DIVIDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Evaluator:
    """Measures the mean loss and metrics of a model on named loaders, each sample counted once.

    >>> from robo_orchard_lab.pipeline import SimpleBatchProcessor
    >>> def forward(model, batch):
    ...     inputs, targets = batch
    ...     outputs = model(inputs)
    ...     return outputs, torch.nn.functional.l1_loss(outputs, targets)
    >>> model = torch.nn.Linear(1, 1)
    >>> _ = [torch.nn.init.ones_(parameter) for parameter in model.parameters()]
    >>> batches = [(torch.zeros(3, 1), torch.zeros(3, 1)), (torch.ones(1, 1), torch.zeros(1, 1))]
    >>> processor = SimpleBatchProcessor.from_callable(forward)
    >>> Evaluator(model, processor, {"val": batches}).evaluate()
    {'val/loss': 1.25}

    The model is in evaluation mode and makes no gradients. Afterwards it is as it was, module by
    module, and so is the random state, whatever happened. What is random in an evaluation is that
    of ``seed``, the same each time.

    With several processes, each evaluates its share of the batches, without padding and without
    repeats, and all of them get the values of all; a rank may have no batch. Nothing is read from
    the device before the end: then all travels in one transfer and one collective. A model in DDP
    takes one more before, where it has buffers: all ranks evaluate with those of the first. So does
    a sharded one (FSDP2), whose forward passes exchange: a rank that has a batch less than another
    one takes part with one of the other's, which does not count.

    Args:
        model: prepared by ``accelerator`` or not; it stays on its device, and batches go there.
        batch_processor: from a batch to outputs and loss. The loss is weighed by the batch's
            samples (its ``count_samples``, or the length of the batch's first tensor), or by what
            the processor returns beside it; batches without one count for no loss.
        dataloaders: by name; see :class:`EvaluationLoader` for how they are divided.
        metrics: of torchmetrics, by name, or a collection; they are copied.
        metric_inputs: ``metric_inputs(outputs, batch)`` gives the arguments of
            ``metric.update``, as a tuple or a mapping by name. By default it is the processor's
            method of that name, or of a pair (inputs, targets) the outputs and the targets.
        accelerator: processes and precision; by default this process alone.
        seed: of what is random in an evaluation, >= 0.
        who: evaluates, for errors.

    Raises:
        PipelineConfigError: no loader, one that is divided among the processes already, no metric
            of torchmetrics, or a model whose parts lie on several processes.
        DataError: a loader is known to be empty.
        MetricValueError: a metric's value is known to be no single number.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch_processor: BatchProcessor,
        dataloaders: Mapping[str, Iterable[Any]],
        *,
        metrics: MetricsLike | TorchMetrics | None = None,
        metric_inputs: MetricInputs | None = None,
        accelerator: Accelerator | None = None,
        seed: int = 0,
        who: str = "Evaluator",
    ) -> None:
        self.model = model
        self.batch_processor = batch_processor
        self.seed = seed
        if type(seed) is not int or seed < 0:
            raise PipelineConfigError(f"{who}: seed must be an int >= 0, got {seed!r}")
        self._accelerator = accelerator
        self._who = who
        rank, processes = 0, 1
        if accelerator is not None and accelerator.num_processes > 1:
            rank, processes = accelerator.process_index, accelerator.num_processes
            if accelerator.distributed_type in _DIVIDING and not accelerator.is_fsdp2:
                raise PipelineConfigError(
                    f"{who}: a model whose parts lie on several processes "
                    f"({accelerator.distributed_type.value}) can't be evaluated, since the ranks "
                    "may have different numbers of batches; save it, and evaluate it in one "
                    "process, or shard it by FSDP's second version"
                )
        self._sharded = processes > 1 and is_sharded_model(model)
        if not isinstance(metrics, TorchMetrics):
            metrics = TorchMetrics(metrics, who)
        self._metrics = metrics
        self._arguments = MetricArguments(metric_inputs, batch_processor, who)
        self._count = getattr(batch_processor, "count_samples", None) or count_samples
        self._loaders = {
            name: EvaluationLoader(name, loader, rank, processes, who)
            for name, loader in check_dataloaders(dataloaders, who).items()
        }
        self._non_blocking = {
            name: bool(getattr(loader, "pin_memory", False)) for name, loader in dataloaders.items()
        }
        if "loss" in self._metrics.names():
            raise PipelineConfigError(
                f"{who}: a metric is named 'loss', which is the name of the mean loss; "
                "give it another"
            )

    def evaluate(self) -> dict[str, float]:
        """The values ``<loader>/loss`` and ``<loader>/<metric>`` of all ranks, on every rank.

        Raises:
            DataError: a loader gave no batch.
            BatchProcessorError: the processor returned something else than outputs and loss, and
                maybe what that weighs.
            MetricValueError: a metric computed something else than numbers.
        """
        return resolve(self.run(), self._accelerator)  # waits for the device; a collective

    def run(self, prefix: str = "") -> DeferredMetrics:
        """Evaluate, and leave it to the caller to read the values, named behind ``prefix``."""
        sources = {
            f"{name}.{key}": source
            for name, loader in self._loaders.items()
            for key, source in loader.generators.items()
        }
        with ExitStack() as stack:
            stack.enter_context(isolated_rng(sources))
            stack.enter_context(first_rank_buffers(self._module_of_all_ranks()))
            stack.enter_context(evaluation_mode(self.model))
            stack.callback(reshard, self.model)
            # Not inference_mode: compiled and sharded models keep tensors for the training.
            stack.enter_context(torch.no_grad())
            parts = [
                part
                for name, loader in self._loaders.items()
                for part in self._measure(
                    loader, f"{prefix}{name}/", non_blocking=self._non_blocking[name]
                )
            ]
        return JoinedMetrics(parts)

    def _module_of_all_ranks(self) -> torch.nn.Module | None:
        """The model, where each rank has one; without DDP."""
        ddp = ddp_of(self.model)
        return ddp.module if ddp is not None else self.model if self._sharded else None

    def _measure(
        self, loader: EvaluationLoader, prefix: str, non_blocking: bool
    ) -> Sequence[DeferredMetrics]:
        # Without DDP, whose forward exchanges, since ranks may have different numbers of batches.
        ddp = ddp_of(self.model)
        model: torch.nn.Module = self.model if ddp is None else ddp.module
        device = _device_of(model)
        moves = self._accelerator is None or self._accelerator.device_placement
        metrics = self._metrics
        metrics.to(device)
        metrics.reset()
        loss_sum = WeightedSum()
        in_precision = self._precision(model)
        for batch, counts in loader.batches(self.seed, even=self._sharded):
            if moves and device.type != "cpu":
                batch = send_to_device(batch, device, non_blocking=non_blocking)
            with in_precision():
                outputs, loss, weight = self._forward(model, batch)
            if not counts:  # it took part in what the ranks do together within the model
                continue
            if loss is not None:
                loss_sum.add(loss, self._count(batch) if weight is None else weight)
            if len(metrics):
                args, kwargs = self._arguments(outputs, batch)
                metrics.update(*args, **kwargs)
            record_heartbeat()
        parts: list[DeferredMetrics] = [MeanLoss(f"{prefix}loss", loss_sum, device)]
        if len(metrics):
            parts.append(metrics.snapshot(metrics.pop_states(), prefix))
        return parts

    def _precision(self, model: torch.nn.Module) -> Callable[[], AbstractContextManager[Any]]:
        """Makes a context in which it runs as prepared, whose forward has its precision in it."""
        accelerator = self._accelerator
        if accelerator is None or hasattr(model, "_original_forward"):
            return nullcontext
        # A context that changes nothing takes it 3 us.
        return accelerator.autocast if accelerator.native_amp else nullcontext

    def _forward(self, model: torch.nn.Module, batch: Any) -> tuple[Any, Any, Any]:
        """Outputs, loss, and what that weighs where the processor says so."""
        result = self.batch_processor.forward(model, batch)
        # A tensor of two rows would unpack as well, hence the check of the type.
        if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
            raise self._wrong_result(type(result).__name__)
        outputs, loss, weight = (*result, None)[:3]
        if loss is not None and not (isinstance(loss, torch.Tensor) and loss.numel() == 1):
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
            raise self._wrong_result(f"a loss that is a {type(loss).__name__}{shape}")
        if loss is not None and weight is not None:
            weight = as_loss_weight(weight, loss)
            loss = zero_if_unweighted(loss, weight)
        return outputs, loss, weight

    def _wrong_result(self, found: str) -> BatchProcessorError:
        return BatchProcessorError(
            f"{self._who}: {type(self.batch_processor).__name__}.forward must return (outputs, "
            "loss), with a scalar tensor or None as loss, or (outputs, loss, weight); got "
            f"{found}"
        )


def _device_of(model: torch.nn.Module) -> torch.device:
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


__all__ = ["Evaluator", "check_dataloaders"]
