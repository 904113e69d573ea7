"""Preparation of a trainer's objects: checks, Accelerate's ``prepare``, device placement, DDP."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType, send_to_device
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.foreign_fields import foreign_remedy
from robo_orchard_lab.pipeline.distributed.collectives import broadcast_tensors
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.gradient_norm import REPLICATED_TYPES
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import DDPOfCall, ddp_of
from robo_orchard_lab.pipeline.progress import TrainerLimits
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded
from robo_orchard_lab.pipeline.sharding import is_sharded_model, reshard, set_gradient_sync

logger = job_logger(__name__)

ENGINES = frozenset({DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM})
"""Engines that count micro-batches, divide losses and step the optimizer by themselves."""


InitT = TypeVar("InitT", bound=Callable[..., None])


def refuse_foreign_arguments(init: InitT) -> InitT:
    """Make a constructor's error for an argument of another framework name what to pass instead."""
    known = inspect.signature(init).parameters

    @wraps(init)
    def checked(*args: Any, **given: Any) -> None:
        for name in given.keys() - known.keys():
            if remedy := foreign_remedy("trainer", name, given[name], "python"):
                raise TypeError(f"HookBasedTrainer has no argument {name!r}; {remedy}")
        init(*args, **given)

    return checked  # type: ignore[return-value]  # the same signature


def check_objects(
    accelerator: Any,
    model: Any,
    dataloader: Any,
    batch_processor: Any,
    optimizer: Any,
    lr_scheduler: Any,
    limits: TrainerLimits,
) -> None:
    """Check the types of a trainer's objects, and that the objects fit each other.

    Raises:
        PipelineConfigError: an argument has the wrong type, the LR scheduler belongs to another
            optimizer, the batch processor needs an optimizer that is missing, or makes no optimizer
            steps while ``max_optimizer_step`` counts them.
    """
    if not isinstance(accelerator, Accelerator):
        raise _wrong_type("accelerator", "an Accelerator", accelerator, "accelerate.Accelerator()")
    if not isinstance(model, torch.nn.Module):
        raise _wrong_type("model", "a torch.nn.Module", model, "MyModel()")
    is_iterable = hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__")
    if isinstance(dataloader, type | str) or not is_iterable:
        expected = "a DataLoader or another iterable of batches"
        raise _wrong_type("dataloader", expected, dataloader, "DataLoader(dataset, batch_size=32)")
    if isinstance(optimizer, Mapping):
        _check_named(model, optimizer, lr_scheduler)
    elif isinstance(lr_scheduler, Mapping):
        raise PipelineConfigError(
            "lr_scheduler: expected one LR scheduler for one optimizer, found a mapping; pass "
            "optimizer={name: ...} with the same names, or the LR scheduler itself"
        )
    else:
        _check_optimizer("optimizer", optimizer)
        if lr_scheduler is not None:
            _check_lr_scheduler("lr_scheduler", lr_scheduler, optimizer)
    fits = all(hasattr(batch_processor, name) for name in ("forward", "need_backward"))
    if not fits or isinstance(batch_processor, type):
        raise PipelineConfigError(
            "batch_processor must have forward(model, batch) and need_backward, got "
            f"{batch_processor!r:.80}; create an instance of a SimpleBatchProcessor, or wrap a "
            "function with SimpleBatchProcessor.from_callable(...)"
        )
    if isinstance(optimizer, Mapping) and not batch_processor.need_backward:
        raise PipelineConfigError(
            "optimizer: expected a batch processor with need_backward=True for several "
            "optimizers, found False; leave out the optimizers, or set need_backward"
        )
    if batch_processor.need_backward and optimizer is None:
        raise PipelineConfigError(
            "the batch processor needs a backward pass, so the trainer needs an optimizer; "
            "pass one, or a batch processor with need_backward=False"
        )
    if limits.max_optimizer_step is not None and not batch_processor.need_backward:
        raise PipelineConfigError(
            "max_optimizer_step counts optimizer steps, and a batch processor with "
            "need_backward=False makes none; pass max_step or max_epoch"
        )


def _check_optimizer(argument: str, optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer | None):
        remedy = "torch.optim.AdamW(model.parameters())"
        if isinstance(optimizer, list | tuple):
            remedy = (
                "one with parameter groups, torch.optim.AdamW([{'params': ...}, ...]), or a "
                "mapping of names to optimizers"
            )
        raise _wrong_type(argument, "a torch.optim.Optimizer", optimizer, remedy)


