"""LightningModuleProcessor trains a LightningModule as Lightning's own Trainer does."""

from __future__ import annotations

import ast
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from accelerate import Accelerator
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    lightning,
)
from robo_orchard_lab.pipeline.errors import (
    BatchProcessorError,
    PipelineConfigError,
    PipelineStateError,
    StateError,
    UnknownMetricError,
)
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.lightning import LightningModuleProcessor
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, read_metrics
from tiny import equal, make_loader, make_model, weights

LightningModule: Any = pl.LightningModule  # its methods return unions of types


class DemoModule(BoringModel):
    """Module that inherits its steps."""


class Regression(LightningModule):  # type: ignore[misc]  # of any type
    """Small model with the usual methods of a LightningModule."""

    def __init__(
        self, configure: Callable[[Any], Any] | None = None, returns_dict: bool = False
    ) -> None:
        super().__init__()
        self.net = make_model()
        self.configure = adam if configure is None else configure
        self.returns_dict = returns_dict

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss, "index": batch_idx} if self.returns_dict else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def train_by_lightning(
    module: Any, epochs: int = 3, rest: int = 0, loader: Any = None, **options: Any
) -> Any:
    """Train in Lightning's Trainer, and return the trainer."""
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, such as of torch's deprecations
        trainer = pl.Trainer(max_epochs=epochs, **settings)
        trainer.fit(module, loader or make_loader(rest=rest), make_loader(3, rest=rest))
    return trainer


def make_trainer(
    module: Any,
    hooks: Any = (),
    *,
    accumulate: int = 1,
    rest: int = 0,
    adapter: LightningModuleProcessor | None = None,
    **options: Any,
) -> HookBasedTrainer:
    adapter = LightningModuleProcessor(module) if adapter is None else adapter
    validation = ValidationHookConfig()(dataloaders={"val": make_loader(3, rest=rest)})
    return HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        module,
        make_loader(rest=rest),
        adapter,
        **adapter.optimizers(),
        hooks=[adapter.hooks(), *hooks, validation],
        **{"max_epoch": 3} | options,
    )


def values_in(file: Path) -> dict[tuple[int, str], float]:
    """Return the values of complete records by step and name."""
    records = [record for record in read_metrics(file) if not record.partial]
    return {(v.step, v.name): v.value for record in records for v in record.values}


def adam(module: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


def with_scheduler(**settings: Any) -> Callable[[Any], Any]:
    def configure(module: Any) -> Any:
        optimizer = adam(module)
        scheduler = StepLR(optimizer, 2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **settings}}

    return configure


