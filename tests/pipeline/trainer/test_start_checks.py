"""Problems of a run that are found before its first step."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanSquaredError, MetricCollection

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError, UnknownMetricError
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


class EnoughError(Exception):
    """End of a run at its first step."""


class AtOnce(PipelineHooks):
    """Hook that ends the run at its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.on_step.before(self._end)

    def _end(self, args: PipelineHookArgs) -> None:
        raise EnoughError


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
    caplog.set_level(logging.INFO, "robo_orchard_lab.pipeline.metrics")
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
    caplog.set_level(logging.INFO, "robo_orchard_lab.pipeline.metrics")

    class Tracked(type(LossTrackerConfig()())):  # type: ignore[misc]
        def _end_epoch(self, args: PipelineHookArgs) -> None:
            args.metrics.publish("mine", 1.0)

    hooks = [stop_on("mine"), Tracked(LossTrackerConfig()), MetricsLoggerConfig()]
    make_trainer(hooks, max_epoch=1)()
    assert "(Tracked)" in caplog.text


class Keeper(PipelineHooks):
    """Hook with a given state."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [self.state]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        (self.state,) = state["seen"]


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Endless random samples."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield torch.randn(4), torch.randn(2)


class StatefulStream(Stream):
    """The same with a given state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = state["position"]


def test_state_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """The error names the hook and the path within its state; without checkpoints the run goes."""
    save = SaveCheckpointConfig(folder=tmp_path)
    trainer = make_trainer([save, Keeper({"ids": {1, 2}})], max_step=2)
    expected = r"^Keeper: hooks\.Keeper\.seen\.0\.ids can't be saved: .*found set"
    with pytest.raises(StateError, match=expected):
        trainer()
    assert trainer.progress.global_step_id == 0
    make_trainer(Keeper({1, 2}), max_step=2)()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("step")] == []


def test_numpy_arrays_in_states_are_restored(tmp_path: Path) -> None:
    """A hook's array is an array again after a resume."""
    save = SaveCheckpointConfig(folder=tmp_path)
    make_trainer([save, Keeper(np.arange(3.0))], max_step=2)()
    keeper = Keeper(None)
    make_trainer([save, keeper], max_step=4, resume_from="auto")()
    assert type(keeper.state) is np.ndarray
    assert keeper.state.tolist() == [0.0, 1.0, 2.0]


def test_state_of_the_lr_scheduler_is_checked(tmp_path: Path) -> None:
    """A callable object of LambdaLR, whose attributes are saved, may not hold a set."""

    class Factor:
        def __init__(self) -> None:
            self.steps = {1, 2}

        def __call__(self, step: int) -> float:
            return 1.0

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(
        SaveCheckpointConfig(folder=tmp_path),
        model=model,
        optimizer=optimizer,
        lr_scheduler=LambdaLR(optimizer, Factor()),
        max_step=2,
    )
    with pytest.raises(StateError, match=r"^lr_scheduler: .*lr_lambdas\.0\.steps can't be saved"):
        trainer()
    assert trainer.progress.global_step_id == 0


def test_state_of_the_data_is_checked(tmp_path: Path) -> None:
    """A stream's own state is encoded once, when its first batch is loaded."""
    loader = DataLoader(StatefulStream({1, 2}), batch_size=4)
    trainer = make_trainer(SaveCheckpointConfig(folder=tmp_path), loader=loader, max_step=2)
    with pytest.raises(StateError, match=r"^data: data\..*position can't be saved"):
        trainer()
    assert trainer.progress.global_step_id == 0


def test_checkpoint_without_room_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """The error has the needed and the free bytes; the model's state is larger than any disk."""
    model = make_model()
    model.register_buffer("table", torch.zeros(1, dtype=torch.int64).expand(10**15))
    trainer = make_trainer(
        [SaveCheckpointConfig(folder=tmp_path)],
        model=model,
        max_step=2,
    )
    with pytest.raises(
        CheckpointError,
        match=r"^SaveCheckpoint\.folder: .* has no room for a checkpoint: about 8,000,[\d,]+ bytes "
        r"needed, [\d,]+ free; free space",
    ):
        trainer()
    assert trainer.progress.global_step_id == 0


def test_room_includes_the_state_of_the_optimizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Adam's two moments count before they exist; room for one checkpoint only is a warning."""
    free = shutil.disk_usage(tmp_path).free
    for optimizer_class, is_refused in ((torch.optim.SGD, False), (torch.optim.Adam, True)):
        model = make_model()
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        # Never updated: its gradient stays None.
        unused = torch.nn.Parameter(torch.zeros(1).expand(free // 4 * 6 // 10))
        optimizer.add_param_group({"params": [unused]})
        hook = SaveCheckpointConfig(folder=tmp_path / optimizer_class.__name__, every=None)()
        trainer = make_trainer([hook, AtOnce()], model=model, optimizer=optimizer, max_step=2)
        with pytest.raises(CheckpointError if is_refused else EnoughError):
            trainer()
    assert "has room for one checkpoint only, and each is written next to the one" in caplog.text


@pytest.mark.parametrize("kind", ["endless", "stateful", "fast-forward", "unsaved", "list"])
def test_streams_that_cannot_resume_are_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints of an endless stream without state are warned of at the start, with remedies."""
    stream = StatefulStream(3) if kind == "stateful" else Stream()
    loader: Any = DataLoader(stream, batch_size=4) if kind != "list" else [*make_loader()]
    make_trainer(
        [] if kind == "unsaved" else SaveCheckpointConfig(folder=tmp_path),
        loader=loader,
        max_step=2,
        data_order=DataOrder(fast_forward=kind == "fast-forward"),
    )()
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if kind != "endless":
        assert found == []
        return
    (warning,) = found
    assert warning.startswith(
        "data: checkpoints from within an epoch can't be resumed, and an endless stream has no "
        "other: DataLoader of Stream has no state to save, and an iterable can't seek; use a "
        "stateful loader"
    )
    assert "a dataset with state_dict and load_state_dict), or a map-style dataset" in warning
    save = SaveCheckpointConfig(folder=tmp_path)
    with pytest.raises(StateError, match="could not save its state; use a stateful loader"):
        make_trainer(save, loader=loader, max_step=4, resume_from="auto")
