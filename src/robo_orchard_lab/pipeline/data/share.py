"""How the data of a job is divided among its processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import BatchSampler, DistributedSampler

from robo_orchard_lab.pipeline.data.loader import is_map_style
from robo_orchard_lab.pipeline.data.rng import iter_samplers
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger

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


logger = job_logger(__name__)


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
