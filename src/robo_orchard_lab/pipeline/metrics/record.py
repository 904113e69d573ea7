"""What a logging point finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One number, of all ranks, and the step that it belongs to."""

    name: str
    value: float
    step: int
    """How many steps of the run were done when it was measured."""


def number_text(value: float) -> str:
    """A value in few characters: four decimals as long as these say something.

    >>> number_text(0.42314), number_text(123.456), number_text(3.2e-4)
    ('0.4231', '123.46', '3.200e-04')
    """
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.2f}" if 10 <= abs(value) < 1e5 else f"{value:.3e}"


@dataclass(frozen=True, slots=True)
class MetricsRecord:
    """Everything that was found since the logging point before.

    >>> record = MetricsRecord(0, 50, 50, (MetricValue("loss/total", 0.5, step=50),))
    >>> record.by_step()
    {50: {'loss/total': 0.5}}
    """

    epoch_id: int
    """How many epochs are done."""
    global_step_id: int
    """How many steps are done."""
    optimizer_step_id: int
    """How many updates of the weights are committed."""
    values: tuple[MetricValue, ...]
    """In the order of their steps; a name may be there more than once, for several steps."""
    partial: bool = False
    """Whether the run has ended ahead of the next logging point. A run that goes on from there
    has these values again, in the record that its next logging point makes."""

    def by_step(self) -> dict[int, dict[str, float]]:
        """The values by the step that they belong to, the earliest first."""
        steps: dict[int, dict[str, float]] = {}
        for value in self.values:
            steps.setdefault(value.step, {})[value.name] = value.value
        return dict(sorted(steps.items()))
