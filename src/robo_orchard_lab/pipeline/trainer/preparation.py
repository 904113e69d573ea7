"""Making a model, an optimizer and a schedule ready for the devices and processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch.optim.lr_scheduler import LRScheduler

from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.plain_model import ddp_of
from robo_orchard_lab.pipeline.trainer.gradient_buckets import settle_buckets

logger = job_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedObjects:
    """What the trainer works with, as Accelerate prepared it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None
    place: Callable[[Any], Any] | None
    """Moves a batch to the device; None where it is there already."""


def prepare_objects(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    lr_scheduler: LRScheduler | None,
    dataloader: Iterable[Any],
) -> PreparedObjects:
    """Let Accelerate prepare what is not prepared yet.

    The data loader is not among it: :class:`TrainingData` divides it among the processes.

    Raises:
        PipelineConfigError: the launcher started several processes that do not know of each other.
    """
    _check_world_size(accelerator)
    if optimizer is not None:
        _check_parameters(model, optimizer)
    given = [part for part in (model, optimizer, lr_scheduler) if part is not None]
    prepared = iter(accelerator.prepare(*given) if len(given) > 1 else [accelerator.prepare(model)])
    model = next(prepared)
    optimizer = next(prepared) if optimizer is not None else None
    lr_scheduler = next(prepared) if lr_scheduler is not None else None
    ddp = ddp_of(model)
    if ddp is not None and accelerator.num_processes > 2:  # two round alike in any order
        settle_buckets(ddp)

    place: Callable[[Any], Any] | None = None
    if accelerator.device_placement and accelerator.device.type != "cpu":
        place = partial(
            send_to_device,
            device=accelerator.device,
            # From pinned memory a batch travels while the host goes on.
            non_blocking=accelerator.dataloader_config.non_blocking
            or getattr(dataloader, "pin_memory", False),
        )
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


def _check_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if trainable and not trainable & held:
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
