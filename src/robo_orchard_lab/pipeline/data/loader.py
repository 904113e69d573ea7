"""The loader that a user made, where Accelerate has made another one of it; and copies of one."""

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

from robo_orchard_lab.pipeline.data.fetching import IgnoreSignals
from robo_orchard_lab.pipeline.data.rng import iter_samplers
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger

logger = job_logger(__name__)

_DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def is_map_style(loader: Any) -> bool:
    """Whether it is a ``DataLoader``, and no class that iterates otherwise, of indexed data."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


def explain_no_batch(loader: Any) -> str:
    """What to look at where a pass over the data has had no batch."""
    loader = getattr(loader, "base_dataloader", loader)
    if is_map_style(loader):
        batches = loader if loader.batch_sampler is None else loader.batch_sampler
        size = getattr(batches, "batch_size", None)
        if getattr(batches, "drop_last", False):
            return (
                f"its {len(loader.dataset)} samples are less than one step of all processes takes, "
                f"of {size} samples on each, and drop_last=True drops them: give drop_last=False, "
                "a smaller batch_size or more data"
            )
        return "its dataset or its sampler gives no sample"
    return "an iterator can be read only once: pass an iterable that can be iterated every epoch"


def unwrap_loader(loader: Iterable[Any], accelerator: Accelerator) -> Iterable[Any]:
    """What is to be given an order: one with an index as it was before it was prepared.

    One of torchdata's is taken for a plain one, since its place is known without its state, and
    what is drawn in its workers is no part of that. Loaders without an index are left as they are,
    so that each process reads what its own gives, unless Accelerate is asked to divide the batches
    (``dispatch_batches``) or to save their state (``use_stateful_dataloader``).

    Its seedable sampler takes the place of a ``RandomSampler`` where it is asked for with a
    ``data_seed``; without one, the order follows from a seed anyway. ``dispatch_batches`` means
    nothing to data with an index, of which each process loads its own batches.

    Raises:
        PipelineConfigError: it was made by ``accelerate.skip_first_batches``.
    """
    prepared = isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))
    if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)) and is_map_style(
        loader.base_dataloader
    ):
        loader = _unprepared(loader.base_dataloader)
    elif isinstance(loader, DataLoader) and _is_torchdatas_of_an_index(loader):
        loader = _plain(loader)
    config = accelerator.dataloader_config
    if isinstance(loader, DataLoader) and is_map_style(loader):
        if not loader.in_order:
            logger.warning(
                "the data loader has in_order=False, which gives batches as workers finish them; "
                "they are given in order, so that a resumed run finds them again"
            )
        if config.use_seedable_sampler and config.data_seed is not None:
            return _with_seedable_sampler(loader, config.data_seed)
        return loader
    several = accelerator.num_processes > 1
    divides = several and config.dispatch_batches is not None
    divisible = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if prepared or not divisible or not (divides or config.use_stateful_dataloader):
        return loader
    changed: Any
    if divides or not several:
        changed = accelerator.prepare(loader)
    else:
        changed = prepare_data_loader(
            loader, num_processes=1, process_index=0, use_stateful_dataloader=True
        )
    inner = changed.base_dataloader  # a copy, which is nobody else's
    inner.worker_init_fn = IgnoreSignals(inner.worker_init_fn)
    return changed  # type: ignore[no-any-return]  # an iterable


def copy_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A loader with the same options; ``changes`` has the sampler or batch sampler at least."""
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
        "in_order": getattr(loader, "in_order", True),  # torchdata's has none
    }
    with warnings.catch_warnings(action="ignore"):  # which the first one gave already
        return DataLoader(**{**options, **changes})


def _is_torchdatas_of_an_index(loader: DataLoader[Any]) -> bool:
    torchdatas = type(loader).__module__.startswith("torchdata.")
    return torchdatas and not isinstance(loader.dataset, IterableDataset)


def _plain(loader: DataLoader[Any]) -> DataLoader[Any]:
    batches: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(batches, BatchSampler):
        batches = BatchSampler(batches.sampler, batches.batch_size, batches.drop_last)
    return _made_of(loader, batches)


