"""What is said of an update that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hooks._finite import Finding
from robo_orchard_lab.pipeline.hooks._window_recorder import ObservedUpdate
from robo_orchard_lab.pipeline.model import plain_model, plain_name
from robo_orchard_lab.pipeline.sharded_tensors import has_sharded, local_part

_SHOWN = 3  # of the names and ids in a message


class NonFiniteError(FloatingPointError):
    """A loss or gradient is infinite or not a number; the message says which, where and when."""

    __module__ = "robo_orchard_lab.pipeline.hooks.non_finite_guard"  # the name to import it by

    def __init__(
        self, message: str, folder: Path | None = None, parameters: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.folder = folder
        """Where the batches lie, for ``replay``; None where they were not written."""
        self.parameters = tuple(parameters)
        """The names of those with gradients that are not finite, where that is known."""


def bad_gradients(args: PipelineHookArgs) -> list[str] | None:
    """The parameters whose gradients are not finite, in the model's order; reads from the device.

    A collective where they are sharded. None where that is not known: clipping by a norm that is
    NaN makes all of them NaN.
    """
    if args.gradients_changed:
        return None
    parameters = plain_model(args.run).named_parameters()
    named = [(plain_name(name), p.grad) for name, p in parameters if p.grad is not None]
    flags = [
        (local.coalesce().values() if local.is_sparse else local).isfinite().all()
        for local in (local_part(gradient) for _, gradient in named)
    ]
    packed = torch.stack(flags).int() if flags else torch.ones(0)
    if has_sharded(gradient for _, gradient in named):
        torch.distributed.all_reduce(packed, torch.distributed.ReduceOp.MIN)  # a collective
    finite = packed.tolist()  # waits for the device
    return [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]


def what_and_when(
    args: PipelineHookArgs,
    finding: Finding,
    update: ObservedUpdate,
    parameters: Sequence[str] | None,
) -> str:
    """What is not finite in an update, on which rank, at which counters, of which samples.

    Args:
        args: of the update that is open.
        finding: what is wrong.
        update: the one it is wrong with.
        parameters: whose gradients are not finite; None where that is not known.
    """
    text = str(finding)
    if args.accelerator.num_processes > 1:
        text += f" on rank {args.accelerator.process_index} of {args.accelerator.num_processes}"
        if not finding.bad_losses:
            text += ", where the loss is finite"
    text += f", at {update.progress}"
    if finding.bad_norm and parameters:
        text += f", by the gradients of {_some(parameters)}"
    elif finding.bad_norm and parameters is not None:
        text += ", though each gradient is finite"
    elif finding.bad_norm and update.clipped:
        text += ", clipped before anyone could tell by which gradient"
    bad = [step for step in update.steps if not step.finite] or update.steps
    ids = [str(sample) for step in bad for sample in step.sample_ids or ()]
    return text + (f", samples {_some(ids)}" if ids else "")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
