"""Accumulation windows cut short by a limit, in runs resumed from there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.data import DataOrder
from tiny import equal, make_loader, make_trainer, weights

Step = tuple[int, bool, float]
"""Number, True if an update follows, and loss divisor."""


class Stream:
    """Batches without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(make_loader(7, rest=2))


SOURCES: dict[str, Iterable[Any]] = {
    "stream": Stream(),
    "list": list(Stream()),
    "map": make_loader(7, rest=2),
}


def run(
    source: str, max_step: int, resume_from: Path | None = None, stop_after: int | None = None
) -> tuple[HookBasedTrainer, list[Step]]:
    """Train in windows of four batches, on epochs of eight with a small last batch."""
    steps: list[Step] = []
    hooks = PipelineHooks("notes")

    @hooks.on_step.after()
    def note(args: PipelineHookArgs) -> None:
        steps.append((args.global_step_id, args.at_accumulation_boundary, args.loss_divisor))
        if args.global_step_id == stop_after:
            args.requests.stop("enough")

    trainer = make_trainer(
        hooks,
        loader=SOURCES[source],
        data_order=DataOrder(fast_forward=True),
        accumulate=4,
        max_step=max_step,
        resume_from=resume_from,
    )
    trainer()
    return trainer, steps


def ends_of(steps: list[Step]) -> list[int]:
    """Return the last steps of windows, after checking that each window's weights sum to one."""
    ends, weight = [], 0.0
    for step, ends_window, divisor in steps:
        weight += 1 / divisor
        if ends_window:
            assert weight == pytest.approx(1.0)
            ends.append(step)
            weight = 0.0
    return ends


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_resumes_from_a_window_cut_by_its_limit(source: str, tmp_path: Path) -> None:
    """The resumed run completes the cut window with its own weights, wherever stopped again."""
    first, steps = run(source, 5)
    assert ends_of(steps) == [3, 4]
    first.save_checkpoint(tmp_path / "cut")
    uninterrupted, expected = run(source, 14, tmp_path / "cut")
    assert ends_of(expected) == [7, 11, 13]
    for last in range(5, 13):
        folder = tmp_path / str(last)
        second, steps = run(source, 14, tmp_path / "cut", stop_after=last)
        second.save_checkpoint(folder)
        third, rest = run(source, 14, folder)
        assert steps + rest == expected
        assert third.progress == uninterrupted.progress
        assert equal(weights(third.model), weights(uninterrupted.model))


@pytest.mark.parametrize("source", SOURCES)
def test_an_open_window_resumes_as_planned(source: str, tmp_path: Path) -> None:
    """The batches of an open window weigh one together, whichever limit the resumed run has."""
    first, steps = run(source, 6, stop_after=4)
    first.save_checkpoint(tmp_path / "to be cut")
    _, rest = run(source, 16, tmp_path / "to be cut")
    assert ends_of(steps + rest) == [3, 5, 7, 11, 15]

    uninterrupted, expected = run(source, 16)
    first, steps = run(source, 16, stop_after=4)
    first.save_checkpoint(tmp_path / "whole")
    second, middle = run(source, 6, tmp_path / "whole")
    second.save_checkpoint(tmp_path / "still whole")
    third, rest = run(source, 16, tmp_path / "still whole")
    assert steps + middle + rest == expected
    assert equal(weights(third.model), weights(uninterrupted.model))