def with_lists(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return [optimizer], [ExponentialLR(optimizer, 0.5)]


def with_plateau(module: Any) -> Any:
    optimizer = adam(module)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
    return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


FORMS: dict[str, Callable[[Any], Any]] = {
    "optimizer": adam,
    "list": lambda module: [adam(module)],
    "per step": with_scheduler(interval="step"),
    "per epoch": with_scheduler(),
    "two lists": with_lists,
    "plateau": with_plateau,
    "list of mappings": lambda module: [with_scheduler(interval="step")(module)],
}


@pytest.mark.parametrize(
    ("form", "accumulate"), [*((form, 1) for form in FORMS), ("per step", 7), ("plateau", 7)]
)
def test_weights_are_those_of_lightning(form: str, accumulate: int) -> None:
    """Weights and learning rates equal Lightning's, bit for bit, with clipping and accumulation."""
    module, reference = (Regression(FORMS[form], form == "list") for _ in range(2))
    expected = train_by_lightning(
        reference, accumulate_grad_batches=accumulate, gradient_clip_val=0.1
    )
    clip = GradientClippingHookConfig(max_norm=0.1)
    trainer = make_trainer(module, [clip], accumulate=accumulate)
    trainer()
    assert equal(weights(module), weights(reference))
    assert trainer.optimizer is not None
    rate = expected.optimizers[0].param_groups[0]["lr"]
    assert trainer.optimizer.param_groups[0]["lr"] == rate
    assert trainer.progress.optimizer_step_id == expected.global_step


class Logging(Regression):
    """Logs in all ways that the adapter supports."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanAbsoluteError()
        self.train_error = torchmetrics.MeanAbsoluteError()
        classes = torchmetrics.MeanSquaredError, torchmetrics.R2Score
        self.scores = torchmetrics.MetricCollection([cls() for cls in classes], prefix="val_")
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log_dict({"a": loss, "b": 2 * loss}, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.train_error.update(self.net(batch[0]), batch[1])
        self.log("train_error", self.train_error, on_step=False, on_epoch=True)
        self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx=torch.sum)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.losses.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.training
        assert not torch.is_grad_enabled()
        super().validation_step(batch, batch_idx)
        inputs, targets = batch
        self.error(self.net(inputs), targets)
        self.log("val_error", self.error)
        self.scores.update(self.net(inputs), targets)
        self.log_dict(self.scores)
        self.losses.append(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        assert not self.training
        self.log("val_first", self.losses[0])
        self.log("val_batches", float(len(self.losses)))

    def on_train_epoch_end(self) -> None:
        self.log("epoch", float(self.current_epoch))


def test_logged_values_are_those_of_lightning(tmp_path: Path) -> None:
    """Means over samples, extremes, sums and torchmetrics of the last epoch equal Lightning's."""
    module, reference = Logging(), Logging()
    expected = train_by_lightning(reference, rest=1).callback_metrics
    sink = JsonLinesSinkConfig(path=str(tmp_path / "metrics.jsonl"))
    logger = MetricsLoggerConfig(every="1 epoch", sinks=[sink])
    make_trainer(module, [logger], rest=1)()
    last = {name: value for (_, name), value in values_in(tmp_path / "metrics.jsonl").items()}
    names = ["a_epoch", "b_epoch", "largest", "count", "epoch", "train_error"]
    for name in names:
        assert last[name] == pytest.approx(float(expected[name]), rel=1e-6), name
    values = ["loss", "error", "first", "batches", "MeanSquaredError", "R2Score"]
    for name in (f"val_{value}" for value in values):
        assert last[f"eval/val/{name}"] == pytest.approx(float(expected[name]), rel=1e-6), name


NOTED = (
    "on_fit_start on_train_start on_train_epoch_start on_train_batch_start on_before_backward "
    "on_after_backward on_before_optimizer_step on_train_batch_end on_train_epoch_end on_train_end "
    "on_fit_end on_after_batch_transfer setup teardown configure_model on_validation_start "
    "on_validation_epoch_start on_validation_batch_start on_validation_batch_end "
    "on_validation_epoch_end on_validation_end"
)


def note(name: str) -> Callable[..., Any]:
    """Return a hook that records its call with epoch, optimizer steps and scalar arguments."""

    def hook(self: Any, *args: Any, stage: str = "") -> Any:
        scalars = [arg for arg in args if isinstance(arg, int | str)]
        is_running = name not in ("setup", "configure_model", "teardown")
        place = (self.current_epoch, self.global_step) if is_running else ()
        loss = [arg["loss"] for arg in args if isinstance(arg, dict)]
        self.calls.append((name, *place, *scalars, *map(float, loss)))
        return args[0] if name == "on_after_batch_transfer" else None

    return hook


Noting = type("Noting", (Regression,), {name: note(name) for name in NOTED.split()})


@pytest.mark.parametrize("accumulate", [1, 7])
def test_hooks_run_in_the_order_of_lightning(accumulate: int) -> None:
    """All hooks run as in Lightning, except that the epoch ends before its evaluation."""
    module, reference = Noting(), Noting()
    module.calls, reference.calls = [], []
    train_by_lightning(reference, epochs=2, accumulate_grad_batches=accumulate)
    trainer = make_trainer(module, max_epoch=2, accumulate=accumulate)
    before = len(module.calls)
    trainer()

    def of_training(calls: list[Any]) -> list[Any]:
        return [call for call in calls if "validation" not in call[0] and "transfer" not in call[0]]

    def of_validation(calls: list[Any]) -> list[Any]:
        return [call for call in calls if "validation" in call[0]]

    assert [call[0] for call in module.calls[:before]] == ["setup", "configure_model"]
    assert of_training(module.calls) == of_training(reference.calls)
    sanity = 4 + 2  # of one batch, before the first step
    assert of_validation(module.calls)[sanity:] == of_validation(reference.calls)


def test_a_stopped_run_resumes_exactly(tmp_path: Path) -> None:
    """A run that stops within an epoch resumes with equal weights and logged values."""

    def run(folder: Path, **options: Any) -> list[torch.Tensor]:
        module = Logging()
        sink = JsonLinesSinkConfig(path=str(folder / "metrics.jsonl"))
        logger = MetricsLoggerConfig(every="1 epoch", sinks=[sink])
        save = SaveCheckpointConfig(folder=folder / "checkpoints")
        make_trainer(module, [logger, save], rest=1, resume_from="auto", **options)()
        return weights(module)

    expected = run(tmp_path / "uninterrupted")
    run(tmp_path / "stopped", max_step=11)
    assert equal(run(tmp_path / "stopped"), expected)
    found = [values_in(tmp_path / name / "metrics.jsonl") for name in ("uninterrupted", "stopped")]
    assert found[0] == found[1]


def test_a_rollback_does_not_end_the_training(tmp_path: Path) -> None:
    """A rolled-back run logs as an uninterrupted run, and ends the training once."""
    ends: list[int] = []
    hooks = PipelineHooks("notes")

    @hooks.on_epoch.after
    def roll_back(args: PipelineHookArgs) -> None:
        if args.epoch_id == 1 and len(rolled_back) < 1:
            rolled_back.append(args.global_step_id)
            args.requests.rollback("a test")

    rolled_back: list[int] = []
    values = []
    for is_rolled_back in (False, True):
        module = type("Ending", (Logging,), {"on_train_end": lambda self: ends.append(1)})()
        sink = JsonLinesSinkConfig(path=str(tmp_path / f"{is_rolled_back}.jsonl"))
        save = SaveCheckpointConfig(every="1 epoch", folder=tmp_path / f"{is_rolled_back}")
        logger = MetricsLoggerConfig(every="1 epoch", sinks=[sink])
        make_trainer(module, [logger, save, *([hooks] if is_rolled_back else [])])()
        values.append(values_in(tmp_path / f"{is_rolled_back}.jsonl"))
    assert rolled_back == [14]
    assert ends == [1, 1]
    assert values[0] == values[1]


class OfTrainer(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        assert isinstance(loss, torch.Tensor)
        self.seen = (
            self.trainer.max_epochs,
            self.trainer.num_training_batches,
            self.trainer.world_size,
            self.global_rank,
            self.trainer.is_global_zero,
            self.trainer.training,
            self.logger,
            str(self.device),
            self.optimizers().param_groups[0]["lr"],
            self.lr_schedulers().last_epoch,
        )
        if self.global_step == 4:
            self.trainer.should_stop = True
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = adam(self)
        total = self.trainer.estimated_stepping_batches * self.trainer.max_epochs
        return [optimizer], [StepLR(optimizer, total)]


def test_a_subclass_of_another_package_trains() -> None:
    """A module that inherits its steps, also from one of Lightning's demos, is accepted."""
    module, reference = DemoModule(), DemoModule()
    module.load_state_dict(reference.state_dict())
    loader = module.train_dataloader()
    adapter = LightningModuleProcessor(module)
    accelerator = Accelerator(cpu=True)
    HookBasedTrainer(
        accelerator,
        module,
        loader,
        adapter,
        **adapter.optimizers(),
        hooks=[adapter.hooks()],
        max_epoch=1,
    )()
    train_by_lightning(reference, epochs=1, loader=loader, limit_val_batches=0)
    assert equal(weights(module), weights(reference))


def test_a_module_reads_its_trainer_and_stops_the_run() -> None:
    """Counters, limits and ranks are known as ``self.trainer``; ``should_stop`` ends the run."""
    module = OfTrainer()
    given = {"estimated_stepping_batches": 21, "max_epochs": 3, "precision": "32-true"}
    adapter = LightningModuleProcessor(module, trainer=given)
    trainer = make_trainer(module, adapter=adapter)
    trainer()
    assert module.trainer.precision == "32-true"
    assert module.seen == (3, 7, 1, 0, True, True, None, "cpu", 0.01, 0)
    assert trainer.progress.global_step_id == 5


def test_a_given_value_that_differs_from_the_run_is_refused() -> None:
    """Values of ``self.trainer`` for ``configure_optimizers`` must hold in the run."""
    module = Regression()
    adapter = LightningModuleProcessor(module, trainer={"max_epochs": 4})
    with pytest.raises(PipelineConfigError, match=r"trainer=\{'max_epochs': 4\}.* the run has 3"):
        make_trainer(module, adapter=adapter)()


def test_a_copy_of_the_module_keeps_its_run() -> None:
    """A deep copy has equal weights, and the adapter of the original."""
    module = Regression()
    adapter = LightningModuleProcessor(module)
    make_trainer(module, adapter=adapter)()
    copied = copy.deepcopy(module)
    assert equal(weights(copied), weights(module))
    assert copied.log.__self__ is adapter


def test_an_evaluator_without_a_trainer_calls_the_validation_step() -> None:
    """Evaluator gets the values that ``validation_step`` logs."""
    module = Regression()
    loader = make_loader(3, rest=1)
    found = Evaluator(module, LightningModuleProcessor(module), {"val": loader}).evaluate()
    losses = [(module.loss(batch).item(), len(batch[0])) for batch in loader]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found == {"val/val_loss": pytest.approx(mean)}


class AllSteps(Regression):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"twice": 2 * self.loss(batch), "index": float(batch_idx)}, batch_size=1)

    def predict_step(self, batch: Any) -> Any:
        return {"prediction": self.net(batch[0])}


