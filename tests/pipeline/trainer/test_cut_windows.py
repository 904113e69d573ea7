"""Accumulation windows that a limit cuts short, in runs that go on from there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.data import DataOrder
from tiny import equal, make_loader, make_trainer, weights

Step = tuple[int, bool, float]
"""Its number, whether an update follows, and what its loss is divided by."""


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
    """Train in windows of four batches, on epochs of eight, the last of which is a small one."""
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
    """The last steps of windows, in each of which all samples together weigh one."""
    ends, weight = [], 0.0
    for step, ends_window, divisor in steps:
        weight += 1 / divisor
        if ends_window:
            assert weight == pytest.approx(1.0)
            ends.append(step)
            weight = 0.0
    return ends


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_goes_on_from_a_window_that_its_limit_cut(source: str, tmp_path: Path) -> None:
    """It does so to where that would have ended, with a window that weighs what its own batches
    weigh; and is the same wherever it is stopped and resumed then."""
    first, steps = run(source, 5)
    assert ends_of(steps) == [3, 4]
    first.save_checkpoint(tmp_path / "cut")
    straight, expected = run(source, 14, tmp_path / "cut")
    assert ends_of(expected) == [7, 11, 13]
    for last in range(5, 13):
        folder = tmp_path / str(last)
        second, steps = run(source, 14, tmp_path / "cut", stop_after=last)
        second.save_checkpoint(folder)
        third, rest = run(source, 14, folder)
        assert steps + rest == expected
        assert third.progress == straight.progress
        assert equal(weights(third.model), weights(straight.model))


@pytest.mark.parametrize("source", SOURCES)
def test_an_open_window_goes_on_as_it_was_planned(source: str, tmp_path: Path) -> None:
    """Whatever the limit of the run that is resumed within it: its batches weigh one together."""
    first, steps = run(source, 6, stop_after=4)
    first.save_checkpoint(tmp_path / "to be cut")
    _, rest = run(source, 16, tmp_path / "to be cut")
    assert ends_of(steps + rest) == [3, 5, 7, 11, 15]

    straight, expected = run(source, 16)
    first, steps = run(source, 16, stop_after=4)
    first.save_checkpoint(tmp_path / "whole")
    second, middle = run(source, 6, tmp_path / "whole")
    second.save_checkpoint(tmp_path / "still whole")
    third, rest = run(source, 16, tmp_path / "still whole")
    assert steps + middle + rest == expected
    assert equal(weights(third.model), weights(straight.model))
