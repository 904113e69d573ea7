"""Models sharded by torch's FSDP2 (``fully_shard``).

The functions visit all modules of a model. Only :func:`set_gradient_sync` is on the step path: it
runs at the begin and the end of an accumulation window.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from robo_orchard_lab.pipeline.checkpoint import ShareOf, TensorShare, non_finite_names
from robo_orchard_lab.pipeline.checkpoint.shards import cut, local_regions
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.model import ModelOfRun, WeightSet, plain_name, plain_weights
from robo_orchard_lab.pipeline.sharded_tensors import (
    gather_full_tensors,
    has_sharded,
    is_sharded,
    local_tensor,
)

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def is_sharded_model(model: torch.nn.Module) -> bool:
    """Return True if a model, compiled or not, is sharded by FSDP2 or has sharded parameters."""
    return next(_sharding_modules(model), None) is not None or has_sharded(model.parameters())


def plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """Return the class of a module, without the subclass of ``fully_shard``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = type(module)
    if fsdp is not None and kind.__bases__[:1] == (fsdp.FSDPModule,):
        return kind.__bases__[1]
    return kind


def set_gradient_sync(model: torch.nn.Module, synchronise: bool) -> None:
    """Reduce gradients among processes in later backward passes, or only accumulate.

    Unreduced gradients have the full shape on every process, and are not in ``parameter.grad``.
    """
    for module in _sharding_modules(model):
        module.set_requires_gradient_sync(synchronise, recurse=False)


def reshard(model: torch.nn.Module) -> None:
    """Free the gathered parameters of a model, without a collective.

    After a forward pass without a backward pass, FSDP2 keeps the root's parameters gathered, and
    would use these copies even after the shards have changed.
    """
    for module in _sharding_modules(model):
        module.reshard()


def shares_of_model(model: torch.nn.Module) -> ShareOf | None:
    """Return a selector of this process's shares of a saved state.

    A saved tensor is sharded like a parameter if its name contains the parameter's name, as in
    ``state.<name>.exp_avg``, and the full shapes are equal.

    Returns:
        The function; None if no parameter is sharded.

    Raises:
        StateError: a process holds a parameter in several pieces.
    """
    live = {plain_name(name): p for name, p in model.named_parameters() if is_sharded(p)}
    if not live:
        return None
    shares = {
        name: TensorShare(region, _shard_maker(live[name]))
        for name, region in local_regions(live).items()
    }

    def share_of(path: str, shape: tuple[int, ...]) -> TensorShare | None:
        words = path.split(".")
        for length in range(len(words), 0, -1):
            for begin in range(len(words) - length + 1):
                name = ".".join(words[begin : begin + length])
                if name in shares and tuple(live[name].shape) == shape:
                    return shares[name]
        return None

    return share_of


def gather_weights(run: ModelOfRun, kept: WeightSet | None) -> dict[str, torch.Tensor] | None:
    """Return complete weights by plain names on the first rank, and None on others. A collective.

    Sharded weights are gathered one at a time to the CPU of the first rank. Plain ones are not
    copied. ``kept`` are weights of a hook, instead of the model's own.
    """
    first = run.accelerator.is_main_process
    if not is_sharded_model(run.model):
        if not first:
            return None
        return plain_weights(run) if kept is None else kept.weights()
    with nullcontext() if kept is None else kept.applied():
        full = gather_full_tensors(plain_weights(run), keep=first)
    return full if first else None


def non_finite_weights(run: ModelOfRun, kept: WeightSet | None) -> list[str]:
    """Return the names of weights that are non-finite on any rank.

    A device sync, and a collective with several ranks.

    Args:
        run: run of the model.
        kept: weights of a hook, instead of the model's own.
    """
    if kept is None or is_sharded_model(run.model):
        with nullcontext() if kept is None else kept.applied():
            weights = {name: local_tensor(t) for name, t in plain_weights(run).items()}
            names = non_finite_names(weights)
    else:
        names = non_finite_names(kept.weights())
    names = [name for name in names if name not in run.constants]
    if run.accelerator.num_processes == 1:
        return names
    return list(dict.fromkeys(chain.from_iterable(gather_objects(names))))


def shard_like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Shard complete values, equal on all processes, like a tensor of a model.

    Values for a plain tensor and values that are sharded stay unchanged.
    """
    if not is_sharded(tensor) or is_sharded(values):
        return values
    region = local_regions({"tensor": tensor})["tensor"]
    return cut(values, TensorShare(region, _shard_maker(tensor)))


def _shard_maker(parameter: torch.Tensor) -> Any:
    """Return a converter from a region's values to a tensor sharded like a parameter."""

    def make(part: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = torch.empty_like(parameter, dtype=part.dtype, requires_grad=False)
            assert is_sharded(made)
            made.to_local().copy_(part)
        return made

    return make


def _sharding_modules(model: torch.nn.Module) -> Iterator[FSDPModule]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # else no module is sharded
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                yield module