def test_an_evaluator_calls_test_and_predict_steps() -> None:
    """``test_step`` logs values with its weight, ``predict_step`` returns outputs."""
    module, loader = AllSteps(), make_loader(3, rest=1)
    adapter = LightningModuleProcessor(module)
    tested = Evaluator(module, adapter.step_processor("test_step"), {"test": loader}).evaluate()
    losses = [module.loss(batch).item() for batch in loader]
    assert tested == {
        "test/twice": pytest.approx(2 * sum(losses) / 4),
        "test/index": pytest.approx(1.5),
    }
    step = adapter.step_processor("predict_step")
    predicted = Evaluator(module, step, {"test": loader}).predict()["test"].outputs["prediction"]
    expected = [module.net(batch[0]).detach() for batch in loader]
    assert isinstance(predicted, torch.Tensor)
    assert torch.equal(predicted, torch.cat(expected))


def test_steps_without_their_hooks_are_refused() -> None:
    """Epoch hooks around a step outside of a training, and a missing step, are errors."""
    adapter = LightningModuleProcessor(overriding(on_test_epoch_end=lambda self: None))
    with pytest.raises(PipelineConfigError, match="Changed has no predict_step"):
        adapter.step_processor("predict_step")
    module = type("Summed", (AllSteps,), {"on_test_epoch_end": lambda self: None})()
    with pytest.raises(PipelineConfigError, match=r"Summed.on_test_epoch_end is called only by"):
        LightningModuleProcessor(module).step_processor("test_step")
    LightningModuleProcessor(module, leave_out=["on_test_epoch_end"]).step_processor("test_step")
    logging = Logging()
    with pytest.raises(
        PipelineConfigError, match=r"Logging.on_validation_epoch_end is called only"
    ):
        Evaluator(logging, LightningModuleProcessor(logging), {"val": make_loader(1)}).evaluate()