def _unprepared(loader: DataLoader[Any]) -> DataLoader[Any]:
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(batches, SkipBatchSampler):
        raise PipelineConfigError(
            "the data loader is one of accelerate.skip_first_batches, which skips the same batches "
            "in every epoch; give the loader that it was made of: a resumed run goes to its place"
        )
    if isinstance(batches, BatchSamplerShard):
        batches = _without_accelerates_generator(batches.batch_sampler, loader)
    return _made_of(loader, batches)


def _without_accelerates_generator(batches: Any, loader: DataLoader[Any]) -> Any:
    """With the sampler as it was: Accelerate gives each that has no generator one, of many ranks.

    It has a seed of 63 bits, drawn, where a user's has the default or a number of 32 bits.
    """
    sampler: Any = getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or type(sampler) not in _DRAWING:
        return batches
    given: torch.Generator | None = sampler.generator
    if given is None or loader.generator is not None:
        return batches
    seed = given.initial_seed()
    if seed == torch.Generator().initial_seed() or seed < 2**32:
        return batches
    plain: Any = copy.copy(sampler)
    plain.generator = None
    return BatchSampler(plain, batches.batch_size, batches.drop_last)


def _with_seedable_sampler(loader: DataLoader[Any], data_seed: int) -> DataLoader[Any]:
    """With the sampler that Accelerate puts in place of a ``RandomSampler``."""
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
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
    return _made_of(loader, BatchSampler(seedable, batches.batch_size, batches.drop_last))


def _made_of(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    if loader.batch_sampler is None:
        return copy_loader(loader, batch_size=None, sampler=batches)
    return copy_loader(loader, batch_sampler=batches)


# --- sharding ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchShard:
    """One process's part in a job's data."""

    processes: int = 1
    """Among which the batches are dealt out."""
    rank: int = 0
    split: bool = False
    """Whether each batch is cut into one for each process; else whole ones are dealt out."""


def _configured_share(accelerator: Accelerator) -> BatchShard:
    """This process's, by what Accelerate is told; tensor parallel ones share theirs."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None and mesh.mesh_dim_names:
        size = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        rank //= size.get("tp", 1) * size.get("cp", 1)
        processes = size.get("dp_shard", 1) * size.get("dp_replicate", 1)
    config = accelerator.dataloader_config
    return BatchShard(processes, rank, config.split_batches)


def find_batch_shard(loader: Any, accelerator: Accelerator) -> BatchShard:
    """This process's share in the batches of a loader; all of them where it has no index.

    Raises:
        PipelineConfigError: the sampler divides them already, or batches can't be split evenly.
    """
    share = _configured_share(accelerator)
    if share.processes == 1:
        return share
    if not is_map_style(loader):
        if _is_divided(loader):
            return share
        logger.warning(
            "each of the %d processes trains on all that its own loader gives: data without an "
            "index has to divide itself among them, by rank; or have Accelerate do so, by "
            "DataLoaderConfiguration(dispatch_batches=True)",
            accelerator.num_processes,
        )
        return BatchShard()
    for name, sampler in iter_samplers(loader):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise PipelineConfigError(
                f"the data loader's {name} is a DistributedSampler, which divides the samples "
                f"among {sampler.num_replicas} processes already; leave it out, and give the "
                "loader that one process would have: it is divided here"
            )
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if loader.batch_sampler is None and not isinstance(batches, BatchSampler):
        return BatchShard(
            share.processes, share.rank
        )  # the dataset makes batches, which can't be cut
    size = getattr(batches, "batch_size", None)
    if share.split and (size is None or size % share.processes != 0):
        raise PipelineConfigError(
            f"split_batches=True needs a batch size that the {share.processes} processes can "
            f"divide evenly, got {size}; change it, or leave out split_batches"
        )
    return share


def _is_divided(loader: Any) -> bool:
    """Whether Accelerate gives each process batches of its own."""
    return isinstance(loader, DataLoaderDispatcher) or isinstance(
        getattr(loader, "dataset", None), IterableDatasetShard
    )


# --- announcing ------------------------------------------------------------------------------
# Telling the parts of a loader which epoch begins.


def set_epoch_of(loader: Any, epoch_id: int) -> None:
    """Call ``set_epoch`` of a loader, or of its samplers and its dataset where it has none."""
    told = [loader]
    if not hasattr(loader, "set_epoch"):  # one that has it tells its own parts
        samplers = [sampler for _, sampler in iter_samplers(loader)]
        told += [*samplers, getattr(loader, "dataset", None)]
    for part in told:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch_id)
