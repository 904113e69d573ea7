"""Where a run is, how fast it goes and when it ends, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from robo_orchard_lab.pipeline.metrics import number_text

Outcome: TypeAlias = Literal["running", "finished", "stopped"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One look at a run.

    >>> status = RunStatus(2, 5, 34, 115, {"loss": 0.4231}, 512.3, 12.0, seconds_left=41.4)
    >>> print(status)
    epoch 2/5, step  34/115 (29 %), loss 0.4231, 512 samples/s, ETA 0:00:41
    """

    epoch: int
    """The epoch, from 1."""
    max_epoch: int | None
    steps: int
    """How many steps of the run are done."""
    total_steps: int | None
    """How many there are in all, or None where that can't be told."""
    values: dict[str, float] = field(default_factory=dict)
    samples_per_s: float | None = None
    seconds_taken: float = 0.0
    seconds_left: float | None = None
    outcome: Outcome = "running"

    @property
    def position(self) -> tuple[str, str]:
        """Epoch and step, as wide at the first step as at the last."""
        epoch = f"epoch {self.epoch}" + (f"/{self.max_epoch}" if self.max_epoch else "")
        if self.total_steps is None:
            return epoch, f"step {self.steps}"
        return epoch, f"step {self.steps:>{len(str(self.total_steps))}}/{self.total_steps}"

    @property
    def measurements(self) -> list[str]:
        """Each value behind its name."""
        return [f"{name} {number_text(value)}" for name, value in self.values.items()]

    @property
    def pace(self) -> list[str]:
        """The samples per second, and the time that is left or was taken, as far as known."""
        parts = []
        if self.samples_per_s is not None:
            digits = 0 if self.samples_per_s >= 10 else 2
            parts.append(f"{self.samples_per_s:,.{digits}f} samples/s")
        if self.outcome != "running":
            word = "took" if self.outcome == "finished" else "stopped after"
            parts.append(f"{word} {_duration(self.seconds_taken)}")
        elif self.seconds_left is not None:
            parts.append(f"ETA {_duration(self.seconds_left)}")
        return parts

    def __str__(self) -> str:
        epoch, step = self.position
        if self.total_steps:
            step += f" ({self.steps * 100 // self.total_steps} %)"
        return ", ".join([epoch, step, *self.measurements, *self.pace])


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