def _check_named(model: torch.nn.Module, optimizers: Mapping[Any, Any], lr_schedulers: Any) -> None:
    """Check several optimizers, and their LR schedulers, by name."""
    if not optimizers:
        raise PipelineConfigError(
            "optimizer: expected optimizers by name, found an empty mapping; pass "
            "{'g': torch.optim.Adam(model.g.parameters()), ...}, or one optimizer"
        )
    owners: dict[torch.nn.Parameter, str] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for name, optimizer in optimizers.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise PipelineConfigError(
                f"optimizer: expected names that are identifiers, such as 'g', found {name!r:.60}"
            )
        if optimizer is None:
            raise _wrong_type(f"optimizer[{name!r}]", "a torch.optim.Optimizer", None, "one")
        _check_optimizer(f"optimizer[{name!r}]", optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if owners.setdefault(parameter, name) != name:
                    raise PipelineConfigError(
                        f"optimizer: expected each parameter in one optimizer, found "
                        f"{names.get(parameter, 'a parameter outside the model')} in "
                        f"{owners[parameter]!r} and {name!r}; remove it from one of them"
                    )
    free = [n for p, n in names.items() if p.requires_grad and p not in owners]
    if free:
        raise PipelineConfigError(
            f"optimizer: expected each trainable parameter in one of {', '.join(optimizers)}, "
            f"found none for {', '.join(free[:3])}{', ...' if len(free) > 3 else ''} ({len(free)} "
            "parameters); add them to an optimizer, or call requires_grad_(False) on them"
        )
    if lr_schedulers is None:
        return
    if not isinstance(lr_schedulers, Mapping):
        raise PipelineConfigError(
            "lr_scheduler: expected a mapping of names to LR schedulers, as optimizer is one, "
            f"found {type(lr_schedulers).__name__}; pass {{{next(iter(optimizers))!r}: ...}}"
        )
    for name, lr_scheduler in lr_schedulers.items():
        if name not in optimizers:
            hint = suggest_name(str(name), list(optimizers), "optimizers:")
            raise PipelineConfigError(
                f"lr_scheduler: expected names of optimizers, found {name!r:.60}; {hint}"
            )
        _check_lr_scheduler(f"lr_scheduler[{name!r}]", lr_scheduler, optimizers[name])


def _check_lr_scheduler(
    argument: str, lr_scheduler: Any, optimizer: torch.optim.Optimizer | None
) -> None:
    is_scheduler = all(callable(getattr(lr_scheduler, name, None)) for name in ("step", "get_lr"))
    is_scheduler |= isinstance(lr_scheduler, LRScheduler | AcceleratedScheduler)
    if isinstance(lr_scheduler, type) or not is_scheduler:
        expected = "a torch.optim.lr_scheduler.LRScheduler"
        remedy = "torch.optim.lr_scheduler.StepLR(optimizer, 1000)"
        raise _wrong_type(argument, expected, lr_scheduler, remedy)
    inner = getattr(lr_scheduler, "scheduler", lr_scheduler)  # of Accelerate's wrapper
    owner = getattr(inner, "optimizer", None)
    if owner is None or optimizer is None:
        return
    if getattr(owner, "optimizer", owner) is not getattr(optimizer, "optimizer", optimizer):
        raise PipelineConfigError(
            f"{argument}: expected an LR scheduler of the trainer's optimizer, found "
            f"{type(inner).__name__} of another {type(owner).__name__}; create it with the "
            f"optimizer that the trainer receives, {type(inner).__name__}(optimizer, ...)"
        )


def _wrong_type(argument: str, expected: str, found: Any, remedy: str) -> PipelineConfigError:
    kind = " ".join(f"{found!r:.60}".split()) + f" ({type(found).__name__})"
    if isinstance(found, type):
        kind = f"the class {found.__qualname__}"
    return PipelineConfigError(f"{argument}: expected {expected}, found {kind}; pass {remedy}")


def prepare_objects(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    lr_scheduler: LRScheduler | None,
) -> tuple[torch.nn.Module, torch.optim.Optimizer | None, LRScheduler | None]:
    """Prepare and return the objects with Accelerate, unless they are prepared already.

    The data loader is not prepared here: :class:`TrainingData` splits it among the ranks. A model
    that is sharded or in DDP already gets mixed precision only.

    Raises:
        PipelineConfigError: the launcher started several processes without a process group,
            Accelerate was configured for FSDP and does not shard, some parameters of a sharded
            model are in no shard, or the optimizer was created before the model was sharded.
    """
    _check_world_size(accelerator)
    distributed = accelerator.num_processes > 1
    sharded = is_sharded_model(model)
    if distributed and sharded:
        _check_all_sharded(model)
    elif distributed:
        _check_sharding(accelerator)
    if optimizer is not None:
        _check_parameters(model, optimizer, sharded=sharded)
    if sharded or (distributed and ddp_of(model) is not None):
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(optimizer) if optimizer is not None else None
        if lr_scheduler is not None:
            lr_scheduler = accelerator.prepare_scheduler(lr_scheduler)
    else:
        # In one call, in which Accelerate connects the objects; None stays None.
        model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    ddp = ddp_of(model)
    if ddp is not None and accelerator.num_processes > 2:  # a sum of two rounds the same anyway
        settle_buckets(ddp)
    return model, optimizer, lr_scheduler


def prepare_named(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> tuple[torch.nn.Module, dict[str, torch.optim.Optimizer], dict[str, Any]]:
    """Prepare a model and several optimizers; return also a gradient scaler for each with fp16.

    The model is not wrapped in DDP: an update reduces the gradients of its own optimizer only.
    With several ranks, all start with the parameters and buffers of the first one; a collective.

    Raises:
        PipelineConfigError: the model is in DDP, or it is sharded, or an engine owns the optimizer.
    """
    _check_world_size(accelerator)
    kind = accelerator.distributed_type
    if kind not in REPLICATED_TYPES or is_sharded_model(model):
        found = kind.value if kind not in REPLICATED_TYPES else "a model sharded by fully_shard"
        raise PipelineConfigError(
            f"several optimizers need a replicated model on plain processes, found {found}; use "
            "one optimizer with parameter groups, or do not shard the model"
        )
    if ddp_of(model) is not None:
        raise PipelineConfigError(
            "several optimizers need a model without DDP, since the trainer averages the "
            "gradients of each optimizer; pass the plain model, without accelerator.prepare()"
        )
    model = accelerator.prepare_model(model, evaluation_mode=True)
    scalers = {}
    if accelerator.scaler is not None:
        scalers = {name: copy.deepcopy(accelerator.scaler) for name in optimizers}
    prepared: dict[str, torch.optim.Optimizer] = {
        name: AcceleratedOptimizer(
            getattr(optimizer, "optimizer", optimizer),
            device_placement=accelerator.device_placement,
            scaler=scalers.get(name),
        )
        for name, optimizer in optimizers.items()
    }
    if accelerator.num_processes > 1:
        held = [p for o in prepared.values() for group in o.param_groups for p in group["params"]]
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers(), *held)}
        broadcast_tensors(list(tensors.values()))
    return model, prepared, scalers


