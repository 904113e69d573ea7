"""Evaluation of a model's loss and metrics, alone or within a training run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import DistributedType, send_to_device
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

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
from robo_orchard_lab.pipeline.isolation import evaluation_isolation
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import DeferredMetrics, WeightedSum, resolve
from robo_orchard_lab.pipeline.metrics.exchange import StateReduction
from robo_orchard_lab.pipeline.metrics.torchmetrics import (
    MetricArguments,
    MetricInputs,
    MetricsLike,
    TorchMetrics,
)
from robo_orchard_lab.pipeline.model import ModuleOfDDP, autocast_context, ddp_of
from robo_orchard_lab.pipeline.out_of_memory import explain_evaluation
from robo_orchard_lab.pipeline.sharding import is_sharded_model

logger = job_logger(__name__)

_END = object()
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

    Raises:
        PipelineConfigError: the loader is divided among the processes already.
    """

    def __init__(
        self, name: str, loader: Iterable[Any], rank: int, processes: int, who: str
    ) -> None:
        self.name = name
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

    def batches(self, seed: int, *, even: bool = False) -> Iterator[tuple[Any, int | None]]:
        """Yield this rank's batches, each with its number of samples; None if unknown.

        Advances the global RNGs and :attr:`generators`; the caller restores them. ``even`` yields
        equally many batches on all ranks: a rank with fewer repeats another rank's batch, with 0
        samples.

        Raises:
            DataError: at the end, on all ranks: no rank had a batch.
        """
        rng.seed_rng(seed, cuda=True)
        rng.seed_generators(self.generators, seed)
        first, stride = 0, 1
        if self._order is not None:
            order = list(self._order)  # before the ranks draw different random numbers
            self._own_batches[:] = order[self._rank :: self._processes]
            if even and self._lacks_one(len(order)):
                self._own_batches.append(order[0])
            first, stride = self._rank, self._processes
        with worker_startup():
            batches = iter(self._loader)
        index = first
        other: Any = None
        while True:
            batch_seed = rng.indexed_seed(seed, 1 + index)
            rng.seed_rng(batch_seed, cuda=True)
            rng.seed_generators(self._dataset_generators, batch_seed)
            batch = next(batches, _END)
            if batch is _END:
                break
            if self._order is not None:
                indices = self._own_batches[index // self._processes]
                known = len(indices) if self._has_sample_indices else None
                yield batch, known if index < len(order) else 0
            elif index % self._processes == self._rank:
                yield batch, None
            elif even:
                other = batch
            index += stride
        count = index if self._order is None else len(order)
        if count == 0:
            raise _no_batch(self.name, self._who)
        if even and self._order is None and self._lacks_one(count):
            yield other, 0

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
    and gets the values of all ranks: one transfer and one collective at the end. Models with
    buffers need one collective more: all ranks use the first rank's buffers. With
    FSDP2, a rank may repeat another rank's batch, which does not count.

    Args:
        model: prepared by ``accelerator`` or not; stays on its device.
        batch_processor: returns outputs and loss. The loss is weighted by the number of samples,
            or by the weight that the processor returns; batches without a loss do not count.
        dataloaders: loaders by name, divided as :class:`EvaluationLoader` describes.
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
            if accelerator.distributed_type in _UNSUPPORTED and not accelerator.is_fsdp2:
                raise PipelineConfigError(
                    f"{who}: a model sharded by {accelerator.distributed_type.value} can't be "
                    "evaluated on ranks with different numbers of batches; save the model and "
                    "evaluate it in one process, or shard it by FSDP2"
                )
        self._has_ranks = processes > 1
        self._is_sharded = processes > 1 and is_sharded_model(model)
        if not isinstance(metrics, TorchMetrics):
            metrics = TorchMetrics(metrics, who)
        self._metrics = metrics
        self._metric_arguments = MetricArguments(metric_inputs, batch_processor, who)
        self._counter = getattr(batch_processor, "count_samples", None)
        self._loaders = {
            name: EvaluationLoader(name, loader, rank, processes, who)
            for name, loader in check_dataloaders(dataloaders, who).items()
        }
        self._pinned = {
            name for name, loader in dataloaders.items() if getattr(loader, "pin_memory", False)
        }
        if "loss" in self._metrics.names():
            raise PipelineConfigError(
                f"{who}: a metric is named 'loss', as the mean loss; rename the metric"
            )

    def evaluate(self) -> dict[str, float]:
        """Return ``<loader>/loss`` and ``<loader>/<metric>`` of all ranks, on every rank.

        Raises:
            DataError: a loader had no batch.
            BatchProcessorError, MetricValueError: a result of the processor or of a metric has the
                wrong type.
        """
        return resolve(self.run(), self._accelerator)  # a device sync; a collective

    def run(self, prefix: str = "") -> DeferredMetrics:
        """Evaluate without reading the values from the device; names begin with ``prefix``."""
        generators = {
            f"{name}.{path}": generator
            for name, loader in self._loaders.items()
            for path, generator in loader.generators.items()
        }
        ddp = ddp_of(self.model)
        unwrapped = self.model if ddp is None else ddp.module
        shared = unwrapped if ddp is not None or self._has_ranks else None
        # Without DDP's communication: ranks may have different numbers of batches.
        model = unwrapped if ddp is None else ModuleOfDDP(ddp, runs_hooks=False)
        parts: list[DeferredMetrics] = []
        with evaluation_isolation(self.model, shared, generators):
            for name, loader in self._loaders.items():
                parts += self._evaluate_loader(
                    model, loader, f"{prefix}{name}/", non_blocking=name in self._pinned
                )
        return _JoinedMetrics(parts)

    def _evaluate_loader(
        self, model: Any, loader: EvaluationLoader, prefix: str, non_blocking: bool
    ) -> Sequence[DeferredMetrics]:
        tensors = chain(model.parameters(), model.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        places = self._accelerator is None or self._accelerator.device_placement
        metrics = self._metrics
        metrics.to(device)
        metrics.reset()
        loss_sum = WeightedSum()
        autocast = autocast_context(self._accelerator)
        batches = loader.batches(self.seed, even=self._is_sharded)
        for count, (batch, samples) in enumerate(batches):
            try:
                if places and device.type != "cpu":
                    batch = send_to_device(batch, device, non_blocking=non_blocking)
                with autocast():
                    outputs, loss, weight = self._forward(model, batch)
                if samples == 0:  # only joined the collectives of a sharded model
                    continue
                if loss is not None:
                    if weight is None and self._counter is None:
                        weight = samples  # known from the indices
                    loss_sum.add(
                        loss, (self._counter or count_samples)(batch) if weight is None else weight
                    )
                if len(metrics):
                    args, kwargs = self._metric_arguments(outputs, batch)
                    metrics.update(*args, **kwargs)
                record_heartbeat()
            except Exception as error:
                explain_evaluation(error, batch, loader.name, count)
                raise
        parts: list[DeferredMetrics] = [_MeanLoss(f"{prefix}loss", loss_sum, device)]
        if len(metrics):
            parts.append(metrics.snapshot(metrics.pop_states(), prefix))
        return parts

    def _forward(self, model: Any, batch: Any) -> tuple[Any, Any, Any]:
        """Return outputs, loss, and the loss's weight or None."""
        result = self.batch_processor.forward(model, batch)
        # The type is checked since a tensor of two rows would unpack as well.
        if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
            raise self._wrong_result(type(result).__name__)
        outputs, loss, weight = (*result, None)[:3]
        if loss is None:
            return outputs, None, None
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
            raise self._wrong_result(f"a loss that is a {type(loss).__name__}{shape}")
        if weight is not None:
            weight = as_loss_weight(weight, loss)
            loss = zero_if_unweighted(loss, weight)
        return outputs, loss, weight

    def _wrong_result(self, found: str) -> BatchProcessorError:
        return BatchProcessorError(
            f"{self._who}: {type(self.batch_processor).__name__}.forward must return (outputs, "
            f"loss), with a scalar tensor or None as loss, or (outputs, loss, weight); got {found}"
        )


class _MeanLoss:
    """Deferred weighted mean over all ranks; has no value if no rank has a loss."""

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
