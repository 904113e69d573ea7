"""Exact resume with every optimizer and LR scheduler of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.testing import prove_resume
from tiny import loss_of, make_loader, make_model

OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "RMSprop", "Rprop")},
    **{name: {} for name in ("NAdam", "RAdam", "Adamax", "ASGD", "Adafactor")},
    "SGD nesterov": {"momentum": 0.9, "nesterov": True},
    "AdamW amsgrad": {"amsgrad": True},
    "AdamW fused": {"fused": True},
    "AdamW foreach": {"foreach": True, "maximize": True},
    "RMSprop centered": {"centered": True, "momentum": 0.9},
}
LR_SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, scale_fn=lambda x: 0.9**x),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "linear": lambda o: lr_scheduler.LinearLR(o),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=8),
}


def build(
    run_folder: Path, resume_from: Any, optimizer: str = "SGD nesterov", schedule: str | None = None
) -> HookBasedTrainer:
    torch.set_num_threads(1)
    model = torch.nn.Sequential(make_model(), torch.nn.Dropout(0.2))
    kind = getattr(torch.optim, optimizer.partition(" ")[0])
    updates = kind(model.parameters(), lr=0.02, **OPTIMIZERS[optimizer])
    return HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=2),
        model,
        make_loader(5, shuffle=True),
        SimpleBatchProcessor.from_callable(loss_of),
        updates,
        None if schedule is None else LR_SCHEDULERS[schedule](updates),
        max_epoch=2,
        resume_from=resume_from,
    )


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_exactly(optimizer: str) -> None:
    """Within and between windows, the complete state of each optimizer is restored."""
    prove_resume(partial(build, optimizer=optimizer), None, [1, 2, 4, 5, 7]).check()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", LR_SCHEDULERS)
def test_every_lr_scheduler_resumes_exactly(schedule: str) -> None:
    """The state of each LR scheduler is restored, nested LR schedulers included."""
    prove_resume(partial(build, schedule=schedule), None, [1, 2, 4, 5, 7]).check()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_exactly_on_two_ranks(optimizer: str) -> None:
    """The complete state of each optimizer is restored on two ranks."""
    prove_resume(partial(build, optimizer=optimizer), None, [1, 2, 4, 5], processes=2).check()


@pytest.mark.slow
def test_an_lr_scheduler_resumes_exactly_on_two_ranks() -> None:
    """The LR scheduler steps once per update and resumes exactly on two ranks."""
    prove_resume(partial(build, schedule="one cycle"), None, [1, 2, 4, 5], processes=2).check()
