"""Total norm of the gradients, computed once per update, and gradient clipping.

Gradients are those of the optimizer's parameters, in the model or outside, such as of a learned
loss. Parameters that the optimizer lacks count nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from robo_orchard_lab.pipeline.batch_processor import multiply_all
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.sharded_tensors import has_sharded, is_sharded, local_tensor

REPLICATED_TYPES = frozenset(
    {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
)
"""Distributed types whose gradients are plain or DTensor. For others (DeepSpeed, FSDP1) only
Accelerate can compute the norm."""


def gradient_norm(args: PipelineHookArgs, norm_type: float | None = None) -> torch.Tensor | None:
    """Return the total norm of the accumulated, unscaled gradients, on their device.

    Call it in a ``before`` of ``on_optimizer_step``, on every rank. The first call of an update
    computes the norm and stores it in ``args.grad_norm``; ``norm_type=None`` returns the stored
    norm, or computes order 2. No device sync; sharded gradients (FSDP2) cost one collective.
    Returns None if only clipping computes the norm: with DeepSpeed, or FSDP1 in fp16.
    """
    known = args.grad_norm
    if known is not None and (norm_type is None or _is_current(args, norm_type)):
        return known
    return _measure(args, norm_type or 2.0, updated_parameters(args))


def clip_gradients(
    args: PipelineHookArgs, max_norm: float, norm_type: float = 2.0
) -> torch.Tensor | None:
    """Clip the total norm of the gradients to ``max_norm``; return the norm before clipping.

    Bitwise equal to ``torch.nn.utils.clip_grad_norm_``. Reuses the norm of this update, except with
    FSDP1. Returns None if DeepSpeed clips without reporting the norm.
    """
    parameters = updated_parameters(args)
    gradients = _gradients(parameters)
    if _are_supported(args.accelerator, gradients):
        known = _is_current(args, norm_type)
        norm = args.grad_norm if known else _measure(args, norm_type, parameters)
        assert norm is not None  # known gradients always have a norm
        if has_sharded(gradients):
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as in torch
            multiply_all([*map(local_tensor, gradients)], factor)
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    else:
        norm = _clip_by_engine(args, max_norm, norm_type)
        if args.grad_norm is None:
            args.grad_norm, args.grad_norm_order = norm, norm_type
    args.gradients_changed = True
    return norm


def clip_gradient_values(args: PipelineHookArgs, max_value: float) -> None:
    """Clamp every element of this rank's gradients to [-max_value, max_value]."""
    unscale_gradients(args)
    parameters = updated_parameters(args)
    gradients = _gradients(parameters)
    if has_sharded(gradients):
        for gradient in map(local_tensor, gradients):
            gradient.clamp_(-max_value, max_value)
    else:
        torch.nn.utils.clip_grad_value_(parameters, max_value)
    args.gradients_changed = True


def updated_parameters(args: PipelineHookArgs) -> list[torch.nn.Parameter]:
    """Return the optimizer's parameters: the model's, in its order, then others.

    All parameters of the model in a run without an optimizer.
    """
    run, optimizer, name = args.run, args.optimizer, args.optimizer_name or ""
    if optimizer is None:
        return list(run.model.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ids = list(map(id, held))
    known_ids, parameters = run.updated_parameters.get(name, ([], []))
    if known_ids != ids:  # else saves a walk through the model's modules
        others = dict(zip(ids, held, strict=True))
        of_model = [p for p in run.model.parameters() if others.pop(id(p), None) is not None]
        parameters = [*of_model, *others.values()]
        run.updated_parameters[name] = ids, parameters
    return parameters


def unscale_gradients(args: PipelineHookArgs) -> None:
    """Divide the optimizer's fp16 gradients by its loss scale, once per update."""
    try:
        if args.optimizer_name is None:
            args.accelerator.unscale_gradients()
        elif args.scaler is not None:
            args.scaler.unscale_(getattr(args.optimizer, "optimizer", args.optimizer))
    except RuntimeError as error:
        if "unscale_() has already been called" not in str(error):
            raise


def _is_current(args: PipelineHookArgs, norm_type: float) -> bool:
    return args.grad_norm_order == norm_type and not args.gradients_changed


def _measure(
    args: PipelineHookArgs, norm_type: float, parameters: list[torch.nn.Parameter]
) -> torch.Tensor | None:
    """Compute the norm of the current gradients; store the first norm of an update."""
    accelerator, gradients = args.accelerator, _gradients(parameters)
    norm: torch.Tensor | None = None
    if _are_supported(accelerator, gradients):
        unscale_gradients(args)
        if has_sharded(gradients):
            norm = _sharded_norm(gradients, norm_type)
        else:
            # coalesce() of a sparse gradient is a device sync.
            dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
            norm = total_norm(dense, norm_type)
    elif accelerator.scaler is None:  # with a scaler, clipping would unscale twice and fail
        # An infinite bound leaves the gradients unchanged.
        norm = _clip_by_engine(args, float("inf"), norm_type)
    if args.grad_norm is None and norm is not None:
        args.grad_norm, args.grad_norm_order = norm, norm_type
    return norm


def total_norm(gradients: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Return a result bitwise equal to ``torch.nn.utils.get_total_norm``.

    That function groups gradients by device and dtype and moves each norm; here, gradients of one
    device and dtype skip this.
    """
    if len({(g.device, g.dtype) for g in gradients}) == 1 and hasattr(torch, "_foreach_norm"):
        norms = torch.stack(list(torch._foreach_norm(gradients, norm_type)))
        total: torch.Tensor = torch.linalg.vector_norm(norms, norm_type)
        return total
    return torch.nn.utils.get_total_norm(gradients, norm_type)


def _sharded_norm(gradients: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Return the norm of sharded gradients, possibly mixed with replicated gradients."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if is_sharded(gradient) else None
        groups.setdefault((mesh, gradient.dtype), []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group, norm_type) for group in groups.values()]
    full = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]  # a collective
    return full[0] if len(full) == 1 else torch.nn.utils.get_total_norm(full, norm_type)


def _gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _are_supported(accelerator: Accelerator, gradients: Sequence[torch.Tensor]) -> bool:
    """Return True if each gradient is a plain tensor or a DTensor."""
    if accelerator.distributed_type not in REPLICATED_TYPES and not accelerator.is_fsdp2:
        return False
    return set(map(type, gradients)) <= {torch.Tensor} or all(
        type(gradient) is torch.Tensor or is_sharded(gradient) for gradient in gradients
    )


def _clip_by_engine(
    args: PipelineHookArgs, max_norm: float, norm_type: float
) -> torch.Tensor | None:
    # All parameters: Accelerate compares the list with that of an FSDP1 model.
    parameters = list(args.model.parameters())
    norm = args.accelerator.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)
    if hasattr(norm, "full_tensor"):  # a sharded norm
        norm = norm.full_tensor()  # a collective
    return norm if norm is None else torch.as_tensor(norm)
