"""Copies of the user's loader, without Accelerate's wrappers, and its shard for this process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    prepare_data_loader,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from robo_orchard_lab.pipeline.data.random_generators import iter_samplers
from robo_orchard_lab.pipeline.data.workers import IgnoreSignals
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger

logger = job_logger(__name__)

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def is_map_style(loader: Any) -> bool:
    """Return True for a ``DataLoader`` of a map-style dataset with torch's iteration."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


def batches_of(loader: DataLoader[Any]) -> Any:
    """Return the batch sampler, or the sampler of a loader without automatic batching."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def explain_no_batch(loader: Any) -> str:
    """Return the likely cause and remedy of a pass over the data without a batch."""
    loader = getattr(loader, "base_dataloader", loader)
    if not is_map_style(loader):
        return (
            "an iterator can be read only once: pass an iterable that can be iterated every epoch"
        )
    batches = batches_of(loader)
    if not getattr(batches, "drop_last", False):
        return "its dataset or its sampler yields no sample"
    return (
        f"its {len(loader.dataset)} samples are less than one step of all processes, with "
        f"{getattr(batches, 'batch_size', None)} samples on each, and drop_last=True drops them: "
        "pass drop_last=False, a smaller batch_size or more data"
    )


def copy_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Return a ``DataLoader`` with equal options, except ``changes``.

    Args:
        loader: the loader to copy.
        changes: options; must include a sampler, a batch sampler or ``batch_size``.
    """
    options = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "in_order": getattr(loader, "in_order", True),  # missing in torchdata's loader
    }
    with warnings.catch_warnings(action="ignore"):  # the original has issued them
        return DataLoader(**{**options, **changes})


def _with_batches(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    if loader.batch_sampler is None:
        return copy_loader(loader, batch_size=None, sampler=batches)
    return copy_loader(loader, batch_sampler=batches)


def unwrap_loader(loader: Iterable[Any], accelerator: Accelerator) -> Iterable[Any]:
    """Return the loader to iterate in an exact order.

    A map-style loader is returned as the user made it, without Accelerate's or torchdata's wrapper:
    its position is known without their state. ``use_seedable_sampler`` with a ``data_seed`` keeps
    Accelerate's sampler; ``dispatch_batches`` has no effect.

    Any other loader is returned as is, unless the accelerator's configuration requests
    ``dispatch_batches`` or ``use_stateful_dataloader``: then Accelerate wraps the loader.

    Raises:
        PipelineConfigError: the loader was made by ``accelerate.skip_first_batches``.
    """
    is_prepared = isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))
    base: Any = loader.base_dataloader if is_prepared else loader  # type: ignore[attr-defined]  # of both
    has_index = isinstance(base, DataLoader) and not isinstance(base.dataset, IterableDataset)
    if has_index and (_is_torchdata(base) or (is_prepared and is_map_style(base))):
        loader = _original(base)
    config = accelerator.dataloader_config
    if isinstance(loader, DataLoader) and is_map_style(loader):
        if not loader.in_order:
            logger.warning(
                "the data loader has in_order=False; batches are yielded in order nevertheless, so "
                "that a run can be resumed"
            )
        if config.use_seedable_sampler and config.data_seed is not None:
            return _with_seedable_sampler(loader, config.data_seed)
        return loader
    has_ranks = accelerator.num_processes > 1
    dispatches = has_ranks and config.dispatch_batches is not None
    can_wrap = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if is_prepared or not can_wrap or not (dispatches or config.use_stateful_dataloader):
        return loader
    wrapped: Any
    if dispatches or not has_ranks:
        wrapped = accelerator.prepare(loader)
    else:
        wrapped = prepare_data_loader(
            loader, num_processes=1, process_index=0, use_stateful_dataloader=True
        )
    inner = wrapped.base_dataloader  # a copy of the user's
    inner.worker_init_fn = IgnoreSignals(inner.worker_init_fn)
    return wrapped  # type: ignore[no-any-return]  # an iterable


def _is_torchdata(loader: DataLoader[Any]) -> bool:
    return type(loader).__module__.startswith("torchdata.")


