"""Each built-in hook reads, changes and requests in real runs what its class declares."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import gan
from effects import Effects, observe
from robo_orchard_lab import HOOK_MODULES
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline import hooks as built_in
from robo_orchard_lab.pipeline.plan import RunPlan
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, LogSinkConfig

OTHER_NAMES = {
    "model",
    "model.weights",
    "model.buffers",
    "model.mode",
    "model.requires_grad",
    "gradients",
    "optimizer state",
    "learning rates",
    "metrics",
    "report",
    "files",
    "random state",
    "signal handlers",
    "device cache",
}
"""Names of effects that are no fields of ``args``; docs/how_to/hooks.md lists them."""


class Classifier(SimpleBatchProcessor):
    """Cross entropy; the outputs are logits, or with ``names_losses`` a mapping with the loss."""

    def __init__(self, names_losses: bool = False) -> None:
        self._names_losses = names_losses
        super().__init__()

    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        images, labels = batch
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return ({"cross_entropy": loss} if self._names_losses else logits), loss


@dataclass
class Case:
    """Run of a hook: its configuration for a run folder, other hooks, and the trainer."""

    make: Callable[[Path], Any] | None
    others: tuple[Any, ...] = ()
    name: str = ""
    nan_at: int | None = None
    batch_processor: SimpleBatchProcessor = field(default_factory=Classifier)
    lr_scheduler: Callable[[Any], LRScheduler] | None = None
    lr_scheduler_monitor: str | None = None
    named: SimpleBatchProcessor | None = None
    more_files: tuple[str, ...] = ()


def make_loader(nan_at: int | None = None) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 1, 4, 4, generator=generator)
    if nan_at is not None:
        images[4 * nan_at] = torch.nan
    return DataLoader(TensorDataset(images, torch.arange(24) % 3), batch_size=4)


def feeder() -> PipelineHooks:
    """Publish a metric that falls in each step."""
    hooks = PipelineHooks("feeder")

    @hooks.on_step.after
    def publish(args: PipelineHookArgs) -> None:
        args.metrics.publish("fed/value", 1.0 / (1 + args.global_step_id))

    return hooks


def signals() -> PipelineHooks:
    """Send a signal in the second step."""
    hooks = PipelineHooks("sender")

    @hooks.on_step.after(when="at steps 2")
    def send(args: PipelineHookArgs) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    return hooks


LOGGER = partial(built_in.MetricsLoggerConfig, every="2 steps")
SAVER = partial(built_in.SaveCheckpointConfig, every="2 steps")
GUARD = partial(built_in.NonFiniteGuardConfig, policy="skip")
CASES: dict[str, list[Case]] = {
    "ClearCacheHook": [Case(lambda folder: built_in.ClearCacheHookConfig(every="2 steps"))],
    "EarlyStopping": [
        Case(
            lambda folder: built_in.EarlyStoppingConfig(
                monitor="fed/value", mode="max", patience=2
            ),
            (feeder,),
        )
    ],
    "EMA": [
        Case(lambda folder: built_in.EMAConfig(decay=0.9)),
        Case(lambda folder: built_in.EMAConfig(export_path=str(folder / "ema.safetensors"))),
    ],
    "FreezeHook": [
        Case(lambda folder: built_in.FreezeHookConfig(patterns=["1.*"], until_step=2)),
        Case(
            lambda folder: built_in.FreezeHookConfig(patterns=["2.*"], until_step=2, eval_mode=True)
        ),
    ],
    "GradientClippingHook": [
        Case(lambda folder: built_in.GradientClippingHookConfig(max_norm=1e-3)),
        Case(lambda folder: built_in.GradientClippingHookConfig(max_value=1e-3)),
    ],
    "HookProfiler": [Case(lambda folder: built_in.HookProfilerConfig(), (LOGGER,))],
    "KeepBest": [
        Case(
            lambda folder: built_in.KeepBestConfig(
                monitor="fed/value", mode="min", path=folder / "best.safetensors"
            ),
            (feeder,),
        )
    ],
    "LogImages": [
        Case(lambda folder: built_in.LogImagesConfig(every="2 steps", key="0")),
        Case(lambda folder: built_in.LogImagesConfig(every="2 steps", source="outputs")),
    ],
    "LossTracker": [
        Case(lambda folder: built_in.LossTrackerConfig(), (LOGGER,)),
        Case(
            lambda folder: built_in.LossTrackerConfig(losses_key=""),
            (LOGGER,),
            batch_processor=Classifier(names_losses=True),
        ),
        Case(lambda folder: built_in.LossTrackerConfig(), (LOGGER,), named=gan.GAN()),
    ],
    "MetricTracker": [
        Case(
            lambda folder: built_in.MetricTrackerConfig()(
                metrics={"accuracy": MulticlassAccuracy(3, validate_args=False)}
            ),
            (LOGGER,),
        )
    ],
    "MetricsLogger": [
        Case(
            lambda folder: LOGGER(sinks=[JsonLinesSinkConfig(path=str(folder / "lines.jsonl"))]),
            (feeder,),
        ),
        Case(lambda folder: LOGGER(sinks=[LogSinkConfig()]), (feeder,)),
    ],
    "ModelSummary": [Case(lambda folder: built_in.ModelSummaryConfig())],
    "NonFiniteGuard": [
        Case(lambda folder: built_in.NonFiniteGuardConfig(), more_files=("finite_checks.py",)),
        Case(lambda folder: GUARD(), nan_at=2, more_files=("finite_checks.py",)),
        Case(
            lambda folder: GUARD(quarantine=folder / "bad"),
            nan_at=2,
            more_files=("finite_checks.py",),
        ),
        Case(
            lambda folder: built_in.NonFiniteGuardConfig(then="rollback", skip_batch=True),
            (SAVER,),
            nan_at=3,
            more_files=("finite_checks.py",),
        ),
        Case(
            lambda folder: built_in.NonFiniteGuardConfig(read="at logging points"),
            (LOGGER,),
            more_files=("finite_checks.py",),
        ),
    ],
    "Preemption": [
        Case(lambda folder: built_in.PreemptionConfig(), (SAVER, signals)),
        Case(lambda folder: built_in.PreemptionConfig(save_checkpoint=False), (signals,)),
    ],
    "ProgressBarHook": [
        Case(lambda folder: built_in.ProgressBarHookConfig(refresh_seconds=1e-9)),
        Case(lambda folder: built_in.ProgressBarHookConfig(), (LOGGER, feeder)),
        Case(lambda folder: built_in.ProgressBarHookConfig(), named=gan.GAN()),
    ],
    "Report": [Case(lambda folder: built_in.ReportConfig())],
    "SamplePredictions": [
        Case(lambda folder: built_in.SamplePredictionsConfig(every="2 steps")),
    ],
    "SaveCheckpoint": [
        Case(lambda folder: SAVER()),
        Case(
            lambda folder: built_in.SaveCheckpointConfig(
                monitor="fed/value", mode="min", keep_best=1
            ),
            (feeder,),
        ),
        Case(lambda folder: built_in.SaveCheckpointConfig(every=None)),
    ],
    "SaveModel": [Case(lambda folder: built_in.SaveModelConfig(every="2 steps"))],
    "StatsMonitor": [
        Case(lambda folder: built_in.StatsMonitorConfig(every="2 steps")),
        Case(lambda folder: built_in.StatsMonitorConfig(grad_norm=False), (LOGGER,)),
    ],
    "TimeLimit": [
        Case(lambda folder: built_in.TimeLimitConfig(limit=2e-3, margin=1e-3), (SAVER,)),
        Case(
            lambda folder: built_in.TimeLimitConfig(limit=2e-3, margin=1e-3, save_checkpoint=False)
        ),
    ],
    "TorchProfilerHook": [
        Case(
            lambda folder: built_in.TorchProfilerHookConfig(
                folder=str(folder / "traces"), start_step=2, steps=1
            )
        )
    ],
    "ValidationHook": [
        Case(
            lambda folder: built_in.ValidationHookConfig(every="3 steps")(
                dataloaders={"val": make_loader()}
            ),
            (LOGGER,),
        ),
        Case(
            lambda folder: built_in.ValidationHookConfig(every=None)(
                dataloaders={"val": make_loader()}
            )
        ),
    ],
    "OptimizerHook": [
        Case(None, name="OptimizerHook"),
        Case(None, name="OptimizerHook", lr_scheduler=partial(StepLR, step_size=2)),
        Case(None, name="OptimizerHook", lr_scheduler=ReduceLROnPlateau),
        Case(
            None,
            (feeder, LOGGER),
            name="OptimizerHook",
            lr_scheduler=partial(ReduceLROnPlateau, mode="max", patience=0),
            lr_scheduler_monitor="fed/value",
        ),
    ],
    "NamedOptimizersHook": [
        Case(None, name="NamedOptimizersHook", named=gan.JointGAN()),
        Case(
            None,
            name="NamedOptimizersHook",
            named=gan.JointGAN(),
            lr_scheduler=partial(StepLR, step_size=2),
        ),
    ],
}
NOT_OBSERVED = {
    "ClearCacheHook": {"device cache": "a CPU has none"},
    "FreezeHook": {"gradients": "DDP computes gradients of frozen parameters"},
    "NonFiniteGuard": {
        "attached_loss": "several ranks spread a NaN",
        "random state": "a copy of the generators' states is no operation",
    },
}
"""Declared names without an observation in these runs, with the reason."""


def run_case(case: Case, name: str, folder: Path) -> Effects:
    """Train with the hook of a case, in a run folder."""
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8)
    model: torch.nn.Module = torch.nn.Sequential(*layers, torch.nn.Linear(8, 3))
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer: Any = sgd(model.parameters())
    loader: Any = make_loader(case.nan_at)
    processor = case.batch_processor
    if case.named:
        parts = gan.make_model()
        model, loader, processor = parts, gan.make_batches(), case.named
        optimizer = {key: sgd(part.parameters()) for key, part in parts.items()}
    lr_scheduler: Any = None
    if case.lr_scheduler is not None:
        make = case.lr_scheduler
        named_optimizers = optimizer if case.named else {"": optimizer}
        schedulers = {key: make(each) for key, each in named_optimizers.items()}
        lr_scheduler = schedulers if case.named else schedulers[""]
    options: dict[str, Any] = {}
    if case.lr_scheduler_monitor is not None:
        options["lr_scheduler_monitor"] = case.lr_scheduler_monitor

    def trainer_of(hooks: list[Any]) -> HookBasedTrainer:
        return HookBasedTrainer(
            Accelerator(cpu=True),
            model,
            loader,
            processor,
            optimizer,
            lr_scheduler,
            hooks,
            max_step=8,
            run_folder=folder,
            **options,
        )

    make_hook = None if case.make is None else partial(case.make, folder)
    return observe(
        trainer_of,
        make_hook,
        folder,
        others=[other() for other in case.others],
        name=name,
        more_files=case.more_files,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_declared_effects_are_the_real_ones(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook has no effect that it does not declare, and all that it declares."""
    caplog.set_level(logging.INFO)
    declared: dict[str, set[str]] = {"reads": set(), "changes": set(), "requests": set()}
    observed = {effect: set[str]() for effect in declared}
    for number, case in enumerate(CASES[name]):
        folder = tmp_path / str(number)
        found = run_case(case, name, folder)
        for effect in declared:
            own = set(getattr(found.hook, effect))
            seen: set[str] = getattr(found, effect)
            # A change in place also reads.
            allowed = own | set(found.hook.changes or ()) if effect == "reads" else own
            assert seen <= allowed, (number, effect)
            declared[effect] |= own
            observed[effect] |= seen
        if "model" in found.of_run:
            observed["reads"].add("model")
        if "optimizers" in found.of_run:
            observed["reads"].add("learning rates")
    for effect, names in declared.items():
        assert names - observed[effect] <= set(NOT_OBSERVED.get(name, ())), effect