def overriding(**methods: Any) -> Any:
    return type("Changed", (Regression,), methods)()


def step_with_iterator(self: Any, dataloader_iter: Any) -> None: ...


def configure_as(result: Callable[[Any], Any]) -> Any:
    return Regression(result)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no LightningModule": (
        lambda: torch.nn.Linear(1, 1),
        "expected a LightningModule, found a Linear; .* subclass SimpleBatchProcessor",
    ),
    "unsupported hook": (
        lambda: overriding(optimizer_step=lambda *_: None),
        r"Changed.optimizer_step is not called .* on_optimizer_step.* leave_out=\['optimizer_",
    ),
    "removed hook": (
        lambda: overriding(validation_epoch_end=lambda *_: None),
        "Changed.validation_epoch_end: Lightning 2 removed .* to on_validation_epoch_end",
    ),
    "iterator": (
        lambda: overriding(training_step=step_with_iterator),
        "Changed.training_step: expected the arguments batch and batch_idx, found dataloader_iter",
    ),
    "frequency": (
        lambda: configure_as(with_scheduler(frequency=2)),
        "expected frequency 1 of the LR scheduler, found 2; scale the arguments",
    ),
    "two LR schedulers": (
        lambda: configure_as(lambda m: ([o := adam(m)], [StepLR(o, 1), StepLR(o, 2)])),
        "expected one optimizer and at most one LR scheduler, found 1 and 2; .*ChainedScheduler",
    ),
    "two optimizers": (
        lambda: configure_as(lambda m: [adam(m), adam(m)]),
        "expected one optimizer and at most one LR scheduler, found 2 and 0",
    ),
    "unknown form": (
        lambda: configure_as(lambda m: "adam"),
        "configure_optimizers: expected an optimizer, a list of optimizers, .* found 'adam'",
    ),
    "plateau without monitor": (
        lambda: configure_as(lambda m: ([o := adam(m)], [ReduceLROnPlateau(o)])),
        "expected a monitor of ReduceLROnPlateau, found none; return",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_refused_before_the_first_step(case: str) -> None:
    """An unsupported module is an error with a remedy when adapter or trainer are created."""
    make, message = REFUSED[case]
    with pytest.raises(PipelineConfigError, match=message):
        LightningModuleProcessor(make()).optimizers()


def test_a_hook_is_left_out_on_request() -> None:
    """``leave_out`` trains without an overridden hook."""

    def fail(self: Any) -> None:
        raise AssertionError

    module = overriding(prepare_data=fail, on_train_start=fail)
    adapter = LightningModuleProcessor(module, leave_out=["prepare_data", "on_train_start"])
    make_trainer(module, adapter=adapter, max_step=1)()


def logging_in(hook: str, *args: Any, **kwargs: Any) -> Any:
    def log(self: Any, *_: Any) -> Any:
        self.log("x", *args, **kwargs)

    return overriding(**{hook: log})


REFUSED_IN_STEPS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "metric in training": (
        lambda: logging_in("on_train_batch_start", torchmetrics.MeanMetric()),
        PipelineConfigError,
        "expected a number, found a MeanMetric; .* or on_step=False, on_epoch=True",
    ),
    "step of an evaluation": (
        lambda: logging_in("validation_step", 1.0, on_step=True),
        PipelineConfigError,
        r"self.log\('x'\) in validation_step: .* leave out on_step",
    ),
    "unknown reduction": (
        lambda: logging_in("on_train_batch_start", 1.0, reduce_fx=torch.median),
        PipelineConfigError,
        "expected reduce_fx 'mean', .* found 'median'",
    ),
    "where nothing is logged": (
        lambda: logging_in("on_fit_start", 1.0),
        PipelineStateError,
        "not possible in on_fit_start",
    ),
    "no loss": (
        lambda: overriding(training_step=lambda self, batch: None),
        BatchProcessorError,
        "Changed.training_step must return a loss, .* got None",
    ),
    "end of an epoch": (
        lambda: overriding(on_train_batch_start=lambda self, batch, index: -1),
        PipelineStateError,
        "on_train_batch_start returned -1, .*should_stop = True to end the run",
    ),
    "unknown attribute": (
        lambda: overriding(on_train_start=lambda self: self.trainer.callback_metrics),
        PipelineStateError,
        r"Changed reads self.trainer.callback_metrics, .* pass trainer=\{'callback_metrics': ...\}",
    ),
    "steps of the run": (
        lambda: configure_as(lambda m: StepLR(adam(m), m.trainer.max_epochs)),
        PipelineStateError,
        r"configure_optimizers reads to Lightning.*, as by trainer=\{'max_epochs': 3\}",
    ),
}