def _original(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a map-style loader without the batch samplers of Accelerate or torchdata."""
    batches = batches_of(loader)
    if isinstance(batches, SkipBatchSampler):
        raise PipelineConfigError(
            "the data loader was made by accelerate.skip_first_batches, which skips the same "
            "batches in every epoch; pass the original loader: a resumed run seeks its position"
        )
    if isinstance(batches, BatchSamplerShard):
        batches = _without_accelerate_generator(batches.batch_sampler, loader)
    elif _is_torchdata(loader) and isinstance(batches, BatchSampler):
        batches = BatchSampler(batches.sampler, batches.batch_size, batches.drop_last)
    return _with_batches(loader, batches)


def _without_accelerate_generator(batches: Any, loader: DataLoader[Any]) -> Any:
    """Remove a sampler's generator if Accelerate set it, for several processes.

    Accelerate seeds it with a random 63-bit number, a user with the default or 32 bits.
    """
    sampler: Any = getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or type(sampler) not in _RANDOM_SAMPLERS:
        return batches
    seed = None if sampler.generator is None else sampler.generator.initial_seed()
    is_users = seed is None or seed == torch.Generator().initial_seed() or seed < 2**32
    if is_users or loader.generator is not None:
        return batches
    original: Any = copy.copy(sampler)
    original.generator = None
    return BatchSampler(original, batches.batch_size, batches.drop_last)


def _with_seedable_sampler(loader: DataLoader[Any], data_seed: int) -> DataLoader[Any]:
    batches = batches_of(loader)
    sampler = getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or type(sampler) is not RandomSampler:
        return loader
    seedable = SeedableRandomSampler(
        sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler.num_samples,
        generator=sampler.generator,
        data_seed=data_seed,
    )
    return _with_batches(loader, BatchSampler(seedable, batches.batch_size, batches.drop_last))


@dataclass(frozen=True, slots=True)
class BatchShard:
    """Share of the batches of this process."""

    processes: int = 1
    """Number of processes that load different batches."""
    rank: int = 0
    split: bool = False
    """Split each batch among the processes, as Accelerate's ``split_batches``."""


def find_batch_shard(loader: Any, accelerator: Accelerator) -> BatchShard:
    """Return this process's shard of a loader; iterable datasets must shard themselves.

    Raises:
        PipelineConfigError: the sampler is a ``DistributedSampler``, or ``split_batches`` is set
            and the batch size is not divisible.
    """
    shard = _configured_shard(accelerator)
    if shard.processes == 1:
        return shard
    if not is_map_style(loader):
        if isinstance(loader, DataLoaderDispatcher) or isinstance(
            getattr(loader, "dataset", None), IterableDatasetShard
        ):
            return shard
        logger.warning(
            "each of the %d processes trains on all batches of its own loader: iterable data must "
            "shard itself by rank; or set DataLoaderConfiguration(dispatch_batches=True)",
            accelerator.num_processes,
        )
        return BatchShard()
    for name, sampler in iter_samplers(loader):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise PipelineConfigError(
                f"the data loader's {name} is a DistributedSampler, which divides the samples "
                f"among {sampler.num_replicas} processes already; leave it out: the trainer "
                "divides them"
            )
    batches = batches_of(loader)
    if loader.batch_sampler is None and not isinstance(batches, BatchSampler):
        return BatchShard(shard.processes, shard.rank)  # the dataset makes complete batches
    size = getattr(batches, "batch_size", None)
    if shard.split and (size is None or size % shard.processes != 0):
        raise PipelineConfigError(
            f"split_batches=True requires a batch size divisible by {shard.processes} processes, "
            f"got {size}; change the batch size or leave out split_batches"
        )
    return shard


def _configured_shard(accelerator: Accelerator) -> BatchShard:
    """Return the shard by Accelerate's configuration; tensor-parallel ranks have equal shards."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None and mesh.mesh_dim_names:
        size = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        rank //= size.get("tp", 1) * size.get("cp", 1)
        processes = size.get("dp_shard", 1) * size.get("dp_replicate", 1)
    return BatchShard(processes, rank, accelerator.dataloader_config.split_batches)


def set_epoch_of(loader: Any, epoch_id: int) -> None:
    """Call ``set_epoch`` of a loader, or else of its samplers and its dataset."""
    targets = [loader]
    if not hasattr(loader, "set_epoch"):
        samplers = [sampler for _, sampler in iter_samplers(loader)]
        targets += [*samplers, getattr(loader, "dataset", None)]
    for target in targets:
        if hasattr(target, "set_epoch"):
            target.set_epoch(epoch_id)
