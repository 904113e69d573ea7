"""Losses with weights: gradients of the weighted mean over an accumulation window of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator

from robo_orchard_lab.pipeline.batch_processor import (
    LossWeighting,
    as_loss_weight,
    scale_gradients,
    scale_loss,
    zero_if_unweighted,
)
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.failure_watch import wait_for_all_ranks
from robo_orchard_lab.pipeline.errors import BatchProcessorError, StateError
from robo_orchard_lab.pipeline.state_schema import Count, Scalar, StateSchema
from robo_orchard_lab.pipeline.trainer.setup import ENGINES


class LossWeights:
    """Scaling of losses and gradients to the weighted mean of an accumulation window.

    The total weight is known after the last forward pass of the window. Each loss is therefore
    multiplied by its weight, and at the end of the window all gradients are divided by the total
    weight of all ranks: one all-reduce of a number per optimizer step, and one multiplication of
    all gradients. Nothing is read from the device.

    Losses are multiplied by ``weight / reference``, where the reference is a power of two near the
    first weights, so that half precision neither overflows nor rounds.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        window: int,
        parameters: Callable[[], Iterable[torch.nn.Parameter]],
    ) -> None:
        self._ranks = accelerator.num_processes
        self._engine = accelerator.distributed_type
        self._is_whole_mean = window == 1 and self._ranks == 1  # a micro-batch is the window
        self._parameters = parameters
        self.are_used: bool | None = None
        """True if losses come with weights; None before the first step."""
        self.uses_samples = False
        """True if single ranks may skip batches: samples are the weights of other losses."""
        self._has_batch = False  # in the open window of this rank, not skipped
        self._batches: torch.Tensor | None = None
        self._has_met = False
        self._reference: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        """Total weight of the open window on this rank."""

    def take(self, args: PipelineHookArgs, result: Any) -> None:
        """Store outputs, loss and weight of a processor's result in ``args``.

        Raises:
            BatchProcessorError: the result is not ``(outputs, loss, weight)``, or the engine
                divides losses.
        """
        if self.uses_samples:
            self._has_batch |= not args.is_padding_step
            if isinstance(result, (tuple, list)) and len(result) == 2:
                result = (*result, args.batch_size)
        if not isinstance(result, (tuple, list)) or len(result) != 3:
            raise wrong_result(args, type(result).__name__)
        args.model_outputs, loss, weight = result
        if not isinstance(loss, torch.Tensor):
            raise wrong_result(args, f"a loss of type {type(loss).__name__} with a weight")
        if self.are_used is False:
            self.decide(args, weighted=True)
        if self._engine in ENGINES:
            raise BatchProcessorError(
                f"{self._engine.value} steps the optimizer within the backward pass, so losses "
                "can't have weights; return (outputs, loss)"
            )
        weight = as_loss_weight(0.0 if args.is_padding_step else weight, loss)
        args.attached_loss = zero_if_unweighted(loss, weight)
        args._given_loss_weight = weight

    def decide(self, args: PipelineHookArgs, weighted: bool | None = None) -> None:
        """Record in the first step whether losses have weights.

        Raises:
            BatchProcessorError: earlier steps differ from this step.
        """
        weighted = args._given_loss_weight is not None if weighted is None else weighted
        if self.are_used is None:
            self.are_used = weighted
        elif weighted:
            raise wrong_result(args, "a weight in this step, and none in the steps before")
        else:
            raise wrong_result(args, "no weight in this step, and one in the steps before")

    def scale(self, loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the loss for the backward pass, and add the weight to the window's total."""
        if self._is_whole_mean:
            return loss
        if not self._has_met:  # a rank without weights would not take part in the collectives
            self._has_met = True
            wait_for_all_ranks("loss weights")
        if self._reference is None:
            self._reference = self._agreed_reference(weight)
        self._total = weight if self._total is None else self._total + weight
        return scale_loss(loss, weight, self._reference)

    def end_window(self) -> LossWeighting | None:
        """Divide the gradients by the total weight of the window; zero them if that is 0.

        Returns the scaling, or None for a window of one micro-batch on one rank.
        """
        if self._is_whole_mean:
            return None
        total, self._total = self._total, None
        assert total is not None  # a micro-batch was added
        assert self._reference is not None
        if self._ranks > 1:
            has_batch = self._has_batch or not self.uses_samples
            values = torch.stack([total, total.new_tensor(float(has_batch))])
            torch.distributed.all_reduce(values)  # a collective
            total, self._batches = values
        factor = torch.where(total > 0, self._reference * self._ranks / total, 0.0)
        scale_gradients(self._parameters(), factor)
        return LossWeighting(self._reference, factor)

    def is_window_empty(self) -> bool:
        """Return True if all ranks skipped all batches of the window that has ended.

        A rank with a batch knows that it is not; others sync the device.
        """
        has_batch, self._has_batch = self._has_batch, False
        return not has_batch and self._batches is not None and not self._batches.item()

    schema = StateSchema(total=Scalar | None, reference=Scalar | None, ranks=Count)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the open window."""
        return {"total": self._total, "reference": self._reference, "ranks": self._ranks}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise a ``StateError`` for an open window of a different world size."""
        if state["total"] is not None and state["ranks"] != self._ranks:
            raise StateError(
                "the run was saved within an accumulation window of weighted losses at world size "
                f"{state['ranks']}, which can't continue at world size {self._ranks}; use the same "
                "world size, or a checkpoint that was saved after an optimizer step"
            )

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the open window."""
        total, reference = state["total"], state["reference"]
        self._total = None if total is None else total.to(device)
        self._has_batch = total is not None and bool(total)
        self._reference = None if reference is None else reference.to(device)

    def _agreed_reference(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the power of two above the highest weight of the ranks; 1 if all are 0."""
        highest = weight.clone()
        if self._ranks > 1:
            torch.distributed.all_reduce(  # a collective, once in a run
                highest, op=torch.distributed.ReduceOp.MAX
            )
        _, exponent = torch.frexp(highest)
        one = torch.ones_like(highest)
        return torch.where(highest > 0, torch.ldexp(one, exponent), one)


def wrong_result(args: PipelineHookArgs, found: str) -> BatchProcessorError:
    """Return the error for a batch processor's result of the wrong type."""
    return BatchProcessorError(
        f"{type(args.batch_processor).__name__}.forward must return (outputs, loss), with a "
        "scalar loss if need_backward is True, or (outputs, loss, weight), the same in every step; "
        f"got {found}; for losses by name, pass optimizer={{name: ...}} to the trainer"
    )
