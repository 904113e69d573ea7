"""Evaluation of a model's loss and metrics, alone or within a training run."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device

from robo_orchard_lab.pipeline.batch_processor import (
    BatchProcessor,
    as_loss_weight,
    count_samples,
    zero_if_unweighted,
)
from robo_orchard_lab.pipeline.data.evaluation_loader import (
    EvaluationLoader,
    MaxBatches,
    check_dataloaders,
    check_max_batches,
)
from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat
from robo_orchard_lab.pipeline.errors import BatchProcessorError, PipelineConfigError
from robo_orchard_lab.pipeline.isolation import isolated_evaluation
from robo_orchard_lab.pipeline.metrics import DeferredMetrics, WeightedSum, resolve
from robo_orchard_lab.pipeline.metrics.exchange import RankGather, StateReduction
from robo_orchard_lab.pipeline.metrics.torchmetrics import (
    MetricArguments,
    MetricInputs,
    MetricsLike,
    TorchMetrics,
)
from robo_orchard_lab.pipeline.model import autocast_context
from robo_orchard_lab.pipeline.out_of_memory import explain_evaluation
from robo_orchard_lab.pipeline.predictions import Predictions
from robo_orchard_lab.pipeline.sharding import is_sharded_model

_LOSS = "loss"
_Losses: TypeAlias = list[tuple[str, torch.Tensor | float]]
_UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Evaluator:
    """Mean loss and metrics of a model on named loaders; each sample counts once.

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

    The model runs in evaluation mode without gradients. Afterwards, also after an error, the modes
    of its modules, its buffers and all RNGs are restored. Random numbers depend on ``seed``.

    With several processes, each rank evaluates a share of the batches, without padding or repeats,
    and gets the values of all ranks: one transfer and one collective at the end. A model with
    buffers needs one collective more: all ranks use the first rank's buffers. With FSDP2, a rank
    may repeat another rank's batch, which does not count.

    If the processor defines ``evaluation_forward(model, batch)``, it replaces ``forward``. It
    returns outputs and a loss, None, or named values: ``(outputs, {"loss": ..., "l1": ...})``, as
    tensors of one element or numbers; a name without a value in a batch has None. A third item is
    the weight of all values. Losses of several optimizers, which ``forward`` returns by name or
    yields, are named ``loss/<optimizer>``.

    Args:
        model: prepared by ``accelerator`` or not; stays on its device.
        batch_processor: returns outputs and loss. Values are means over samples, or weighted by the
            weight that the processor returns; batches without a loss do not count. A value whose
            weights are all 0 is NaN.
        dataloaders: loaders by name, divided as :class:`EvaluationLoader` describes.
        max_batches: limit of batches of each loader, or by its name: the first ones of the job.
        metrics: torchmetrics by name, or a collection; copied.
        metric_inputs: see :class:`MetricArguments`.
        accelerator: processes and precision; None for a single process.
        seed: seed of all random numbers, >= 0.
        who: prefix of error messages.

    Raises:
        PipelineConfigError: no loader, a loader that is divided among the processes, an unknown
            kind of metric, or an unsupported kind of sharding.
        DataError: a loader is known to be empty.
        MetricValueError: a metric is known to compute no single number.
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
        max_batches: MaxBatches = None,
        seed: int = 0,
        who: str = "Evaluator",
    ) -> None:
        self.model = model
        self.batch_processor = batch_processor
        self._own_step = getattr(batch_processor, "evaluation_forward", None)
        if self._own_step is not None and not callable(self._own_step):
            raise PipelineConfigError(
                f"{who}: {type(batch_processor).__name__}.evaluation_forward must be callable as "
                f"evaluation_forward(model, batch), got {type(self._own_step).__name__}"
            )
        self.seed = seed
        if type(seed) is not int or seed < 0:
            raise PipelineConfigError(f"{who}: seed must be an int >= 0, got {seed!r}")
        self._accelerator = accelerator
        self._who = who
        rank, processes = 0, 1
        if accelerator is not None and accelerator.num_processes > 1:
            rank, processes = accelerator.process_index, accelerator.num_processes
            if accelerator.distributed_type in _UNSUPPORTED and not accelerator.is_fsdp2:
                raise PipelineConfigError(
                    f"{who}: a model sharded by {accelerator.distributed_type.value} can't be "
                    "evaluated on ranks with different numbers of batches; save the model and "
                    "evaluate it in one process, or shard it by FSDP2"
                )
        self._processes = processes
        self._is_sharded = processes > 1 and is_sharded_model(model)
        if not isinstance(metrics, TorchMetrics):
            metrics = TorchMetrics(metrics, who)
        self._metrics = metrics
        self._metric_arguments = MetricArguments(metric_inputs, batch_processor, who)
        self._counter = getattr(batch_processor, "count_samples", None)
        loaders = check_dataloaders(dataloaders, who)
        limits = check_max_batches(max_batches, loaders, who)
        self._loaders = {
            name: EvaluationLoader(name, loader, rank, processes, who, limits[name])
            for name, loader in loaders.items()
        }
        self._pinned = {
            name for name, loader in dataloaders.items() if getattr(loader, "pin_memory", False)
        }
        if "loss" in self._metrics.names():
            raise PipelineConfigError(
                f"{who}: a metric is named 'loss', as the mean loss; rename the metric"
            )

    def evaluate(self, label: str = "") -> dict[str, float]:
        """Return ``<loader>/loss`` and ``<loader>/<metric>`` of all ranks, on every rank.

        Args:
            label: as in :meth:`run`.

        Raises:
            DataError: a loader had no batch.
            BatchProcessorError, MetricValueError: a result of the processor or of a metric has the
                wrong type.
        """
        return resolve(self.run(label=label), self._accelerator)  # a device sync; a collective

    def run(self, prefix: str = "", label: str = "") -> DeferredMetrics:
        """Evaluate without reading the values from the device.

        Args:
            prefix: begin of the names.
            label: name to insert between loader and value, for several evaluations of a loader.
        """
        parts: list[DeferredMetrics] = []
        with self._isolated() as model:
            for name, loader in self._loaders.items():
                full = f"{prefix}{name}/{label}{'/' * bool(label)}"
                parts.append(self._losses(model, loader, full, self._metrics))
                if len(self._metrics):
                    states = self._metrics.pop_states()
                    parts.append(self._metrics.snapshot(states, full))
        return _JoinedMetrics(parts)

    def find_value_names(self) -> dict[str, list[str]]:
        """Return the names of each loader's values, found in the first batch of each rank.

        Metrics are not updated. A device sync, and a collective.

        Raises:
            PipelineConfigError: there is nothing to measure: neither a loss nor a metric.
        """
        found: dict[str, list[str]] = {}
        with self._isolated() as model:
            for name, loader in self._loaders.items():
                losses = self._losses(model, loader, "", limit=self._processes)
                resolve(losses, self._accelerator)
                found[name] = [*losses.seen, *self._metrics.names()]
        for name, values in found.items():
            if not values:
                raise PipelineConfigError(
                    f"{self._who}: there is nothing to measure on dataloaders[{name!r}]: "
                    f"{self._step_name} returns no loss, and there are no metrics; return a loss "
                    "or named values from evaluation_forward(model, batch), or pass "
                    "metrics={'accuracy': ...}"
                )
        return found

    @property
    def knows_value_names(self) -> bool:
        """True if the values are known to be one loss and the metrics, before the first batch."""
        processor = self.batch_processor
        return (
            self._own_step is None
            and processor.need_backward
            and not inspect.isgeneratorfunction(processor.forward)
        )

    def predict(self) -> dict[str, Predictions]:
        """Return the outputs for each sample of each loader, of all ranks and on every rank.

        In the order of the loader. Outputs travel to the host and to all ranks batch by batch: a
        device sync and a collective for each batch.

        Raises:
            DataError: a loader had no batch.
            BatchProcessorError: the outputs have no row for each sample.
        """
        found: dict[str, Predictions] = {}
        gather = RankGather()
        with self._isolated() as model:
            for name, loader in self._loaders.items():
                predictions = found[name] = Predictions(self._step_name)

                def add(
                    batch: Any, indices: Any, outputs: Any, *_: Any, into: Predictions = predictions
                ) -> None:
                    count = count_samples(batch) if indices is None else len(indices)
                    own = into.rows_of(outputs, count, indices)
                    for rows in gather(own, self._accelerator):  # a device sync; a collective
                        into.add(rows)

                self._each_batch(model, loader, add, even=self._processes > 1)
        return found

    @property
    def _step_name(self) -> str:
        step = "forward" if self._own_step is None else "evaluation_forward"
        return f"{type(self.batch_processor).__name__}.{step}"

    def _isolated(self) -> AbstractContextManager[Any]:
        generators = {
            f"{name}.{path}": generator
            for name, loader in self._loaders.items()
            for path, generator in loader.generators.items()
        }
        return isolated_evaluation(self.model, generators, processes=self._processes)

    def _losses(
        self,
        model: Any,
        loader: EvaluationLoader,
        prefix: str,
        metrics: TorchMetrics | None = None,
        limit: int | None = None,
    ) -> _MeanLosses:
        """Evaluate a loader: return the losses, and update the metrics."""
        device = _device_of(model)
        metrics = metrics if metrics is not None and len(metrics) else None
        if metrics is not None:
            metrics.to(device)
            metrics.reset()
        sums: dict[str, WeightedSum] = {}

        def add(batch: Any, indices: Any, outputs: Any, losses: _Losses, weight: Any) -> None:
            if indices is not None and len(indices) == 0:
                return  # only joined the collectives of a sharded model
            if losses and weight is None:
                is_known = indices is not None and self._counter is None
                weight = len(indices) if is_known else (self._counter or count_samples)(batch)
            for name, loss in losses:
                if name not in sums:
                    self._check_name(name)
                    sums[name] = WeightedSum()
                sums[name].add(loss, weight)
            if metrics is not None:
                args, kwargs = self._metric_arguments(outputs, batch)
                metrics.update(*args, **kwargs)

        self._each_batch(model, loader, add, even=self._is_sharded, limit=limit)
        return _MeanLosses(prefix, sums, device)

    def _each_batch(
        self,
        model: Any,
        loader: EvaluationLoader,
        use: Callable[[Any, Any, Any, _Losses, Any], None],
        *,
        even: bool,
        limit: int | None = None,
    ) -> None:
        """Call ``use(batch, indices, outputs, losses, weight)`` for this rank's batches."""
        device = _device_of(model)
        places = self._accelerator is None or self._accelerator.device_placement
        autocast = autocast_context(self._accelerator)
        batches = loader.batches(self.seed, even=even, limit=limit)
        for count, (batch, indices) in enumerate(batches):
            try:
                if places and device.type != "cpu":
                    non_blocking = loader.name in self._pinned
                    batch = send_to_device(batch, device, non_blocking=non_blocking)
                with autocast():
                    outputs, losses, weight = self._forward(model, batch)
                use(batch, indices, outputs, losses, weight)
                record_heartbeat()
            except Exception as error:
                explain_evaluation(error, batch, loader.name, count)
                raise

    def _forward(self, model: Any, batch: Any) -> tuple[Any, _Losses, Any]:
        """Return outputs, losses by name, and their weight or None."""
        own = self._own_step
        result = self.batch_processor.forward(model, batch) if own is None else own(model, batch)
        if isinstance(result, Generator):
            return self._steps(result)
        # The type is checked since a tensor of two rows would unpack as well.
        if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
            raise self._wrong_result(type(result).__name__)
        outputs, loss, weight = (*result, None)[:3]
        named = loss if isinstance(loss, Mapping) else {_LOSS: loss}
        for name in named:
            if not isinstance(name, str) or not name:
                raise self._wrong_result(f"a value named {name!r}, which is no name")
        prefix = f"{_LOSS}/" if own is None and named is loss else ""  # names of optimizers
        losses = [(f"{prefix}{name}", value) for name, value in named.items() if value is not None]
        for name, value in losses:
            self._check_scalar(name, value, is_named=named is loss)
        if weight is not None and losses:
            tensors = (value for _, value in losses if isinstance(value, torch.Tensor))
            weight = as_loss_weight(weight, next(tensors, torch.zeros(())))
            losses = [(name, _zero_if_unweighted(value, weight)) for name, value in losses]
        return outputs, losses, weight

    def _steps(self, steps: Generator[Any, Any, Any]) -> tuple[Any, _Losses, None]:
        """Run a ``forward`` of several optimizers without updates."""
        losses: _Losses = []
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value, losses, None
            if not isinstance(step, tuple) or len(step) != 2 or not isinstance(step[0], str):
                raise self._wrong_result(f"a yielded {type(step).__name__}")
            self._check_scalar(*step, is_named=True)
            losses.append((f"{_LOSS}/{step[0]}", step[1]))

    def _check_scalar(self, name: str, value: Any, *, is_named: bool) -> None:
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            return
        if is_named and isinstance(value, (int, float)):
            return
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
        what = f"a value named {name!r}" if is_named else "a loss"
        raise self._wrong_result(f"{what} that is a {type(value).__name__}{shape}")

    def _check_name(self, name: str) -> None:
        if name in self._metrics.names():
            raise PipelineConfigError(
                f"{self._who}: {self._step_name} and a metric both have a value named {name!r}; "
                "rename one of them"
            )

    def _wrong_result(self, found: str) -> BatchProcessorError:
        values = "a scalar tensor or None as loss"
        if self._own_step is not None:
            values = "a scalar tensor, a mapping from names to scalars, or None as loss"
        return BatchProcessorError(
            f"{self._who}: {self._step_name} must return (outputs, loss), with {values}, or "
            f"(outputs, loss, weight); got {found}"
        )


