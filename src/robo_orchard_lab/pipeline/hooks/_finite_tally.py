"""Whether all updates were finite, known where the packed values of a run are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricValue
from robo_orchard_lab.pipeline.progress import TrainerProgress

FLAG = "guard/non_finite"


class FiniteTally:
    """Whether all updates since it was made were finite, and how many were before the first bad.

    It stays on the device and takes some four small operations for each update.
    """

    def __init__(self, begin: int, device: torch.device) -> None:
        self._begin = begin  # how many updates were due before it was made
        self._loss, self._norm = torch.zeros(2, device=device)
        self._finite = torch.zeros((), dtype=torch.int32, device=device)

    def add(self, losses: Sequence[torch.Tensor], norm: torch.Tensor | None) -> None:
        """Take one update in."""
        for loss in losses:
            self._loss.add_(loss.reshape(()), alpha=0)  # 0 times infinity is NaN, which stays
        if norm is not None:
            self._norm.add_(norm, alpha=0)
        self._finite.add_(self._loss == self._norm)  # 0 == 0; NaN equals nothing

    @property
    def flag(self) -> torch.Tensor:
        """Whether something was not finite, on the device."""
        return torch.isnan(self._loss + self._norm)

    def read(self) -> tuple[str, int] | None:
        """What was not finite, and in which update; None where all was. Waits for the device."""
        loss, norm = torch.stack([self._loss, self._norm]).tolist()
        named = {"loss": loss, "gradient norm": norm}
        bad = [f"the {name}" for name, value in named.items() if math.isnan(value)]
        if not bad:
            return None
        text = f"{' and '.join(bad)} {'are' if len(bad) > 1 else 'is'} not finite"
        return text, self._begin + int(self._finite)


class LoggingPointCheck:
    """Publishes a tally with each logging point, and fails where one was not finite, on any rank.

    It does so ahead of the next step, so that whoever shows the values of that logging point has
    got them.

    Args:
        fail: raises; it is given what was wrong, and in which update, where this rank knows.
    """

    def __init__(self, fail: Callable[[str, int | None], NoReturn]) -> None:
        self._fail = fail
        self._tally: FiniteTally | None = None
        self._told = False
        self._handles: list[RemovableHandle] = []

    def start(self, args: PipelineHookArgs, who: str) -> None:
        """The run begins; ``who`` waits for what is published, for errors."""

        tally = FiniteTally(_updates_due(args.progress), args.accelerator.device)

        def publish() -> None:
            args.metrics.publish(FLAG, tally.flag, reduce="max")

        def be_told(value: MetricValue) -> None:
            self._told = value.value > 0

        self._tally = tally
        args.metrics.publish(FLAG, 0.0, reduce="max")  # so that the name is known in any case
        self._handles = [
            args.metrics.before_logging(publish),
            args.metrics.subscribe(FLAG, be_told, who),
        ]

    def add(self, losses: Sequence[torch.Tensor], norm: torch.Tensor | None) -> None:
        """Take one update in."""
        if self._tally is not None:
            self._tally.add(losses, norm)

    def raise_told(self) -> None:
        """Fail if the last logging point has found something."""
        if self._told and self._tally is not None:
            self._fail(*(self._tally.read() or ("another rank found what is not finite", None)))

    def end(self, args: PipelineHookArgs) -> None:
        """The run is over: fail if there is something, told by a logging point or not."""
        for handle in self._handles:
            handle.remove()
        if args.exception is None:
            self.raise_told()
            found = self._tally.read() if self._tally is not None else None
            if found is not None:
                self._fail(*found)


def _updates_due(progress: TrainerProgress) -> int:
    """How many updates have been due, committed or skipped."""
    return progress.optimizer_step_id + progress.skipped_optimizer_steps
