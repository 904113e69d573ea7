"""The norm of all gradients, computed once for each update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.sharded_tensors import has_sharded, is_sharded, local_tensor

REPLICATED_TYPES = frozenset(
    {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
)
"""Where each rank has all of the model, or the user has divided it, so that gradients tell what
they are. Elsewhere Accelerate knows how to add up its parts."""


def gradient_norm(args: PipelineHookArgs, norm_type: float | None = None) -> torch.Tensor | None:
    """The joint norm of the gradients of an accumulation window, unscaled, on their device.

    Call it in a ``before`` of ``on_optimizer_step``, on every rank alike. Whoever comes first
    computes it and keeps it in ``args.grad_norm``, where those that follow find it. Nothing is
    read from the device; where gradients are sharded (FSDP2), it takes one collective.

    Args:
        args: those of the update.
        norm_type: the order; None takes the norm that is there already, or else that of order 2.
            Another one is computed beside it, of the gradients as they are then.

    Returns:
        None where only clipping tells: with DeepSpeed, or FSDP's first version in fp16.
    """
    known = args.grad_norm
    if known is not None and (norm_type is None or _is_current(args, norm_type)):
        return known
    return _measure(args, norm_type or 2.0, list(args.model.parameters()))


def clip_gradients(
    args: PipelineHookArgs, max_norm: float, norm_type: float = 2.0
) -> torch.Tensor | None:
    """Scale the gradients so that their joint norm is at most ``max_norm``; gives what it was.

    Bit for bit ``torch.nn.utils.clip_grad_norm_``. A norm that was computed in this update is not
    computed again, except with FSDP's first version. None where DeepSpeed clips by itself and does
    not tell.
    """
    parameters = list(args.model.parameters())
    gradients = _gradients(parameters)
    if _are_known(args.accelerator, gradients):
        known = _is_current(args, norm_type)
        norm = args.grad_norm if known else _measure(args, norm_type, parameters)
        assert norm is not None  # it is told of all that are known
        if has_sharded(gradients):
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as there
            torch._foreach_mul_([*map(local_tensor, gradients)], factor)
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    else:
        norm = _clip_by_engine(args.accelerator, parameters, max_norm, norm_type)
        if args.grad_norm is None:
            args.grad_norm, args.grad_norm_order = norm, norm_type
    args.gradients_changed = True
    return norm


def clip_gradient_values(args: PipelineHookArgs, max_value: float) -> None:
    """Clamp every element of the gradients to [-max_value, max_value]; each rank what it has."""
    unscale_gradients(args.accelerator)
    parameters = list(args.model.parameters())
    gradients = _gradients(parameters)
    if has_sharded(gradients):
        for gradient in map(local_tensor, gradients):
            gradient.clamp_(-max_value, max_value)
    else:
        torch.nn.utils.clip_grad_value_(parameters, max_value)
    args.gradients_changed = True


def unscale_gradients(accelerator: Accelerator) -> None:
    """Divide fp16 gradients by the loss scale, unless that was done in this update."""
    try:
        accelerator.unscale_gradients()
    except RuntimeError as error:
        if "unscale_() has already been called" not in str(error):
            raise


def _is_current(args: PipelineHookArgs, norm_type: float) -> bool:
    return args.grad_norm_order == norm_type and not args.gradients_changed


def _measure(
    args: PipelineHookArgs, norm_type: float, parameters: list[torch.nn.Parameter]
) -> torch.Tensor | None:
    """The norm of the gradients as they are; kept if it is the first of this update."""
    accelerator, gradients = args.accelerator, _gradients(parameters)
    norm: torch.Tensor | None = None
    if _are_known(accelerator, gradients):
        unscale_gradients(accelerator)
        if has_sharded(gradients):
            norm = _sharded_norm(gradients, norm_type)
        else:
            # Adding up the entries of a sparse gradient waits for the device.
            dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
            norm = _total_norm(dense, norm_type)
    elif accelerator.scaler is None:  # with one, clipping would unscale a second time, and fail
        # A bound that is never reached multiplies the gradients by 1.
        norm = _clip_by_engine(accelerator, parameters, float("inf"), norm_type)
    if args.grad_norm is None and norm is not None:
        args.grad_norm, args.grad_norm_order = norm, norm_type
    return norm


def _total_norm(gradients: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """What ``torch.nn.utils.get_total_norm`` gives, bit for bit."""
    if gradients and len({(g.device, g.dtype) for g in gradients}) == 1:
        # The same operations as there, without looking for groups, which takes 40 us.
        norms = torch.stack(list(torch._foreach_norm(gradients, norm_type)))
        total: torch.Tensor = torch.linalg.vector_norm(norms, norm_type)
        return total
    return torch.nn.utils.get_total_norm(gradients, norm_type)


def _sharded_norm(gradients: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of gradients of which each rank has parts, and maybe of some that all have."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if is_sharded(gradient) else None
        groups.setdefault((mesh, gradient.dtype), []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group, norm_type) for group in groups.values()]
    whole = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]  # a collective
    return whole[0] if len(whole) == 1 else torch.nn.utils.get_total_norm(whole, norm_type)


def _gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _are_known(accelerator: Accelerator, gradients: Sequence[torch.Tensor]) -> bool:
    """Whether each gradient is a plain tensor, all of it, or a sharded one that says so."""
    if accelerator.distributed_type not in REPLICATED_TYPES and not accelerator.is_fsdp2:
        return False
    return set(map(type, gradients)) <= {torch.Tensor} or all(
        type(gradient) is torch.Tensor or is_sharded(gradient) for gradient in gradients
    )


def _clip_by_engine(
    accelerator: Accelerator,
    parameters: list[torch.nn.Parameter],
    max_norm: float,
    norm_type: float,
) -> torch.Tensor | None:
    norm = accelerator.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)
    if hasattr(norm, "full_tensor"):  # that of sharded gradients is in parts, too
        norm = norm.full_tensor()  # a collective
    return norm if norm is None else torch.as_tensor(norm)
