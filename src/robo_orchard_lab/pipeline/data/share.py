"""How the data of a job is divided among its processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from robo_orchard_lab.pipeline.data.own_loader import has_index
from robo_orchard_lab.pipeline.data.random_sources import samplers_of
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger

logger = job_logger(__name__)


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part in a job's data."""

    processes: int = 1
    """Among which the batches are dealt out."""
    rank: int = 0
    split: bool = False
    """Whether each batch is cut into one for each process; else whole ones are dealt out."""


def share_of(accelerator: Accelerator) -> Share:
    """This process's, as Accelerate is configured; tensor parallel ones share theirs."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None and mesh.mesh_dim_names:
        size = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        rank //= size.get("tp", 1) * size.get("cp", 1)
        processes = size.get("dp_shard", 1) * size.get("dp_replicate", 1)
    config = accelerator.dataloader_config
    return Share(processes, rank, config.split_batches)


def share_in(loader: Any, accelerator: Accelerator) -> Share:
    """This process's share in the batches of a loader; all of them where they can't be divided.

    Raises:
        PipelineConfigError: the sampler divides them already, or batches can't be split evenly.
    """
    share = share_of(accelerator)
    if share.processes == 1:
        return share
    for name, sampler in samplers_of(loader):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise PipelineConfigError(
                f"the data loader's {name} is a DistributedSampler, which divides the samples "
                f"among {sampler.num_replicas} processes already; leave it out, and give the "
                "loader that one process would have: it is divided here"
            )
    batches = _batch_sampler_of(loader)
    if batches is None and not has_index(loader):
        logger.warning(
            "each of the %d processes reads all of the data: only a DataLoader that makes the "
            "batches can be divided among them",
            accelerator.num_processes,
        )
        return Share()
    size = getattr(batches, "batch_size", None)
    if has_index(loader) and share.split and (size is None or size % share.processes != 0):
        raise PipelineConfigError(
            f"split_batches=True needs a batch size that the {share.processes} processes can "
            f"divide evenly, got {size}; change it, or leave out split_batches"
        )
    return share


def _batch_sampler_of(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return None
    if loader.batch_sampler is not None or isinstance(loader.dataset, IterableDataset):
        return loader.batch_sampler
    return loader.sampler if isinstance(loader.sampler, BatchSampler) else None