def _device_of(model: Any) -> torch.device:
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _zero_if_unweighted(value: torch.Tensor | float, weight: torch.Tensor) -> torch.Tensor:
    value = value if isinstance(value, torch.Tensor) else weight.new_full((), value)
    return zero_if_unweighted(value, weight)


class _MeanLosses:
    """Deferred weighted means over all ranks, by name.

    A rank without batches knows no names, so names travel with the sums. A name has no value if no
    rank has a loss of it, and NaN if all its weights are 0.
    """

    def __init__(self, prefix: str, sums: Mapping[str, WeightedSum], device: torch.device) -> None:
        self._prefix = prefix
        # The first name is the same on all ranks.
        self._names = list(dict.fromkeys(f"{prefix}{name}" for name in (_LOSS, *sums)))
        text = "".join(f"{json.dumps(name)}\n" for name in sums)
        none = WeightedSum().to_tensor(device)[None][:0]
        self._states = (
            torch.tensor(list(text.encode()), dtype=torch.uint8),
            torch.cat([none, *(total.to_tensor(device)[None] for total in sums.values())]),
        )
        self.seen: list[str] = []
        """Names of all ranks, also without a value; empty before :meth:`values`."""

    def names(self) -> Sequence[str]:
        return self._names

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [(state, "cat") for state in self._states]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        text, rows = reduced
        totals: dict[str, list[float]] = {}
        names = map(json.loads, bytes(text.tolist()).decode().splitlines())
        for name, row in zip(names, rows.tolist(), strict=True):
            totals[name] = [*map(sum, zip(totals.get(name, (0.0, 0.0)), row, strict=True))]
        self.seen = list(totals)
        self._names = [f"{self._prefix}{name}" for name in totals]
        means = [total / weight if weight else math.nan for total, weight in totals.values()]
        return dict(zip(self._names, means, strict=True))


class _JoinedMetrics:
    """Several deferred metrics as one."""

    def __init__(self, parts: Sequence[DeferredMetrics]) -> None:
        self._parts = parts

    def names(self) -> Sequence[str]:
        return [name for part in self._parts for name in part.names()]

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [state for part in self._parts for state in part.states()]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        values: dict[str, float] = {}
        remaining = iter(reduced)
        for part in self._parts:
            values.update(part.values([next(remaining) for _ in part.states()]))
        return values
