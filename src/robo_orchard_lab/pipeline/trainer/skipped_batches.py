"""Batches that a hook skips with ``args.skip_batch(reason)``: only their steps count.

On one rank neither the forward nor the backward pass runs. On several ranks, whose passes have
collectives, the rank runs a padding step instead, and all losses get their numbers of samples as
weights: the optimizer step uses the mean over the samples that no rank has skipped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from robo_orchard_lab.pipeline.batch_processor import LossWeighting, scale_gradients
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineStateError
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows, padding_step
from robo_orchard_lab.pipeline.trainer.loss_weights import LossWeights
from robo_orchard_lab.pipeline.trainer.setup import ENGINES

logger = logging.getLogger(__name__)

METRIC = "skipped_batches"
"""Metric of the number of skipped batches on all ranks since the last logging point."""


_NO_SPARE = (
    "args.skip_batch: the rank ran its padding step with the skipped batch itself, since it had no "
    "other one since the run began or resumed; assign args.batch a valid batch before the skip"
)


class SkippedBatches:
    """Steps of skipped batches, and the weighted or dropped updates of their windows.

    Args:
        run: objects of the run.
        windows: accumulation windows.
        loss_weights: weights of losses; on several ranks those of samples, see :meth:`begin_loop`.
        parameters: returns all parameters with gradients.
        zero_grad: sets all gradients to None.
    """

    def __init__(
        self,
        run: PipelineRun,
        windows: AccumulationWindows,
        loss_weights: LossWeights,
        parameters: Callable[[], Iterable[torch.nn.Parameter]],
        zero_grad: Callable[[], None],
    ) -> None:
        self._run = run
        self._windows = windows
        self._loss_weights = loss_weights
        self._parameters = parameters
        self._zero_grad = zero_grad
        self.are_joint = False
        """True on several ranks if a hook may skip batches."""
        self._spare: Any = None  # newest batch that was not skipped, for padding steps
        self._reported: set[str] = set()

    def begin_loop(self) -> None:
        """On several ranks, weight losses by samples if a hook has called `allow_skip_batch`."""
        run = self._run
        self.are_joint = run.agreement.several and run.may_skip_batches
        self._loss_weights.uses_samples = self.are_joint and run.batch_processor.need_backward

    def run_step(self, args: PipelineHookArgs, passes: Callable[[PipelineHookArgs], None]) -> None:
        """Run the step of a skipped batch; ``passes`` runs forward and backward."""
        run = self._run
        if run.accelerator.distributed_type in ENGINES:
            raise PipelineStateError(
                f"args.skip_batch: {run.accelerator.distributed_type.value} counts micro-batches "
                "by itself, and can't skip one; filter the dataset instead"
            )
        if run.optimizer_names and (self._windows.length > 1 or run.agreement.several):
            raise PipelineStateError(
                "args.skip_batch: with several optimizers, expected one process without gradient "
                "accumulation; filter the dataset instead"
            )
        self._report(args)
        if self.are_joint:
            if self._spare is not None:
                args.batch = self._spare
            args._loss_divisor = math.inf  # as in any padding step
            try:
                with padding_step(run.model):
                    passes(args)
            except Exception as error:
                if self._spare is None:
                    error.add_note(_NO_SPARE)
                raise
            return
        self._windows.skip_batch()
        if args.at_accumulation_boundary and self._windows.length == 1:
            self.end_window(args)

    def end_window(self, args: PipelineHookArgs) -> None:
        """End a window with skipped batches, on one rank: correct the gradients' mean."""
        skipped, total, is_empty = self._windows.end_skipped()
        if not self._run.batch_processor.need_backward:
            return
        if is_empty:
            self._drop_update(args)
        elif self._loss_weights.are_used:
            if args.batch_skip_reason is not None:  # else done in the backward pass
                args._loss_weighting = self._loss_weights.end_window()
        else:  # losses were divided by the samples of all batches
            device = self._run.accelerator.device
            factor = torch.tensor(total / (total - skipped), device=device)
            scale_gradients(self._parameters(), factor)
            args._loss_weighting = LossWeighting(torch.ones_like(factor), factor)

    def end_joint_step(self, args: PipelineHookArgs) -> None:
        """End a step on several ranks; drop the update of a window without a batch."""
        if not args.is_padding_step:
            self._spare = args.batch
        if args.at_accumulation_boundary and self._loss_weights.is_window_empty():
            self._drop_update(args)

    def _drop_update(self, args: PipelineHookArgs) -> None:
        self._zero_grad()
        args._update_committed = False

    def _report(self, args: PipelineHookArgs) -> None:
        """Count the batch, and log the first one of each reason as a warning."""
        progress, reason = args.progress, str(args.batch_skip_reason)
        progress.skipped_batches += 1
        args.metrics.publish(METRIC, 1, reduce="sum")
        level = logging.DEBUG if reason in self._reported else logging.WARNING
        if len(self._reported) < 100:
            self._reported.add(reason)
        logger.log(
            level,
            "skipped the batch of step %d on rank %d, number %d of this rank: %s (further ones "
            "with this reason are logged at level DEBUG)",
            *(args.global_step_id, args.accelerator.process_index),
            *(progress.skipped_batches, reason),
        )
