"""Other learning rates and LR schedulers on a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim import lr_scheduler as schedulers

import gan
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig
from tiny import equal, weights

Schedule = Callable[[torch.optim.Optimizer], Any]

CURVES: dict[str, Schedule] = {
    "none": lambda optimizer: None,
    "StepLR": lambda optimizer: schedulers.StepLR(optimizer, 2, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 20),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.3, total_steps=12),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [schedulers.ConstantLR(optimizer, total_iters=3), schedulers.StepLR(optimizer, 2)],
        milestones=[4],
    ),
}


def run(
    folder: Path, lr: float, curve: str, steps: int, *, settings: Any = ..., resume: Any = "auto"
) -> tuple[HookBasedTrainer, list[list[float]]]:
    """Train up to a step; return the trainer and the learning rates of the steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
    groups: list[dict[str, Any]] = [{"params": part.parameters()} for part in model]
    groups[1]["lr"] = lr / 2
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    seen: list[list[float]] = []
    hooks = PipelineHooks("recorder")

    @hooks.on_step.before
    def record(args: PipelineHookArgs) -> None:
        seen.append([group["lr"] for group in optimizer.param_groups])

    trainer = HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        [torch.ones(3, 2) * step for step in range(4)],
        SimpleBatchProcessor.from_callable(lambda model, x: (None, model(x).square().mean())),
        optimizer,
        CURVES[curve](optimizer),
        hooks=[hooks, SaveCheckpointConfig(every="2 steps", keep_last=9)],
        max_step=steps,
        run_folder=folder,
        resume_from=resume,
        lr_settings={"lr": lr, "curve": curve} if settings is ... else settings,
    )
    trainer()
    return trainer, seen


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR of torch 2.8
@pytest.mark.parametrize("after", CURVES)
@pytest.mark.parametrize("before", ["none", "StepLR", "OneCycleLR"])
def test_a_resumed_run_follows_its_own_curve(tmp_path: Path, before: str, after: str) -> None:
    """The learning rates are those of a run with the new settings from the beginning, and momentum
    buffers those of the checkpoint.
    """
    saved, _ = run(tmp_path / "run", 0.1, before, 6)
    _, expected = run(tmp_path / "whole", 0.04, after, 10)
    resumed, _ = run(tmp_path / "run", 0.04, after, 6)
    assert resumed.progress.global_step_id == 6
    assert saved.optimizer is not None
    assert resumed.optimizer is not None
    for one, other in zip(
        saved.optimizer.state.values(), resumed.optimizer.state.values(), strict=True
    ):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    _, found = run(tmp_path / "run", 0.04, after, 10)
    assert found == expected[6:]
    momentum = resumed.optimizer.param_groups[0]["momentum"]
    assert (momentum == 0.9) is (after != "OneCycleLR")


def test_a_resume_of_that_resume_keeps_the_change(tmp_path: Path) -> None:
    """A resume from before the change makes the change again; one from after it is exact."""
    run(tmp_path / "run", 0.1, "StepLR", 6)
    run(tmp_path / "run", 0.04, "CosineAnnealingLR", 8)
    stopped, rates = run(tmp_path / "run", 0.04, "CosineAnnealingLR", 10)
    run(tmp_path / "other", 0.1, "StepLR", 6)
    whole, expected = run(tmp_path / "other", 0.04, "CosineAnnealingLR", 10)
    assert rates == expected[2:]
    assert equal(weights(stopped.model), weights(whole.model))
    earlier = tmp_path / "other/checkpoints/step_00000006"
    again, rates = run(tmp_path / "third", 0.04, "CosineAnnealingLR", 10, resume=earlier)
    assert rates == expected
    assert equal(weights(again.model), weights(whole.model))


def test_equal_or_absent_settings_restore_the_checkpoint(tmp_path: Path) -> None:
    """Without settings, or with the same, a resume is that of the checkpoint, bit for bit."""
    whole, expected = run(tmp_path / "whole", 0.1, "StepLR", 10)
    for name, settings, lr in (("same", ..., 0.1), ("absent", None, 0.7)):
        run(tmp_path / name, 0.1, "StepLR", 6, settings=settings)
        resumed, found = run(tmp_path / name, lr, "StepLR", 10, settings=settings)
        assert found == expected[6:]
        assert equal(weights(resumed.model), weights(whole.model))


def test_old_and_next_learning_rates_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, the log has a line for each group, without an effect on the curve."""
    run(tmp_path, 0.1, "none", 6)
    capsys.readouterr()
    run(tmp_path, 0.04, "StepLR", 6)
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if "->" in line] == [
        "  group 0: 0.1 -> 0.005, 0.005, 0.0025, 0.0025, ...",
        "  group 1: 0.05 -> 0.0025, 0.0025, 0.00125, 0.00125, ...",
    ]
    assert any(line.startswith("the learning rate changes at step 6 (epoch 2") for line in shown)


def test_a_metric_dependent_lr_scheduler_starts_again(tmp_path: Path) -> None:
    """ReduceLROnPlateau begins at the learning rate of the new settings."""
    CURVES["plateau"] = lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0)
    try:
        run(tmp_path, 0.1, "StepLR", 6)
        trainer, rates = run(tmp_path, 0.04, "plateau", 7)
    finally:
        del CURVES["plateau"]
    assert rates == [[0.04, 0.02]]
    assert trainer.lr_schedulers[""].num_bad_epochs == 0  # type: ignore[attr-defined]  # a ReduceLROnPlateau


def test_named_optimizers_change_separately(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each LR scheduler is stepped by the updates of its own optimizer."""

    def train(lr: float, steps: int) -> HookBasedTrainer:
        model = gan.make_model()
        optimizers = {
            name: torch.optim.SGD(part.parameters(), lr=lr) for name, part in model.items()
        }
        trainer = HookBasedTrainer(
            Accelerator(cpu=True),
            model,
            [torch.ones(1) * step for step in range(4)],
            Alternating(),
            optimizers,
            {name: schedulers.StepLR(each, 2) for name, each in optimizers.items()},
            hooks=[SaveCheckpointConfig(every="4 steps")],
            max_step=steps,
            run_folder=tmp_path,
            resume_from="auto",
            lr_settings={"lr": lr},
        )
        trainer()
        return trainer

    train(0.1, 4)
    trainer = train(0.04, 4)
    shown = [line for line in capsys.readouterr().err.splitlines() if "->" in line]
    assert shown == [
        "  g: 0.01 -> 0.004, 0.004, 0.0004, 0.0004, ...",
        "  d: 0.001 -> 0.0004, 0.0004, 4e-05, 4e-05, ...",
    ]
    assert {n: s.last_epoch for n, s in trainer.lr_schedulers.items()} == {"d": 4, "g": 2}


class Alternating(SimpleBatchProcessor):
    """Updates the discriminator in each step, the generator in every second."""

    def forward(self, model: Any, batch: torch.Tensor) -> Any:
        yield "d", sum(p.square().sum() for p in model["d"].parameters())
        if int(batch) % 2:
            yield "g", sum(p.square().sum() for p in model["g"].parameters())
        return None