@pytest.mark.parametrize("case", REFUSED_IN_STEPS)
def test_what_a_module_can_not_do_is_refused(case: str) -> None:
    """An unsupported call of a module is an error with a remedy, where the module makes it."""
    make, error, message = REFUSED_IN_STEPS[case]
    with pytest.raises(error, match=message):
        make_trainer(make(), max_epoch=1)()


def test_hooks_of_another_adapter_are_refused() -> None:
    """The adapter's hooks belong to the trainer of that adapter."""
    module = Regression()
    adapter, other = LightningModuleProcessor(Regression()), LightningModuleProcessor(module)

    def train(hooks: list[Any]) -> None:
        optimizers = other.optimizers()
        loader = make_loader()
        HookBasedTrainer(
            Accelerator(cpu=True), module, loader, other, **optimizers, hooks=hooks, max_epoch=1
        )()

    with pytest.raises(PipelineConfigError, match="expected their LightningModuleProcessor"):
        train([adapter.hooks()])
    with pytest.raises(PipelineStateError, match=r"pass adapter.hooks\(\) to the trainer"):
        train([])


def test_another_model_is_refused() -> None:
    """The trainer's model is the adapter's module itself, not compiled as a whole."""
    module = Regression()
    adapter = LightningModuleProcessor(module)
    compiled: Any = torch.compile(module, backend="eager")
    for model, found in ((Regression(), "Regression"), (compiled, "OptimizedModule")):
        parameters = model.parameters()
        trainer = HookBasedTrainer(
            Accelerator(cpu=True),
            model,
            make_loader(),
            adapter,
            torch.optim.SGD(parameters, lr=0.1),
            hooks=[adapter.hooks()],
            max_epoch=1,
        )
        with pytest.raises(PipelineConfigError, match=f"found another {found}; pass the module"):
            trainer()