def engine_backward(accelerator: Accelerator) -> Callable[[torch.Tensor], Any] | None:
    """Return the function that runs a backward pass, or None where ``loss.backward()`` is right."""
    if accelerator.distributed_type in ENGINES:
        return lambda loss: accelerator.backward(loss)
    # Not accelerator.backward, which divides by the accumulation steps, also in a short window.
    scaler = accelerator.scaler
    return None if scaler is None else lambda loss: scaler.scale(loss).backward()


def no_sync_context(
    accelerator: Accelerator, model: torch.nn.Module
) -> Callable[[], AbstractContextManager[Any]] | None:
    """Return DDP's ``no_sync`` for micro-batches within a window, or None where it has no effect.

    A sharded model uses :func:`gradient_sync_switch` instead.
    """
    if accelerator.num_processes == 1 or is_sharded_model(model):
        return None
    return lambda: accelerator.no_sync(model)


def gradient_sync_switch(
    accelerator: Accelerator, model: torch.nn.Module
) -> Callable[[bool], None] | None:
    """Return the function that turns gradient reduction of a sharded model on and off, or None."""
    if accelerator.num_processes == 1 or not is_sharded_model(model):
        return None
    return partial(set_gradient_sync, model)


def _check_sharding(accelerator: Accelerator) -> None:
    # Accelerate sets this for a plugin, and reads it where a launcher has set it.
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and accelerator.distributed_type is not DistributedType.FSDP:
        raise PipelineConfigError(
            "the accelerator was configured for FSDP but runs with "
            f"{accelerator.distributed_type.value}, as Accelerate does without a device for each "
            "process; shard the model before creating the optimizer, by torch.distributed.fsdp."
            "fully_shard(model, mesh=init_device_mesh('cpu', (n,))) for n processes, or remove "
            "the plugin (and ACCELERATE_USE_FSDP) for plain data parallelism"
        )


