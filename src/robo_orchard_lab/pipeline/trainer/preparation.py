"""Whether what a trainer is given goes together, and making it ready for devices and processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LRScheduler

from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import ddp_of
from robo_orchard_lab.pipeline.progress import TrainerLimits
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded
from robo_orchard_lab.pipeline.sharding import is_sharded_model, reshard, set_gradient_sync
from robo_orchard_lab.pipeline.trainer.gradient_buckets import settle_buckets
from robo_orchard_lab.pipeline.trainer.placement import placement_of

logger = job_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedObjects:
    """What the trainer works with, as Accelerate prepared it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None
    place: Callable[[Any], Any] | None
    """Moves a batch to the device; None where it is there already."""


def check_processor(
    batch_processor: Any, optimizer: torch.optim.Optimizer | None, limits: TrainerLimits
) -> None:
    """Refuse a batch processor that is none, or that needs or lacks what would make updates.

    Raises:
        PipelineConfigError: says which.
    """
    fits = all(hasattr(batch_processor, name) for name in ("forward", "need_backward"))
    if not fits or isinstance(batch_processor, type):
        raise PipelineConfigError(
            "batch_processor must have forward(model, batch) and need_backward, got "
            f"{batch_processor!r:.80}; make an instance of a SimpleBatchProcessor, or wrap a "
            "function with SimpleBatchProcessor.from_callable(...)"
        )
    if batch_processor.need_backward and optimizer is None:
        raise PipelineConfigError(
            "the batch processor needs a backward pass, so the trainer needs an optimizer; "
            "give one, or a batch processor with need_backward=False"
        )
    if limits.max_optimizer_step is not None and not batch_processor.need_backward:
        raise PipelineConfigError(
            "max_optimizer_step counts updates, and a batch processor with "
            "need_backward=False makes none; give max_step or max_epoch"
        )


def prepare_objects(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    lr_scheduler: LRScheduler | None,
    dataloader: Iterable[Any],
) -> PreparedObjects:
    """Let Accelerate prepare what is not prepared yet.

    The data loader is not among it: :class:`TrainingData` divides it among the processes. A model
    that is divided among them already, or in DDP, stays so, and gets its precision alone.

    Raises:
        PipelineConfigError: the launcher started several processes that do not know of each other,
            or Accelerate was to shard the model and does not, or parts of a sharded model are in no
            shard, or the optimizer was made of the parameters that a model had before it was.
    """
    _check_world_size(accelerator)
    several = accelerator.num_processes > 1
    sharded = is_sharded_model(model)
    if several and sharded:
        _check_all_sharded(model)
    elif several:
        _check_sharding(accelerator)
    if optimizer is not None:
        _check_parameters(model, optimizer, sharded=sharded)
    if sharded or (several and ddp_of(model) is not None):
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(optimizer) if optimizer is not None else None
        if lr_scheduler is not None:
            lr_scheduler = accelerator.prepare_scheduler(lr_scheduler)
    else:
        given = [part for part in (model, optimizer, lr_scheduler) if part is not None]
        prepared = iter(
            accelerator.prepare(*given) if len(given) > 1 else [accelerator.prepare(model)]
        )
        model = next(prepared)
        optimizer = next(prepared) if optimizer is not None else None
        lr_scheduler = next(prepared) if lr_scheduler is not None else None
    ddp = ddp_of(model)
    if ddp is not None and accelerator.num_processes > 2:  # two round alike in any order
        settle_buckets(ddp)

    place = placement_of(accelerator, dataloader)
    return PreparedObjects(model, optimizer, lr_scheduler, place)


def backward_of(accelerator: Accelerator) -> Callable[[torch.Tensor, float], Any]:
    """The function that runs the backward pass of a loss divided by a number.

    ``accelerator.backward`` divides every loss by the number of accumulation steps, also in a
    last window that is shorter.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        # These count the micro-batches and divide by themselves.
        return lambda loss, divisor: accelerator.backward(loss)
    scaler = accelerator.scaler
    if scaler is not None:
        return lambda loss, divisor: scaler.scale(loss / divisor).backward()
    return _divided_backward


def _divided_backward(loss: torch.Tensor, divisor: float) -> None:
    (loss if divisor == 1.0 else loss / divisor).backward()


def no_sync_of(
    accelerator: Accelerator, model: torch.nn.Module
) -> Callable[[], AbstractContextManager[Any]] | None:
    """What keeps DDP from adding up the gradients of a micro-batch among the processes.

    None where nothing does that before the update, and of a model in shards, which
    :func:`synchroniser_of` tells.
    """
    if accelerator.num_processes == 1 or is_sharded_model(model):
        return None
    return lambda: accelerator.no_sync(model)


def synchroniser_of(
    accelerator: Accelerator, model: torch.nn.Module
) -> Callable[[bool], None] | None:
    """What tells a model in shards whether to add up gradients among the processes from here on.

    None where the model is in no shards of several processes.
    """
    if accelerator.num_processes == 1 or not is_sharded_model(model):
        return None
    return partial(set_gradient_sync, model)


def _check_sharding(accelerator: Accelerator) -> None:
    # Accelerate sets this where it is given a plugin, and reads it where a launcher has set it.
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and accelerator.distributed_type is not DistributedType.FSDP:
        raise PipelineConfigError(
            "the accelerator was configured for FSDP, and runs with "
            f"{accelerator.distributed_type.value} all the same, as Accelerate does where there is "
            "no device for each process; shard the model yourself ahead of making the optimizer, "
            "by torch.distributed.fsdp.fully_shard(model, mesh=init_device_mesh('cpu', (n,))) for "
            "n processes, or leave the plugin out (and ACCELERATE_USE_FSDP) for plain data "
            "parallelism"
        )


def _check_all_sharded(model: torch.nn.Module) -> None:
    reshard(model)  # it may have been evaluated
    whole = [n for n, p in model.named_parameters() if p.requires_grad and not is_sharded(p)]
    if whole:
        raise PipelineConfigError(
            f"{', '.join(whole[:3])}{', ...' if len(whole) > 3 else ''} ({len(whole)} trainable "
            "parameters) are in no sharded part of the model, so that each process would train its "
            "own; call fully_shard(model) of the whole model after that of its parts"
        )


def _check_parameters(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> None:
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if trainable and not trainable & held:
        if sharded:
            raise PipelineConfigError(
                "the optimizer holds none of the sharded model's parameters: fully_shard replaces "
                "a model's parameters; make the optimizer of model.parameters() after it"
            )
        logger.warning(
            "the optimizer holds none of the model's %d trainable parameters, so that training "
            "leaves the model as it is",
            len(trainable),
        )


def _check_world_size(accelerator: Accelerator) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        raise PipelineConfigError(
            f"the launcher started {launched} processes (WORLD_SIZE={launched}), but the "
            "accelerator has 1, so that each would train alone; on a machine without a GPU make "
            "it with Accelerator(cpu=True)"
        )