def test_several_loaders_of_one_hook_are_refused_before_the_first_step() -> None:
    """A module can't tell loaders apart: each needs a ValidationHook of its own."""

    def train(hooks: dict[str, Any]) -> HookBasedTrainer:
        module = Regression()
        adapter = LightningModuleProcessor(module)
        loader, optimizers = make_loader(), adapter.optimizers()
        hooks = {"module": adapter.hooks(), **hooks}
        trainer = HookBasedTrainer(
            Accelerator(cpu=True), module, loader, adapter, **optimizers, hooks=hooks, max_epoch=1
        )
        trainer()
        return trainer

    def validation(*names: str) -> Any:
        return ValidationHookConfig()(dataloaders={name: make_loader(2) for name in names})

    with pytest.raises(PipelineConfigError, match=r"first.dataloaders: expected one loader.*a, b"):
        train({"first": validation("a", "b")})
    trainer = train({"first": validation("a"), "second": validation("b")})
    assert {"eval/a/val_loss", "eval/b/val_loss"} <= {*trainer.metrics.names()}


def test_an_unknown_value_to_monitor_is_refused_before_the_first_step() -> None:
    """A name that ``validation_step`` does not log is an error that lists the logged names."""

    def configure(module: Any) -> Any:
        return with_plateau(module) | {"monitor": "val_accuracy"}

    module = Regression(configure)
    trainer = make_trainer(module)
    with pytest.raises(UnknownMetricError, match=r"eval/val/val_accuracy.*eval/val/val_loss"):
        trainer()
    assert trainer.progress.global_step_id == 0


