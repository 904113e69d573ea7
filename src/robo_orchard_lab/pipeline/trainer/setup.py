"""Whether what a trainer is given goes together, and making it ready for devices and processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import ddp_of
from robo_orchard_lab.pipeline.progress import TrainerLimits
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded
from robo_orchard_lab.pipeline.sharding import is_sharded_model, reshard, set_gradient_sync

# --- placement -------------------------------------------------------------------------------
# Moving batches to the device.


def placement_of(
    accelerator: Accelerator, dataloader: Iterable[Any]
) -> Callable[[Any], Any] | None:
    """What moves a batch to the device; None where it is there already, or the user moves it.

    From pinned memory (``DataLoader(pin_memory=True)``, or Accelerate's ``non_blocking``) a batch
    travels while the host goes on, to a CUDA device also while that is busy with the step before.
    """
    device = accelerator.device
    if not accelerator.device_placement or device.type == "cpu":
        return None
    pinned = accelerator.dataloader_config.non_blocking or getattr(dataloader, "pin_memory", False)
    if pinned and device.type == "cuda":
        return CopyStream(device)
    return partial(send_to_device, device=device, non_blocking=pinned)


class CopyStream:
    """Copies batches in a CUDA stream of its own, ahead of which no step is waited for.

    The host launches steps faster than the device does them, and asks for the next batch early. In
    the stream of the steps, its copy would wait for all that was launched; here it runs beside
    them, and the next step waits for the copy alone. No batch is asked for before it is due.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)

    def __call__(self, batch: Any) -> Any:
        """The batch on the device, for use in the current stream."""
        if not _is_copied_whole(batch):
            return send_to_device(batch, self._device, non_blocking=True)
        with torch.cuda.stream(self.stream):
            placed = send_to_device(batch, self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self.stream)
        for tensor in tensors_in(placed):
            # Else its memory would be free for the next batch while the step still reads it.
            tensor.record_stream(current)
        return placed


def _is_copied_whole(batch: Any) -> bool:
    """Whether all that is moved are tensors of the host, which depend on no stream."""
    return all(
        isinstance(part, torch.Tensor) and part.device.type == "cpu" for part in movable_in(batch)
    )


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """The tensors of a batch, in whatever lists, tuples and mappings."""
    return [part for part in movable_in(batch) if isinstance(part, torch.Tensor)]


def movable_in(batch: Any) -> list[Any]:
    """What in a batch is moved to a device: tensors, and others that have a ``to``.

    >>> movable_in({"image": torch.zeros(1), "names": ["a"], "more": (torch.ones(1), None)})
    [tensor([0.]), tensor([1.])]
    """
    if hasattr(batch, "to"):  # a mapping that has one moves by it
        return [batch]
    if isinstance(batch, Mapping):
        return [part for value in batch.values() for part in movable_in(value)]
    if isinstance(batch, (list, tuple)):
        return [part for value in batch for part in movable_in(value)]
    return []


# --- gradient buckets ------------------------------------------------------------------------
# In which pieces the gradients of several processes are added up.


def settle_buckets(ddp: DistributedDataParallel) -> None:
    """Have DDP divide the gradients, before the first step, into the buckets that it then keeps.

    By itself it divides them anew after its first backward pass, by the order in which they came.
    A run that is resumed would do so after its first step, where the run that never stopped has
    done it long ago; and where three ranks or more add up, the place in a bucket says in which
    order, and so how a sum is rounded. Settled from the start, in the reverse order of the model's
    parameters, a resumed run rounds as the other one does.

    It takes one backward pass of nothing and its exchange: a collective. The parameters have no
    gradients afterwards. Nothing is done where DDP never divides anew (``find_unused_parameters``),
    where a hook of its own adds up, or where gradients are sparse or left to the end.
    """
    parameters = [p for p in ddp.module.parameters() if p.requires_grad]
    others = (
        ddp.find_unused_parameters
        or ddp.static_graph
        or getattr(ddp, "_comm_hooks", None)
        or getattr(ddp, "_delay_all_reduce_params", None)
        or getattr(ddp, "_use_python_reducer", False)
        or any(getattr(module, "sparse", False) for module in ddp.module.modules())
    )
    if others or not parameters:
        return
    device = parameters[0].device
    with torch.enable_grad():
        ddp.reducer.prepare_for_backward([])
        # What is made last is differentiated first, so that these come in the reverse order.
        pieces = [p.reshape(-1)[:1].abs().sum().to(device, torch.float32) for p in parameters]
        (torch.stack(pieces).sum() * 0).backward()
    for parameter in parameters:
        parameter.grad = None


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
