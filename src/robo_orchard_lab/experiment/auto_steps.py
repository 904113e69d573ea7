"""How often a schedule of learning rates moves in a run, counted ahead of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator

from robo_orchard_lab.experiment.run_plan import RunLength
from robo_orchard_lab.pipeline.data import DataOrder, TrainingData
from robo_orchard_lab.pipeline.data.loader import why_no_batch
from robo_orchard_lab.pipeline.errors import DataError, PipelineConfigError
from robo_orchard_lab.pipeline.hooks.optimizer import ScheduleUnit
from robo_orchard_lab.pipeline.progress import TrainerLimits, TrainerProgress, remaining_steps


def count_moves(
    dataloader: Iterable[Any],
    accelerator: Accelerator,
    limits: TrainerLimits,
    every: ScheduleUnit = "optimizer_step",
) -> int:
    """How often a trainer of these will have moved its schedule when it is at its limit.

    That is the number of updates, with the processes and the accumulation of ``accelerator``, or
    of epochs that are passed over to their end. Updates that are skipped, as after an overflow,
    move no schedule, but count here. Called on all ranks alike; nothing is loaded.

    >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    >>> count_moves([1, 2, 3], accelerator, TrainerLimits(max_step=7))
    5

    Raises:
        PipelineConfigError: that depends on how many batches the data has, which has no length.
        DataError: an epoch has no batch.
    """
    data = TrainingData(dataloader, DataOrder(), accelerator, TrainerProgress())
    steps = data.steps_per_epoch
    if steps == 0:
        raise DataError("the data gives no batch; " + why_no_batch(dataloader))
    window = accelerator.gradient_accumulation_steps
    moves = _known_moves(limits, steps, window, every)
    if moves is None:
        raise PipelineConfigError(
            "how often the schedule moves depends on the number of batches in an epoch, and the "
            f"data ({type(dataloader).__name__}) has no length; write a number"
        )
    return moves


def _known_moves(
    limits: TrainerLimits, steps_per_epoch: int | None, window: int, every: ScheduleUnit
) -> int | None:
    if steps_per_epoch is None:
        return _moves_without_length(limits, window, every)
    steps = remaining_steps(limits, TrainerProgress(), steps_per_epoch, window)
    assert steps is not None  # with a length, each limit gives one
    if every == "epoch":
        return steps // steps_per_epoch
    return RunLength(steps, steps_per_epoch, window).updates


def _moves_without_length(limits: TrainerLimits, window: int, every: ScheduleUnit) -> int | None:
    """Where the end of an epoch, and so the last window of it, may come anywhere."""
    if every == "epoch":
        only = limits.max_step is None and limits.max_optimizer_step is None
        return limits.max_epoch if only else None
    if limits.max_epoch is not None or (limits.max_step is not None and window > 1):
        return None
    given = [each for each in (limits.max_step, limits.max_optimizer_step) if each is not None]
    return min(given)
