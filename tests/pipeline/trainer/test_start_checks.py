"""Problems of a run that are found before its first step."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanSquaredError, MetricCollection

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.errors import UnknownMetricError
from robo_orchard_lab.pipeline.hooks import (
    EarlyStoppingConfig,
    GradientClippingHookConfig,
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    MetricTrackerConfig,
    NonFiniteGuardConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
    ValidationHookConfig,
)
from tiny import loss_of, make_loader, make_model, make_trainer


class Rollouts(PipelineHooks):
    """Hook that publishes a metric, without declaring it."""

    def __init__(self) -> None:
        super().__init__()
        self.on_step.after(lambda args: args.metrics.publish("rollout/success", 1.0))


class DeclaredRollouts(Rollouts):
    """Hook that declares its metrics."""

    published_metrics = ("rollout/*",)


class Parts(SimpleBatchProcessor):
    """Processor whose outputs are named losses."""

    def forward(self, model: Any, batch: Any) -> Any:
        loss = loss_of(model, batch)[1]
        return {"x": loss.detach()}, loss

    def metric_inputs(self, outputs: Any, batch: Any) -> Any:
        return outputs["x"], outputs["x"]


def refused(trainer: HookBasedTrainer, match: str) -> None:
    """Check that a run ends before its first step with an unknown metric."""
    with pytest.raises(UnknownMetricError, match=match):
        trainer()
    assert trainer.progress.global_step_id == 0


def stop_on(monitor: str) -> Any:
    return EarlyStoppingConfig(monitor=monitor, mode="min", patience=9)


WAITING: dict[str, Callable[[str, Path], Any]] = {
    "EarlyStopping.monitor": lambda name, folder: stop_on(name),
    "KeepBest.monitor": lambda name, folder: KeepBestConfig(
        monitor=name, mode="min", path=folder / "best.safetensors"
    ),
    "SaveCheckpoint.monitor": lambda name, folder: SaveCheckpointConfig(
        monitor=name, mode="min", keep_best=1, folder=folder
    ),
    "ProgressBarHook.metrics.1": lambda name, folder: ProgressBarHookConfig(
        metrics=["loss/total", name]
    ),
}


@pytest.mark.parametrize("place", WAITING)
def test_misspelled_metric_is_refused_before_the_first_step(place: str, tmp_path: Path) -> None:
    """The error names the setting, and suggests the name that a hook publishes."""
    hook = WAITING[place]("loss/totl", tmp_path)
    trainer = make_trainer([hook, LossTrackerConfig(), MetricsLoggerConfig()], max_step=2)
    who = place.partition(".")[0]
    refused(
        trainer,
        f"^{re.escape(place)}: no hook is known to publish 'loss/totl', which {who} waits for; "
        "did you mean 'loss/total'",
    )


def test_misspelled_metric_of_the_lr_scheduler_is_refused() -> None:
    """ReduceLROnPlateau's monitor is checked as those of hooks."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = ValidationHookConfig()(dataloaders={"val": make_loader()})
    trainer = make_trainer(
        validation,
        model=model,
        optimizer=optimizer,
        lr_scheduler=ReduceLROnPlateau(optimizer),
        lr_scheduler_monitor="eval/vall/loss",
        max_epoch=2,
    )
    refused(trainer, r"^lr_scheduler\.monitor: .*did you mean 'eval/val/loss'")


def test_metric_without_its_hook_is_refused() -> None:
    """Without a hook that publishes the group, the error names the hook to add."""
    refused(
        make_trainer(stop_on("eval/val/loss"), max_step=2),
        "Published: none. Add a ValidationHook",
    )


def test_every_published_metric_is_declared() -> None:
    """All names that built-in hooks publish may be monitored from the start."""
    metrics = {"mse": MeanSquaredError(), "own": MetricCollection({"a": MeanSquaredError()})}

    def build(*more: Any) -> HookBasedTrainer:
        hooks: list[Any] = [
            LossTrackerConfig(losses_key=""),
            MetricTrackerConfig()(metrics={"mse": MeanSquaredError()}),
            StatsMonitorConfig(),
            GradientClippingHookConfig(max_norm=1.0),
            NonFiniteGuardConfig(policy="skip"),
            ValidationHookConfig(every="2 steps")(
                dataloaders={"val": make_loader()}, metrics=metrics
            ),
            MetricsLoggerConfig(every="2 steps"),
        ]
        return make_trainer([*hooks, *more], batch_processor=Parts(), max_epoch=1)

    first = build()
    first()
    names = {*first.metrics.names()}
    assert {"loss/x", "loss/x_epoch", "eval/val/own/a", "train/mse", "perf/eta_s"} <= names
    build(ProgressBarHookConfig(metrics=sorted(names)))()


def test_names_that_any_hook_may_publish_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """With a hook that may publish any metric, a likely misspelling is a warning."""
    caplog.set_level(logging.INFO, "robo_orchard_lab.pipeline.trainer.commit")
    make_trainer([stop_on("rollout/success"), Rollouts(), LossTrackerConfig()], max_step=2)()
    stop = stop_on("loss/totl")
    with pytest.raises(UnknownMetricError, match="was published, which EarlyStopping waits for"):
        make_trainer([stop, Rollouts(), LossTrackerConfig(), MetricsLoggerConfig()], max_step=2)()
    found = [(r.levelname, r.getMessage()) for r in caplog.records if "known to" in r.getMessage()]
    assert [level for level, _ in found] == ["INFO", "WARNING"]
    known, likely = (message for _, message in found)
    assert known.startswith(
        "EarlyStopping.monitor: no hook is known to publish 'rollout/success', which "
        "EarlyStopping waits for. Published: loss/total, loss/total_epoch. Hooks may publish "
        "undeclared metrics (Rollouts): set published_metrics = ['rollout/success'] on the class"
    )
    assert "; did you mean 'loss/total'?" in likely


def test_declared_metrics_are_known(caplog: pytest.LogCaptureFixture) -> None:
    """A hook's declaration, of a class or a bundle, ends the warning and finds misspellings."""
    bundle = PipelineHooks("rollouts")
    bundle.published_metrics = ["rollout/success"]
    bundle.on_step.after(lambda args: args.metrics.publish("rollout/success", 1.0))
    for hook in (DeclaredRollouts(), bundle):
        make_trainer([stop_on("rollout/success"), hook], max_step=2)()
        refused(
            make_trainer([stop_on("rolout/success"), hook], max_step=2), "did you mean 'rollout/"
        )
    assert caplog.text == ""


def test_subclass_of_a_built_in_hook_is_undeclared(caplog: pytest.LogCaptureFixture) -> None:
    """A user's subclass may publish more than its base class declares."""
    caplog.set_level(logging.INFO, "robo_orchard_lab.pipeline.trainer.commit")

    class Tracked(type(LossTrackerConfig()())):  # type: ignore[misc]
        def _end_epoch(self, args: PipelineHookArgs) -> None:
            args.metrics.publish("mine", 1.0)

    hooks = [stop_on("mine"), Tracked(LossTrackerConfig()), MetricsLoggerConfig()]
    make_trainer(hooks, max_epoch=1)()
    assert "(Tracked)" in caplog.text
