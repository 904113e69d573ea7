"""Length of a run and number of its events, computed before the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from robo_orchard_lab.pipeline.data import DataOrder, TrainingData
from robo_orchard_lab.pipeline.data.loader import explain_no_batch
from robo_orchard_lab.pipeline.errors import DataError, PipelineConfigError
from robo_orchard_lab.pipeline.hooks.optimizer import LRSchedulerUnit
from robo_orchard_lab.pipeline.progress import TrainerLimits, TrainerProgress, remaining_steps
from robo_orchard_lab.pipeline.trigger import (
    AnyOf,
    AtSteps,
    EveryEpochs,
    EveryOptimizerSteps,
    EverySteps,
    First,
    Last,
    Trigger,
)

_MAX_COUNTED = 1_000_000


@dataclass(frozen=True, slots=True)
class RunLength:
    """Length of a run up to its limits.

    Attributes:
        steps: Steps of each rank.
        window: Steps per accumulation window.
    """

    steps: int
    steps_per_epoch: int
    window: int

    @property
    def epochs(self) -> int:
        """Number of epochs; the last epoch may be incomplete."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def updates(self) -> int:
        """Number of optimizer steps, including skipped steps."""
        epochs, rest = divmod(self.steps, self.steps_per_epoch)
        return epochs * self.updates_per_epoch + -(-rest // self.window)

    @property
    def updates_per_epoch(self) -> int:
        """Number of optimizer steps in a complete epoch."""
        return -(-self.steps_per_epoch // self.window)

    def step_of_update(self, number: int) -> int:
        """Return the last step of an optimizer step; both are counted from 1."""
        epochs, within = divmod(number - 1, self.updates_per_epoch)
        in_epoch = min((within + 1) * self.window, self.steps_per_epoch)
        return min(epochs * self.steps_per_epoch + in_epoch, self.steps)


def run_length(
    dataloader: Iterable[Any], accelerator: Accelerator, limits: TrainerLimits
) -> RunLength | None:
    """Return the length of a run, or None if the data has no length.

    Call it on all ranks; no data is loaded.
    """
    progress = TrainerProgress()
    per_epoch = TrainingData(dataloader, DataOrder(), accelerator, progress).steps_per_epoch
    if not per_epoch:
        return None
    window = accelerator.gradient_accumulation_steps
    steps = remaining_steps(limits, progress, per_epoch, window)
    return None if steps is None else RunLength(steps, per_epoch, window)


def count_due(trigger: Trigger, length: RunLength) -> int | None:
    """Count how often a trigger is due in a run; None for a trigger by time.

    >>> length = RunLength(steps=100, steps_per_epoch=30, window=4)
    >>> [count_due(Trigger.parse(text), length) for text in ("10 steps", "1 epoch", "10 min")]
    [10, 3, None]
    >>> count_due(Trigger.parse("10 steps | 1 epoch | last"), length)
    10
    """
    parts = trigger.triggers if isinstance(trigger, AnyOf) else (trigger,)
    found = [_steps_due(part, length) for part in parts]
    if any(steps is None for steps in found):
        return None
    known = [steps for steps in found if steps is not None]
    if len(known) == 1 or sum(map(len, known)) > _MAX_COUNTED:
        return max(map(len, known))
    return len(set().union(*known))


def _steps_due(trigger: Trigger, length: RunLength) -> range | list[int] | None:
    """Return the due steps of a trigger, counted from 1."""
    steps = length.steps
    match trigger:
        case EverySteps(n=n, first=first):
            return range(first + 1, steps + 1, n)
        case EveryEpochs(n=n, first=first):
            per_epoch = length.steps_per_epoch
            return range((first + 1) * per_epoch, steps + 1, n * per_epoch)
        case EveryOptimizerSteps(n=n, first=first):
            numbers = range(first + 1, length.updates + 1, n)
            if len(numbers) > _MAX_COUNTED:
                return numbers
            return [length.step_of_update(number) for number in numbers]
        case AtSteps(steps=at):
            return [step for step in at if step <= steps]
        case First():
            return range(1, 2)
        case Last():
            return range(steps, steps + 1)
    return None


def count_lr_scheduler_steps(
    dataloader: Iterable[Any],
    accelerator: Accelerator,
    limits: TrainerLimits,
    every: LRSchedulerUnit = "optimizer_step",
) -> int:
    """Count the steps of the LR scheduler in a run up to its limits.

    The count is the number of optimizer steps, at the world size and accumulation of
    ``accelerator``, or of completed epochs. Skipped updates, such as after an overflow, are
    counted although the LR scheduler doesn't step. Call it on all ranks; no data is loaded.

    >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    >>> count_lr_scheduler_steps([1, 2, 3], accelerator, TrainerLimits(max_step=7))
    5

    Raises:
        PipelineConfigError: The count depends on the length of an epoch, and the data has none.
        DataError: An epoch has no batch.
    """
    data = TrainingData(dataloader, DataOrder(), accelerator, TrainerProgress())
    window, steps_per_epoch = accelerator.gradient_accumulation_steps, data.steps_per_epoch
    if steps_per_epoch == 0:
        raise DataError("the data yields no batch; " + explain_no_batch(dataloader))
    if steps_per_epoch is not None:
        steps = remaining_steps(limits, TrainerProgress(), steps_per_epoch, window)
        assert steps is not None  # with a length, every limit is known
        length = RunLength(steps, steps_per_epoch, window)
        return steps // steps_per_epoch if every == "epoch" else length.updates
    step, update, epoch = limits.max_step, limits.max_optimizer_step, limits.max_epoch
    if every == "epoch" and epoch is not None and step is None and update is None:
        return epoch
    # The last window of an epoch without a length is unknown.
    if every == "optimizer_step" and epoch is None and (step is None or window == 1):
        return min(limit for limit in (step, update) if limit is not None)
    raise PipelineConfigError(
        "the number of LR scheduler steps depends on the number of batches in an epoch, "
        f"and the data ({type(dataloader).__name__}) has no length; write a number"
    )
