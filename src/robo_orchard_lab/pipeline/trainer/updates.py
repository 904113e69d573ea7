"""Updates: the hook that steps one or several optimizers, and their gradients over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.pipeline.distributed.collectives import GatheredNumbers
from robo_orchard_lab.pipeline.errors import BatchProcessorError, PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks.optimizer import (
    NamedOptimizersHook,
    OptimizerHook,
    trainable_parameters,
)
from robo_orchard_lab.pipeline.model import copy_all
from robo_orchard_lab.pipeline.trainer.setup import prepare_named, prepare_objects


def prepare_updates(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None,
    lr_scheduler: LRScheduler | Mapping[str, LRScheduler] | None,
    hooks: PipelineHooks,
    options: Mapping[str, Any],
    *,
    need_backward: bool,
) -> tuple[torch.nn.Module, OptimizerHook | NamedOptimizersHook | None, dict[str, Any]]:
    """Prepare model, optimizers and LR schedulers with Accelerate, and create their hook.

    Collectives in a job of several ranks. Errors are those of :func:`prepare_objects`,
    :func:`prepare_named` and the hooks.

    Returns:
        The prepared model, the hook that steps the optimizers, or None without a backward pass,
        and the gradient scaler of each of several optimizers with fp16.
    """
    if isinstance(optimizer, Mapping):
        model, named, scalers = prepare_named(accelerator, model, optimizer)
        hook = _named_updates(accelerator, named, lr_scheduler or {}, hooks, options)
        return model, hook, scalers
    assert not isinstance(lr_scheduler, Mapping)  # checked by check_objects
    model, optimizer, lr_scheduler = prepare_objects(accelerator, model, optimizer, lr_scheduler)
    if optimizer is None or not need_backward:
        return model, None, {}
    every, monitor = options["lr_scheduler_every"], options["lr_scheduler_monitor"]
    return model, OptimizerHook(accelerator, optimizer, lr_scheduler, hooks, every, monitor), {}


def _named_updates(
    accelerator: Accelerator,
    optimizers: Mapping[str, torch.optim.Optimizer],
    lr_schedulers: Any,
    hooks: PipelineHooks,
    options: Mapping[str, Any],
) -> NamedOptimizersHook:
    """Return the hook that steps prepared optimizers.

    Args:
        options: options of the trainer, with ``lr_scheduler_every`` and ``lr_scheduler_monitor``;
            a text holds for each LR scheduler that it fits.

    Raises:
        PipelineConfigError: an option has an unknown name, or fits no LR scheduler.
    """
    plateaus = [n for n, each in lr_schedulers.items() if isinstance(each, ReduceLROnPlateau)]
    every = _by_name("lr_scheduler_every", options, list(lr_schedulers), optimizers)
    monitor = _by_name("lr_scheduler_monitor", options, plateaus, optimizers)
    return NamedOptimizersHook(
        [
            OptimizerHook(
                accelerator,
                optimizer,
                lr_schedulers.get(name),
                hooks,
                every.get(name),
                monitor.get(name),
                name,
            )
            for name, optimizer in optimizers.items()
        ],
        _average_gradients(list(optimizers)) if accelerator.num_processes > 1 else None,
    )


def _by_name(
    argument: str, options: Mapping[str, Any], fitting: Sequence[str], names: Iterable[str]
) -> Mapping[str, Any]:
    """Return the values of an option by optimizer."""
    value = options[argument]
    if isinstance(value, Mapping):
        for name in value:
            if name not in names:
                hint = suggest_name(str(name), list(names), "optimizers:")
                raise PipelineConfigError(
                    f"{argument}: expected names of optimizers, found {name!r:.60}; {hint}"
                )
        return value
    if value is not None and not fitting:
        kind = "a ReduceLROnPlateau" if argument == "lr_scheduler_monitor" else "an LR scheduler"
        raise PipelineConfigError(
            f"{argument}={value!r}: expected {kind}, found none; pass lr_scheduler={{name: ...}}, "
            f"or omit {argument}"
        )
    return dict.fromkeys(fitting, value)


def _average_gradients(names: Sequence[str]) -> Callable[..., None]:
    """Return a function that averages gradients over ranks, given the names of all optimizers."""
    index_of = {name: index for index, name in enumerate(names, start=1)}

    def average(optimizers: Mapping[str, torch.optim.Optimizer], is_step_end: bool) -> None:
        # Ranks that yield different names would enter different collectives, and hang.
        own = [0 if is_step_end else -1, *(index_of[name] for name in optimizers)]
        own += [0] * (len(names) + 1 - len(own))
        gathered = GatheredNumbers(own)  # a collective over host memory
        parameters = [
            p for optimizer in optimizers.values() for p in trainable_parameters(optimizer)
        ]
        rows = gathered.wait()
        if any(row != own for row in rows):
            raise BatchProcessorError(_different_steps(rows, names))
        if parameters:
            _average(parameters)

    return average


def _different_steps(rows: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    shown = []
    for rank, (kind, *indices) in enumerate(rows):
        losses = ", ".join(repr(names[index - 1]) for index in indices if index)
        ending = (
            f"the end of its step, with losses for {losses}" if losses else "the end of its step"
        )
        shown.append(f"rank {rank} has {f'a loss for {losses}' if kind else ending}")
    return (
        f"expected losses for the same optimizers in the same order on all ranks, found: "
        f"{'; '.join(shown)}; choose losses by values that are equal on all ranks, such as a count "
        "of steps, not by random numbers or the batch"
    )


def _average(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Average gradients over the ranks, one all-reduce for each dtype; None counts as zeros.

    A gradient that is None on all ranks stays None: a rank with such a gradient reads the flags of
    all ranks, which syncs the device.
    """
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for (device, dtype), group in groups.items():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        if any(gradient.is_sparse for gradient in gradients):
            raise BatchProcessorError(
                "several optimizers on several ranks don't support sparse gradients; use "
                "Embedding(sparse=False)"
            )
        missing = [index for index, p in enumerate(group) if p.grad is None]
        has_gradient = torch.ones(len(group), dtype=dtype, device=device)
        has_gradient[missing] = 0
        flat = torch.cat([has_gradient, *(gradient.reshape(-1) for gradient in gradients)])
        torch.distributed.all_reduce(flat)  # a collective
        counts = flat[: len(group)].tolist() if missing else []  # a device sync
        flat.div_(torch.distributed.get_world_size())
        sizes = [len(group), *(gradient.numel() for gradient in gradients)]
        means = [part.view_as(p) for part, p in zip(flat.split(sizes)[1:], group, strict=True)]
        copy_all(gradients, means)
        for index in missing:
            if counts[index]:
                group[index].grad = gradients[index]
