"""Predicted number of LR scheduler steps, compared with runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import IterableDataset

from launching import SCRIPTS, launch
from robo_orchard_lab.experiment.run_plan import count_lr_scheduler_steps
from robo_orchard_lab.pipeline import TrainerLimits
from robo_orchard_lab.pipeline.errors import DataError, PipelineConfigError
from robo_orchard_lab.pipeline.hooks.optimizer import LRSchedulerUnit
from tiny import make_loader, make_model, make_trainer

SCRIPT = SCRIPTS / "moves_on_ranks.py"


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Five samples without a length."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter([(torch.ones(4), torch.ones(2))] * 5)


LOADERS: dict[str, Any] = {
    "five full batches": lambda: make_loader(5),
    "a rest": lambda: make_loader(5, rest=3),
    "a rest that is dropped": lambda: make_loader(5, rest=3, drop_last=True),
    "a list": lambda: list(make_loader(3)),
    "a loader of batches": lambda: torch.utils.data.DataLoader(Stream(), batch_size=None),
}
LIMITS: list[dict[str, Any]] = [
    {"max_epoch": 2},
    {"max_step": 1},
    {"max_step": 7},
    {"max_step": 10},
    {"max_step": 12},
    {"max_optimizer_step": 5},
    {"max_step": 8, "max_epoch": 2},
    {"max_step": 11, "max_optimizer_step": 4},
    {"max_step": 6, "max_optimizer_step": 9, "max_epoch": 3},
]
UNITS: list[LRSchedulerUnit] = ["optimizer_step", "epoch"]


def steps_in_a_run(
    loader: Any, limits: dict[str, Any], accumulate: int, every: LRSchedulerUnit
) -> int:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = make_trainer(
        model=model,
        loader=loader,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        accumulate=accumulate,
        lr_scheduler_every=every,
        **limits,
    )
    trainer()
    return lr_scheduler.last_epoch


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("every", UNITS)
@pytest.mark.parametrize("loader", LOADERS)
def test_count_equals_lr_scheduler_steps_of_a_run(
    loader: str, every: LRSchedulerUnit, accumulate: int
) -> None:
    """The count is right for any data and any limit, if known before the run."""
    known = 0
    for limits in LIMITS:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        data = LOADERS[loader]()
        try:
            counted = count_lr_scheduler_steps(data, accelerator, TrainerLimits(**limits), every)
        except PipelineConfigError:
            assert "loader of batches" in loader, "the others have a length"
            continue
        known += 1
        assert counted == steps_in_a_run(LOADERS[loader](), limits, accumulate, every), limits
    assert known == len(LIMITS) or "loader of batches" in loader
    assert known > 0


@pytest.mark.parametrize(
    ("limits", "accumulate", "every", "expected"),
    [
        ({"max_step": 7}, 1, "optimizer_step", 7),
        ({"max_optimizer_step": 4}, 3, "optimizer_step", 4),
        ({"max_step": 7, "max_optimizer_step": 4}, 1, "optimizer_step", 4),
        ({"max_epoch": 3}, 1, "epoch", 3),
        ({"max_epoch": 3}, 1, "optimizer_step", None),
        ({"max_step": 7}, 2, "optimizer_step", None),
        ({"max_step": 7}, 1, "epoch", None),
        ({"max_optimizer_step": 4, "max_epoch": 3}, 1, "optimizer_step", None),
    ],
)
def test_limits_decide_the_count_for_data_without_length(
    limits: dict[str, Any], accumulate: int, every: LRSchedulerUnit, expected: int | None
) -> None:
    """The limits give the number of steps of a stream, or the error requests a number."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    if expected is not None:
        assert (
            count_lr_scheduler_steps(loader, accelerator, TrainerLimits(**limits), every)
            == expected
        )
        return
    with pytest.raises(PipelineConfigError, match=r"\(DataLoader\) has no length; write a number"):
        count_lr_scheduler_steps(loader, accelerator, TrainerLimits(**limits), every)


def test_data_without_a_batch_is_refused() -> None:
    """The error names the data, as the error of the run does."""
    loader = make_loader(0, rest=2, drop_last=True)
    with pytest.raises(DataError, match="2 samples are less than one step"):
        count_lr_scheduler_steps(loader, Accelerator(cpu=True), TrainerLimits(max_epoch=1))


def test_counting_does_not_change_rng() -> None:
    """Counting draws no random numbers, and leaves a loader's generator as it is."""
    generator = torch.Generator().manual_seed(3)
    loader = make_loader(shuffle=True, generator=generator)
    before = torch.get_rng_state(), generator.get_state()
    count_lr_scheduler_steps(loader, Accelerator(cpu=True), TrainerLimits(max_epoch=1))
    after = torch.get_rng_state(), generator.get_state()
    assert all(map(torch.equal, before, after))


def test_ranks_predict_the_same_count(tmp_path: Path) -> None:
    """Two ranks predict correctly for sharded, truncated and per-rank data."""
    launch(SCRIPT, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 18
    for case, (counted, moved) in ranks[0].items():
        assert counted == moved, case
