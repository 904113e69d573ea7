"""A model that torch's FSDP2 (``fully_shard``) has divided among the processes.

What stands here goes through all of a model's modules; nothing of it is on the way of a step but
:func:`set_gradient_sync`, which accumulation calls where a window begins and where it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from robo_orchard_lab.pipeline.checkpoint import ShareOf, TensorShare
from robo_orchard_lab.pipeline.checkpoint.shards import cut, local_regions
from robo_orchard_lab.pipeline.context import PipelineRun, WeightSet
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.model import plain_name, plain_weights
from robo_orchard_lab.pipeline.sharded_tensors import gather_full_tensors, has_sharded, is_sharded

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def is_sharded_model(model: torch.nn.Module) -> bool:
    """Whether a model, also a compiled one, is divided by FSDP2 or has parameters that are."""
    return next(_sharding_modules(model), None) is not None or has_sharded(model.parameters())


def plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a module as its author named it; ``fully_shard`` puts one of its own before."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = type(module)
    if fsdp is not None and kind.__bases__[:1] == (fsdp.FSDPModule,):
        return kind.__bases__[1]
    return kind


def set_gradient_sync(model: torch.nn.Module, synchronise: bool) -> None:
    """Have the gradients of the backward passes from here on reduced among the processes, or kept.

    Until they are reduced, each process keeps them whole, beside what they add up to.
    """
    for module in _sharding_modules(model):
        module.set_requires_gradient_sync(synchronise, recurse=False)


def reshard(model: torch.nn.Module) -> None:
    """Have each process keep its shards alone, and the model those as its parameters.

    After a forward pass without a backward one, the outermost parts of a model are left whole, and
    would be taken for what the shards hold, also when that has changed. No exchange is made.
    """
    for module in _sharding_modules(model):
        module.reshard()


def shares_of_model(model: torch.nn.Module) -> ShareOf | None:
    """What this process needs of a saved state that has the model's tensors in it, or some like
    them, as optimizers and averages keep; None where no parameter is sharded.

    A tensor is taken for one that is divided as a parameter is if it has the parameter's whole
    shape, and its place the parameter's name in it, as in ``state.<name>.exp_avg``.

    Raises:
        StateError: a process has a parameter in several pieces.
    """
    live = {plain_name(name): p for name, p in model.named_parameters() if is_sharded(p)}
    if not live:
        return None
    shares = {
        name: TensorShare(region, _like(live[name])) for name, region in local_regions(live).items()
    }

    def share_of(place: str, shape: tuple[int, ...]) -> TensorShare | None:
        words = place.split(".")
        for length in range(len(words), 0, -1):
            for begin in range(len(words) - length + 1):
                name = ".".join(words[begin : begin + length])
                if name in shares and tuple(live[name].shape) == shape:
                    return shares[name]
        return None

    return share_of


def gather_weights(run: PipelineRun, kept: WeightSet | None) -> dict[str, torch.Tensor] | None:
    """The weights for the first rank to write, by the names of the plain model; None on others.

    All ranks call it: of a sharded model, it gathers one tensor after the other, on the CPU of the
    first rank. Others are not copied.

    Args:
        run: whose weights.
        kept: those of a hook, in place of the model's own.
    """
    first = run.accelerator.is_main_process
    if not is_sharded_model(run.model):
        if not first:
            return None
        return plain_weights(run) if kept is None else kept.weights()
    with nullcontext() if kept is None else kept.applied():
        whole = gather_full_tensors(plain_weights(run), keep=first)
    return whole if first else None


def unreduced_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that this process keeps whole in an accumulation window that is open, by the
    names of their parameters.

    Raises:
        StateError: this version of torch keeps them elsewhere.
    """
    found = {}
    for name, holder, _ in _gradient_holders(model):
        gradient = holder.unsharded_accumulated_grad
        if gradient is None and hasattr(holder, "_unsharded_param"):
            gradient = holder._unsharded_param.grad
        if gradient is not None:
            found[name] = gradient
    return found


def unreduced_gradient_names(model: torch.nn.Module) -> set[str]:
    """The names that :func:`set_unreduced_gradients` takes."""
    return {name for name, _, _ in _gradient_holders(model)}


def set_unreduced_gradients(model: torch.nn.Module, gradients: Mapping[str, torch.Tensor]) -> None:
    """Have the backward passes that follow add to gradients as :func:`unreduced_gradients` gave."""
    for name, holder, dtype in _gradient_holders(model):
        if hasattr(holder, "_unsharded_param"):
            holder._unsharded_param.grad = None
        gradient = gradients.get(name)
        holder.unsharded_accumulated_grad = (
            None if gradient is None else gradient.to(holder.device, dtype)
        )


def shard_like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values for all of a tensor, divided as it is: of them, this process's share.

    Args:
        tensor: of a model, sharded or not.
        values: whole, which all processes have, or what is divided already; that is left as it is.
    """
    if not is_sharded(tensor) or is_sharded(values):
        return values
    region = local_regions({"tensor": tensor})["tensor"]
    return cut(values, TensorShare(region, _like(tensor)))


def _like(parameter: torch.Tensor) -> Any:
    """What makes of this process's part of a tensor one that is divided as a parameter is."""

    def make(part: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = torch.empty_like(parameter, dtype=part.dtype, requires_grad=False)
            assert is_sharded(made)
            made.to_local().copy_(part)
        return made

    return make


def _sharding_modules(model: torch.nn.Module) -> Iterator[FSDPModule]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # else nobody has sharded anything
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                yield module


def _gradient_holders(model: torch.nn.Module) -> Iterator[tuple[str, Any, torch.dtype]]:
    """What FSDP2 keeps of each parameter, with its name, and the type in which it adds up
    gradients. Torch gives no public way to it."""
    names = {id(p): plain_name(name) for name, p in model.named_parameters()}
    try:
        for module in _sharding_modules(model):
            for group in _parameter_groups(module):
                policy = group.mp_policy
                for holder in group.fsdp_params:
                    own = holder.sharded_param
                    dtype = policy.reduce_dtype or policy.param_dtype or own.dtype
                    yield names[id(own)], holder, dtype
    except (AttributeError, KeyError) as error:
        raise StateError(
            "the gradients of an open accumulation window can't be found in a sharded model with "
            f"torch {torch.__version__}; save where no window is open"
        ) from error


def _parameter_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # as in torch 2.8