class Adversarial(LightningModule):  # type: ignore[misc]  # of any type
    """GAN with two optimizers and LR schedulers by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.g = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        self.d = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.batch_ends: list[tuple[int, int]] = []
        self.last_batches: list[int] = []

    def configure_optimizers(self) -> Any:
        g = torch.optim.Adam(self.g.parameters(), lr=0.01, betas=(0.5, 0.9))
        d = torch.optim.SGD(self.d.parameters(), lr=0.05, momentum=0.9)
        return [g, d], [StepLR(g, 3, gamma=0.7), StepLR(d, 5, gamma=0.5)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        g, d = self.optimizers()
        seed = torch.Generator().manual_seed(self.global_step)
        noise = torch.randn(len(real), 3, generator=seed)
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)

        with d.toggle_model():
            d.zero_grad()
            of_real = bce(self.d(real), ones)
            self.manual_backward(of_real)  # two backward passes for one update, as in dcgan
            of_fake = bce(self.d(self.g(noise).detach()), zeros)
            self.manual_backward(of_fake)
            self.clip_gradients(d, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            d.step()

        if batch_idx % 2 == 0:  # accumulates over two batches without toggling
            g.zero_grad()
        loss = bce(self.d(self.g(noise)), ones)
        self.manual_backward(loss)
        if batch_idx % 2 == 1:
            g.step()
            for scheduler in self.lr_schedulers():
                scheduler.step()
        if self.trainer.is_last_batch:
            self.last_batches.append(batch_idx)
        self.log_dict({"g": loss, "d": of_real + of_fake}, prog_bar=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch_ends.append((batch_idx, self.global_step))


@pytest.mark.parametrize(("precision", "theirs"), [("no", "32-true"), ("bf16", "bf16-mixed")])
def test_manual_optimization_equals_lightning(precision: str, theirs: str, tmp_path: Path) -> None:
    """Two optimizers by manual optimization train as in Lightning, also stopped and resumed."""
    reference = Adversarial()
    expected = train_by_lightning(reference, limit_val_batches=0, precision=theirs)

    def run(folder: Path, **options: Any) -> tuple[Adversarial, HookBasedTrainer]:
        module = Adversarial()
        adapter = LightningModuleProcessor(module)
        trainer = HookBasedTrainer(
            Accelerator(cpu=True, mixed_precision=precision),
            module,
            make_loader(),
            adapter,
            **adapter.optimizers(),
            hooks=[adapter.hooks(), SaveCheckpointConfig(folder=folder)],
            resume_from="auto",
            **{"max_epoch": 3} | options,
        )
        trainer()
        return module, trainer

    module, trainer = run(tmp_path / "uninterrupted")
    assert equal(weights(module), weights(reference))
    assert module.batch_ends == reference.batch_ends
    assert module.last_batches == reference.last_batches == [6, 6, 6]
    assert [each.param_groups[0]["lr"] for each in trainer.optimizers.values()] == [
        each.param_groups[0]["lr"] for each in expected.optimizers
    ]
    run(tmp_path / "stopped", max_step=12)  # between two updates of g: gradients are open
    resumed, trainer = run(tmp_path / "stopped")
    assert equal(weights(resumed), weights(reference))
    assert trainer.progress.optimizer_steps == {"optimizer_0": 9, "optimizer_1": 21}


def test_hooks_see_and_skip_manual_updates() -> None:
    """Hooks on ``on_optimizer_step`` run for each update, and may skip it."""
    seen: list[tuple[str | None, bool | None]] = []
    hooks = PipelineHooks("notes")

    @hooks.on_optimizer_step.before
    def skip(args: PipelineHookArgs) -> None:
        if args.global_step_id == 1 and args.optimizer_name == "optimizer_1":
            args.skip_reason = "a test"

    @hooks.on_optimizer_step.after
    def note(args: PipelineHookArgs) -> None:
        seen.append((args.optimizer_name, args.update_committed))

    module = Adversarial()
    adapter = LightningModuleProcessor(module)
    loader, tracker = make_loader(), LossTrackerConfig()
    trainer = HookBasedTrainer(
        Accelerator(cpu=True),
        module,
        loader,
        adapter,
        **adapter.optimizers(),
        hooks=[adapter.hooks(), hooks, tracker, MetricsLoggerConfig(every="1 step")],
        max_step=2,
    )
    trainer()
    assert seen == [("optimizer_1", True), ("optimizer_1", False), ("optimizer_0", True)]
    assert trainer.progress.optimizer_steps == {"optimizer_0": 1, "optimizer_1": 1}
    assert {"loss/optimizer_0", "loss/optimizer_1", "g", "d"} <= {*trainer.metrics.names()}


def test_manual_optimization_refuses_accumulation_of_the_trainer() -> None:
    """Accumulation by the accelerator is an error before the first step, as in Lightning."""
    module = Adversarial()
    with pytest.raises(PipelineConfigError, match="expected gradient_accumulation_steps=1"):
        make_trainer(module, accumulate=2)()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Weights and logged values of two ranks equal those of one process, also with uneven data."""
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(SCRIPTS / "lightning_on_ranks.py", folder, processes=processes)
        found.append(json.loads((folder / "found.json").read_text("utf-8")))
    one, two = found
    for kind in ("False", "True"):
        assert two[kind]["weights"] == pytest.approx(one[kind]["weights"], rel=1e-4, abs=1e-6)
        assert two[kind]["values"].keys() == one[kind]["values"].keys()
        for name, value in one[kind]["values"].items():
            if "largest" not in name and "rank" not in name:
                assert two[kind]["values"][name] == pytest.approx(value, rel=1e-4), name
        assert two[kind]["values"]["8 eval/val/rank"] == 0.5  # the mean over ranks
    assert two["True"]["weights"] == pytest.approx(two["False"]["weights"], rel=1e-6)


