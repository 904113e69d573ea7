"""Predicted lengths and counts, compared with runs."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate import Accelerator

from robo_orchard_lab.experiment.run_plan import count_due, run_length
from robo_orchard_lab.pipeline import PipelineHooks, TrainerLimits
from robo_orchard_lab.pipeline.trigger import Trigger
from tiny import make_loader, make_trainer

TRIGGERS = [
    *("3 steps", "2 epochs", "2 optimizer steps", "at steps 1, 4, 1000", "first", "last"),
    *("3 steps | 1 epoch | last", "3 optimizer steps | 2 steps", "3 optimizer steps | 7 steps"),
    "1 optimizer step | last",
]


@pytest.mark.parametrize(
    "limits", [{"max_epoch": 3}, {"max_step": 16}, {"max_step": 17}, {"max_optimizer_step": 5}]
)
@pytest.mark.parametrize("window", [1, 3])
def test_run_length_and_due_counts_match_a_real_run(limits: dict[str, Any], window: int) -> None:
    """Predicted steps, epochs, updates and trigger counts equal the run's."""
    counted = dict.fromkeys(TRIGGERS, 0)
    bundle = PipelineHooks("counting")

    def count(text: str) -> None:
        counted[text] += 1

    at = set[tuple[str, int]]()
    for text in TRIGGERS:

        def asked(args: object, text: str = text) -> None:
            at.add((text, trainer.progress.steps_done))

        bundle.register_at_commit(asked, Trigger.parse(text))
    trainer = make_trainer([bundle], loader=make_loader(7), accumulate=window, **limits)
    trainer()
    for text, _ in at:
        count(text)
    length = run_length(
        make_loader(7),
        Accelerator(cpu=True, gradient_accumulation_steps=window),
        TrainerLimits(**limits),
    )
    assert length is not None
    progress = trainer.progress
    assert length.steps == progress.global_step_id
    assert length.updates == progress.optimizer_step_id
    assert length.epochs == progress.epoch_id + (progress.step_id > 0)
    assert {text: count_due(Trigger.parse(text), length) for text in TRIGGERS} == counted


def test_unpredictable_counts_are_none() -> None:
    """Counts that depend on the clock or an unknown length are None."""
    accelerator = Accelerator(cpu=True)
    length = run_length(make_loader(7), accelerator, TrainerLimits(max_epoch=1))
    assert length is not None
    assert count_due(Trigger.parse("10 min | 1 epoch"), length) is None
    assert run_length(iter([1, 2]), accelerator, TrainerLimits(max_epoch=1)) is None


def test_a_long_run_is_counted_quickly() -> None:
    """Counts of a billion steps are computed without a list."""
    length = run_length(make_loader(7), Accelerator(cpu=True), TrainerLimits(max_step=10**9))
    assert length is not None
    assert count_due(Trigger.parse("1 step"), length) == 10**9
    assert count_due(Trigger.parse("1 optimizer step"), length) == 10**9
