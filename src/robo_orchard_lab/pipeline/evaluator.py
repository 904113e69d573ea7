"""Evaluation of a model's loss and metrics, alone or within a training run."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import DistributedType, send_to_device
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.pipeline.batch_processor import (
    BatchProcessor,
    as_loss_weight,
    count_batches,
    count_samples,
    zero_if_unweighted,
)
from robo_orchard_lab.pipeline.data import rng
from robo_orchard_lab.pipeline.data.fetching import IgnoreSignals, worker_startup
from robo_orchard_lab.pipeline.data.loader import batches_of, copy_loader
from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat
from robo_orchard_lab.pipeline.errors import BatchProcessorError, DataError, PipelineConfigError
from robo_orchard_lab.pipeline.isolation import isolated_evaluation
from robo_orchard_lab.pipeline.job_log import job_logger
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

logger = job_logger(__name__)

_END = object()
_LOSS = "loss"
_Losses: TypeAlias = list[tuple[str, torch.Tensor | float]]
MaxBatches: TypeAlias = int | Mapping[str, int] | None
"""Limit of batches of each loader, or limits by the names of loaders; None for no limit."""
_UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_dataloaders(dataloaders: Any, who: str) -> dict[str, Iterable[Any]]:
    """Return the named loaders of an evaluation as a dict.

    Raises:
        PipelineConfigError: ``dataloaders`` is empty or no mapping from names to iterables.
        DataError: a loader is known to be empty.
    """
    if not isinstance(dataloaders, Mapping):
        raise PipelineConfigError(
            f"{who}: dataloaders must be a mapping from names to loaders, got "
            f"{type(dataloaders).__name__}; write dataloaders={{'val': ...}}"
        )
    if not dataloaders:
        raise PipelineConfigError(f"{who}: dataloaders is empty; write dataloaders={{'val': ...}}")
    for name, loader in dataloaders.items():
        if not isinstance(name, str) or not name:
            raise PipelineConfigError(
                f"{who}: names in dataloaders must be non-empty strings, got {name!r}"
            )
        if not isinstance(loader, Iterable):
            raise PipelineConfigError(
                f"{who}: dataloaders[{name!r}] must be an iterable of batches, "
                f"got {type(loader).__name__}"
            )
        if count_batches(loader) == 0:
            raise _no_batch(name, who)
    return dict(dataloaders)


def check_max_batches(limits: MaxBatches, names: Iterable[str], who: str) -> dict[str, int | None]:
    """Return the limit of batches of each loader.

    Raises:
        PipelineConfigError: a limit is below 1, or of an unknown loader.
    """
    names = list(names)
    given = limits if isinstance(limits, Mapping) else dict.fromkeys(names, limits)
    for name, limit in given.items():
        of = f"max_batches[{name!r}]" if given is limits else "max_batches"
        if name not in names:
            advice = suggest_name(name, names, "expected one of")
            raise PipelineConfigError(
                f"{who}.{of}: there is no loader {name!r}; {advice}", setting=("max_batches", name)
            )
        if (limit is not None or given is limits) and (type(limit) is not int or limit < 1):
            raise PipelineConfigError(
                f"{who}.{of}: expected a number of batches >= 1, found {limit!r}; leave it out to "
                "use all batches"
            )
    return {name: given.get(name) for name in names}


def _no_batch(name: str, who: str) -> DataError:
    return DataError(
        f"{who}: the evaluation loader dataloaders[{name!r}] gave no batch; add data, leave out "
        "drop_last, or replace an iterator, which can be read only once, by an iterable that can "
        "be iterated for every evaluation"
    )


class EvaluationLoader:
    """This rank's batches of one loader, in an order equal on all ranks.

    A plain ``DataLoader`` of a map-style dataset is divided before loading: each rank loads its
    own batches, in workers of its own, also while the loader is iterated elsewhere. Any other
    iterable is read completely by every rank, which keeps every n-th batch.

    Random numbers depend on the seed: the order, and for batch i the numbers drawn in the main
    process while batch i is loaded and used, at any world size. Numbers drawn in workers are
    reproducible at one world size.

    With ``max_batches``, the first batches of the complete job are used, the same at any world
    size.

    Raises:
        PipelineConfigError: the loader is divided among the processes already.
    """

    def __init__(
        self,
        name: str,
        loader: Iterable[Any],
        rank: int,
        processes: int,
        who: str,
        max_batches: int | None = None,
    ) -> None:
        self.name = name
        self._max_batches = max_batches
        self._who = who
        self._rank = rank
        self._processes = processes
        self.generators = rng.loader_generators(loader)
        """Random generators of the loader, its samplers and its dataset, by path."""
        self._dataset_generators = rng.dataset_generators(
            "dataset", getattr(loader, "dataset", None)
        )
        self._order: Iterable[Any] | None = None
        self._has_sample_indices = False
        self._own_batches: list[Any] = []
        self._loader = loader
        _check_undivided(name, loader, processes, who)
        if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset):
            self._order = batches_of(loader)
            self._has_sample_indices = (
                loader.batch_sampler is not None or type(self._order) is BatchSampler
            )
            key = "sampler" if loader.batch_sampler is None else "batch_sampler"
            options = {key: self._own_batches}
            self._loader = copy_loader(
                loader,
                **(options if key == "batch_sampler" else {"batch_size": None, **options}),
                worker_init_fn=IgnoreSignals(loader.worker_init_fn),
                in_order=True,
                persistent_workers=False,  # their RNGs would outlive an evaluation
            )
        if getattr(getattr(loader, "batch_sampler", None), "drop_last", False):
            logger.warning(
                "%s: dataloaders[%r] has drop_last=True: samples of a shorter last batch are not "
                "evaluated; leave out drop_last",
                who,
                name,
            )

    def batches(
        self, seed: int, *, even: bool = False, limit: int | None = None
    ) -> Iterator[tuple[Any, Sequence[Any] | None]]:
        """Yield this rank's batches, each with its dataset indices; None if unknown.

        Advances the global RNGs and :attr:`generators`; the caller restores them.

        Args:
            seed: seed of all random numbers.
            even: yield equally many batches on all ranks: a rank with fewer repeats another rank's
                batch, without indices: it does not count.
            limit: use only the first batches of the job, as ``max_batches`` does.

        Raises:
            DataError: at the end, on all ranks: no rank had a batch.
        """
        rng.seed_rng(seed, cuda=True)
        rng.seed_generators(self.generators, seed)
        first, stride = 0, 1
        limit = min(filter(None, (limit, self._max_batches)), default=None)
        if self._order is not None:
            # Before the ranks draw different random numbers.
            order = list(islice(self._order, limit))
            self._own_batches[:] = order[self._rank :: self._processes]
            if even and self._lacks_one(len(order)):
                self._own_batches.append(order[0])
            first, stride = self._rank, self._processes
        with worker_startup():
            batches = iter(self._loader)
        index = first
        other: Any = None
        while self._order is not None or limit is None or index < limit:
            batch_seed = rng.indexed_seed(seed, 1 + index)
            rng.seed_rng(batch_seed, cuda=True)
            rng.seed_generators(self._dataset_generators, batch_seed)
            batch = next(batches, _END)
            if batch is _END:
                break
            if self._order is not None:
                indices = self._own_batches[index // self._processes]
                known = indices if self._has_sample_indices else None
                yield batch, known if index < len(order) else ()
            elif index % self._processes == self._rank:
                yield batch, None
            elif even:
                other = batch
            index += stride
        count = index if self._order is None else len(order)
        if count == 0:
            raise _no_batch(self.name, self._who)
        if even and self._order is None and self._lacks_one(count):
            yield other, ()

    def _lacks_one(self, batches: int) -> bool:
        """Return True if another rank has one batch more than this rank."""
        return 0 < batches % self._processes <= self._rank


def _check_undivided(name: str, loader: Any, processes: int, who: str) -> None:
    if processes > 1 and isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        raise PipelineConfigError(
            f"{who}: dataloaders[{name!r}] was prepared by Accelerate, which repeats batches to "
            f"divide them evenly among {processes} processes; give the plain DataLoader"
        )
    for _, sampler in rng.iter_samplers(loader):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise PipelineConfigError(
                f"{who}: dataloaders[{name!r}] has a DistributedSampler, which repeats samples to "
                "divide them evenly; give a DataLoader without a DistributedSampler"
            )


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