def test_the_adapter_imports_nothing_of_lightning() -> None:
    """No module of the package imports Lightning, which only the user's module needs."""
    package = Path(lightning.__file__).parents[1]
    names = [
        name
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    ]
    assert "torch" in names
    assert not [n for n in names if n.partition(".")[0] in ("lightning", "pytorch_lightning")]


def test_values_of_two_ranks_are_merged_for_one() -> None:
    """Sums and metrics of an open epoch on two ranks become those of one rank."""
    states = []
    for rank in range(2):
        module = Logging()
        hooks: Any = LightningModuleProcessor(module).hooks()
        hooks.of_epoch.publish("a_epoch", float(rank), weight=1 + rank)
        module.train_error.update(torch.full((2,), float(rank)), torch.zeros(2))
        states.append(hooks.state_dict())
    module = Logging()
    hooks = LightningModuleProcessor(module).hooks()
    (merged,) = hooks.redistribute_states(states, 1)
    hooks.check_state(merged, module)
    hooks.load_state_dict(merged)
    assert module.train_error.compute() == 0.5
    board = MetricsBoard()
    board.publish_all(hooks.of_epoch)
    record = board.flush(log=True)
    assert record is not None
    assert {v.name: v.value for v in record.values} == {"a_epoch": pytest.approx(2 / 3)}


def test_a_state_of_other_lr_schedulers_is_refused() -> None:
    """A checkpoint with fewer LR schedulers of the module is an error before anything changes."""
    module = Adversarial()
    hooks = LightningModuleProcessor(module).hooks()
    state = hooks.state_dict()
    with pytest.raises(StateError, match="expected 2 LR schedulers of the module, found 1"):
        hooks.check_state({**state, "lr_schedulers": state["lr_schedulers"][:1]}, module)