def _check_all_sharded(model: torch.nn.Module) -> None:
    reshard(model)  # it may have been evaluated
    unsharded = [n for n, p in model.named_parameters() if p.requires_grad and not is_sharded(p)]
    if unsharded:
        raise PipelineConfigError(
            f"{', '.join(unsharded[:3])}{', ...' if len(unsharded) > 3 else ''} "
            f"({len(unsharded)} trainable parameters) are in no sharded module, so each process "
            "would train its own; call fully_shard(model) on the root after its submodules"
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
                "a model's parameters; create the optimizer from model.parameters() after it"
            )
        logger.warning(
            "the optimizer holds none of the model's %d trainable parameters, so training does "
            "not change the model",
            len(trainable),
        )


def _check_world_size(accelerator: Accelerator) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        raise PipelineConfigError(
            f"the launcher started {launched} processes (WORLD_SIZE={launched}), but the "
            "accelerator has 1, so each would train alone; on a machine without a GPU create "
            "it with Accelerator(cpu=True)"
        )


def batch_placement(
    accelerator: Accelerator, dataloader: Iterable[Any]
) -> Callable[[Any], Any] | None:
    """Return the function that moves a batch to the device, or None where no move is needed.

    From pinned memory (``DataLoader(pin_memory=True)``, or Accelerate's ``non_blocking``) the copy
    is asynchronous; to a CUDA device it also overlaps with the step before.
    """
    device = accelerator.device
    if not accelerator.device_placement or device.type == "cpu":
        return None
    pinned = accelerator.dataloader_config.non_blocking or getattr(dataloader, "pin_memory", False)
    if pinned and device.type == "cuda":
        return CopyStream(device)
    return partial(send_to_device, device=device, non_blocking=pinned)


class CopyStream:
    """Copies batches in a separate CUDA stream, in parallel with the step before.

    In the stream of the steps, a copy would wait for all kernels launched so far. Here the next
    step waits for the copy only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)

    def __call__(self, batch: Any) -> Any:
        """Return the batch on the device, for use in the current stream."""
        if not all(
            isinstance(p, torch.Tensor) and p.device.type == "cpu" for p in movable_in(batch)
        ):
            # Other parts may depend on work in a stream.
            return send_to_device(batch, self._device, non_blocking=True)
        with torch.cuda.stream(self.stream):
            placed = send_to_device(batch, self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self.stream)
        for tensor in tensors_in(placed):
            # Otherwise the allocator could reuse the memory while the step still reads it.
            tensor.record_stream(current)
        return placed


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists, tuples and mappings."""
    return [part for part in movable_in(batch) if isinstance(part, torch.Tensor)]


def movable_in(batch: Any) -> list[Any]:
    """Return the parts of a batch that move to a device: tensors and objects with a ``to``.

    >>> movable_in({"image": torch.zeros(1), "names": ["a"], "more": (torch.ones(1), None)})
    [tensor([0.]), tensor([1.])]
    """
    if hasattr(batch, "to"):  # also a mapping with a ``to``
        return [batch]
    if isinstance(batch, Mapping):
        return [part for value in batch.values() for part in movable_in(value)]
    if isinstance(batch, (list, tuple)):
        return [part for value in batch for part in movable_in(value)]
    return []


def settle_buckets(ddp: DistributedDataParallel) -> None:
    """Make DDP build its final gradient buckets before the first step.

    By default DDP rebuilds the buckets after the first backward pass, in the order of the
    gradients' arrival. A resumed run would rebuild them after its own first step. With three ranks
    or more, the position in a bucket decides the order of summation and so the rounding; settled
    buckets make a resumed run round as an uninterrupted run.

    Runs one backward pass of zeros with its all-reduce, a collective, in which a communication hook
    takes part. Gradients are None afterwards. Does nothing where DDP never rebuilds buckets
    (``find_unused_parameters``), with DDP's own mixed precision, and with sparse gradients.
    """
    ignored = getattr(ddp, "parameters_to_ignore", ())
    named = ddp.module.named_parameters()
    parameters = [p for name, p in named if p.requires_grad and name not in ignored]
    is_unsupported = (
        ddp.find_unused_parameters
        or ddp.static_graph
        or getattr(ddp, "mixed_precision", None)
        or any(getattr(module, "sparse", False) for module in ddp.module.modules())
    )
    if is_unsupported or not parameters:
        return
    device = parameters[0].device

    def zero() -> torch.Tensor:
        # Autograd differentiates the last node first, so gradients arrive in reverse order.
        pieces = [p.reshape(-1)[:1].abs().sum().to(device, torch.float32) for p in parameters]
        return torch.stack(pieces).sum() * 0

    with torch.enable_grad():
        DDPOfCall(ddp).forward(zero).backward()  # type: ignore[no-untyped-call]  # torch has none
    for parameter in parameters:
        parameter.grad = None