def test_every_hook_of_the_package_is_observed() -> None:
    """The runs above cover all built-in hooks."""
    assert {*HOOK_MODULES, "OptimizerHook", "NamedOptimizersHook"} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_declared_names_are_known(name: str) -> None:
    """Each declared name is a field of args, a documented name, or a method of the requests."""
    page = (Path(__file__).parents[3] / "docs" / "how_to" / "hooks.md").read_text()
    from robo_orchard_lab.pipeline.hooks import optimizer

    hook = getattr(built_in, name, None) or getattr(optimizer, name)
    for names in (hook.reads, hook.changes):
        for each in names:
            assert each in OTHER_NAMES or PipelineHookArgs.channels_of(each)
            assert each not in OTHER_NAMES or f"`{each}`" in page
    assert all(callable(getattr(Requests, each)) for each in hook.requests)


def test_the_plan_of_a_trainer_has_the_declarations(tmp_path: Path) -> None:
    """trainer.plan() shows what the settings of a hook add to the declarations of its class."""
    model = torch.nn.Linear(2, 1)
    trainer = HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        [torch.zeros(1, 2)],
        Classifier(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[built_in.StatsMonitorConfig(every="3 steps"), PipelineHooks("mine")],
        max_epoch=1,
    )
    plan = trainer.plan()
    assert isinstance(plan, RunPlan)
    found = {hook.hook: (hook.changes, hook.requests) for hook in plan.hooks}
    assert found["StatsMonitor"] == (("metrics", "grad_norm"), ("log",))
