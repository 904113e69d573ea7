"""Losses that come with weights: the mean over the whole job, from what each micro-batch adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType

from robo_orchard_lab.pipeline.batch_processor import (
    LossWeighting,
    as_loss_weight,
    scale_gradients,
    scale_loss,
    zero_if_unweighted,
)
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.sections import meet_others
from robo_orchard_lab.pipeline.errors import BatchProcessorError, StateError


class LossWeights:
    """Makes the gradients of an update those of the weighted mean over its window, of all ranks.

    How much all of them weigh together is known when the last micro-batch has had its forward pass.
    So each loss is multiplied by its weight, and the gradients are divided by the sum of all
    weights at the end of the window: one exchange of a number for each update, where there are
    several ranks, and one more multiplication of all gradients. Nothing is read from the device.

    Losses are multiplied by their weights over a reference, which is near the first weights, so
    that half precision holds them. It is a power of two, by which nothing is rounded.

    Args:
        accelerator: the ranks, and what engine updates the weights.
        window: how many micro-batches make one.
        run_backward: runs the backward pass of a loss divided by a number.
        parameters: whose gradients to divide.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        window: int,
        run_backward: Callable[[torch.Tensor, float], Any],
        parameters: Callable[[], Iterable[torch.nn.Parameter]],
    ) -> None:
        self._ranks = accelerator.num_processes
        self._engine = accelerator.distributed_type
        self._alone = window == 1 and self._ranks == 1  # a micro-batch is the whole mean
        self._run_backward = run_backward
        self._parameters = parameters
        self.given: bool | None = None
        """Whether losses come with weights; None ahead of the first step."""
        self._met = False
        self._reference: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        """Of this rank in the window that is open."""

    def take(self, args: PipelineHookArgs, result: Any) -> None:
        """What a processor has returned that is no pair: outputs, a loss and what that weighs.

        Raises:
            BatchProcessorError: it is something else, the steps before had no weights, or the
                engine divides the losses by itself.
        """
        if not isinstance(result, (tuple, list)) or len(result) != 3:
            raise wrong_result(args, type(result).__name__)
        args.model_outputs, loss, weight = result
        if not isinstance(loss, torch.Tensor):
            raise wrong_result(args, f"a loss of type {type(loss).__name__} with a weight")
        if self.given is False:
            raise wrong_result(args, "a weight in this step, and none in those before it")
        self.given = True
        if self._engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise BatchProcessorError(
                f"{self._engine.value} updates the weights within the backward pass, so that "
                "losses can't be weighted; return (outputs, loss)"
            )
        weight = as_loss_weight(0.0 if args.is_padding_step else weight, loss)
        args.attached_loss = zero_if_unweighted(loss, weight)
        args.given_loss_weight = weight

    def backward(self, args: PipelineHookArgs, loss: torch.Tensor) -> None:
        """The backward pass of a loss; with weights, at the end of its window, of the whole mean.

        Raises:
            BatchProcessorError: it has no weight, and those before it had some.
        """
        weight = args.given_loss_weight
        if weight is None:
            if self.given:
                raise wrong_result(args, "no weight in this step, and some in those before it")
            self.given = False
            self._run_backward(loss, args.loss_divisor)
            return
        self._run_backward(self.add(loss, weight), 1.0)
        if args.at_accumulation_boundary:
            args.loss_weighting = self.end_window()

    def add(self, loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What to run the backward pass of, in the place of a mean loss of such a weight."""
        if self._alone:
            return loss
        if not self._met:  # without weights, another rank would not come to the exchanges
            self._met = True
            meet_others("loss weights")
        if self._reference is None:
            self._reference = self._agreed_reference(weight)
        self._total = weight if self._total is None else self._total + weight
        return scale_loss(loss, weight, self._reference)

    def end_window(self) -> LossWeighting | None:
        """Divide the gradients by all that the window weighs; zeros where that is nothing.

        Returns:
            None where a micro-batch is the whole mean.
        """
        if self._alone:
            return None
        total, self._total = self._total, None
        assert total is not None  # since a micro-batch was added
        assert self._reference is not None
        if self._ranks > 1:
            total = total.clone()
            torch.distributed.all_reduce(total)  # a collective
        factor = torch.where(total > 0, self._reference * self._ranks / total, 0.0)
        scale_gradients(self._parameters(), factor)
        return LossWeighting(self._reference, factor)

    def state_dict(self) -> dict[str, Any]:
        """Of a window that is open."""
        return {"total": self._total, "reference": self._reference, "ranks": self._ranks}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse what :meth:`load_state_dict` could not go on from.

        Raises:
            StateError: it is that within a window, of another number of ranks.
        """
        if state["total"] is not None and state["ranks"] != self._ranks:
            raise StateError(
                f"the run was saved within an accumulation window of weighted losses by "
                f"{state['ranks']} processes, which {self._ranks} can't go on with; give as many, "
                "or a checkpoint that was saved after an update"
            )

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on within a window, or begin one."""
        total, reference = state["total"], state["reference"]
        self._total = None if total is None else total.to(device)
        self._reference = None if reference is None else reference.to(device)

    def _agreed_reference(self, weight: torch.Tensor) -> torch.Tensor:
        """The power of two above the highest weight of the ranks; 1 where there is none."""
        highest = weight.clone()
        if self._ranks > 1:
            torch.distributed.all_reduce(  # a collective, once in a run
                highest, op=torch.distributed.ReduceOp.MAX
            )
        _, exponent = torch.frexp(highest)
        one = torch.ones_like(highest)
        return torch.where(highest > 0, torch.ldexp(one, exponent), one)


def wrong_result(args: PipelineHookArgs, found: str) -> BatchProcessorError:
    """The error that a batch processor returns something else than it should."""
    return BatchProcessorError(
        f"{type(args.batch_processor).__name__}.forward must return (outputs, loss), with a "
        "loss where need_backward is True, or (outputs, loss, weight), in every step alike; "
        f"got {found}"
    )
