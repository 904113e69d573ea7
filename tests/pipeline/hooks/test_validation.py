"""Evaluations during training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # TensorBoard has no types
    EventAccumulator,
)
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from evaluate_on_ranks import (
    Classify,
    Rows,
    Stream,
    buffers_of,
    make_evaluation_loader,
    make_metrics,
    make_normalised,
    run_on_ranks,
)
from robo_orchard_core.utils.config import ClassConfig, ConfigReferenceError
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.errors import (
    DataError,
    PipelineConfigError,
    StateError,
    UnknownMetricError,
)
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import (
    EarlyStoppingConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
)
from robo_orchard_lab.pipeline.hooks.ema import EMAConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.hooks.validation import ValidationHook, ValidationHookConfig
from robo_orchard_lab.pipeline.metrics import MetricValue, number_text
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, TrackerSinkConfig
from robo_orchard_lab.pipeline.trigger import EveryEpochs, EverySteps, Trigger
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from tiny import equal, make_loader, make_trainer

FORMATS: tuple[Literal["json", "yaml", "toml"], ...] = ("json", "yaml", "toml")


class Recorder(PipelineHooks):
    """Hook that records the steps of evaluations, and the values of one metric."""

    def __init__(self, name: str = "eval/val/loss") -> None:
        super().__init__()
        self.evaluated: list[tuple[str | None, int]] = []
        self.values: list[MetricValue] = []

        @self.on_loop.before
        def subscribe(args: PipelineHookArgs) -> None:
            args.metrics.subscribe(name, self.values.append, who="Recorder")

        @self.on_evaluation.before
        def note(args: PipelineHookArgs) -> None:
            self.evaluated.append((args.evaluation, args.progress.steps_done))

    @property
    def steps(self) -> list[int]:
        return [step for _, step in self.evaluated]


def train(*hooks: PipelineHooks, **options: Any) -> HookBasedTrainer:
    """Build a trainer with 5 steps per epoch, BatchNorm and dropout."""
    defaults = {
        "model": make_normalised(),
        "loader": make_evaluation_loader(40, shuffle=True),
        "batch_processor": Classify(),
    }
    trainer = make_trainer(hooks, **{**defaults, **options})
    torch.manual_seed(9)
    return trainer


def validation(every: str | None = "1 epoch", **options: Any) -> ValidationHook:
    trigger = None if every is None else Trigger.parse(every)
    dataloaders = options.pop("dataloaders", {"val": make_evaluation_loader(11)})
    live = {name: options.pop(name) for name in ("metrics", "metric_inputs") if name in options}
    return ValidationHookConfig(every=trigger, **options)(dataloaders=dataloaders, **live)


def test_only_named_sets_are_evaluated() -> None:
    """Only loaders named in sets are evaluated."""
    loaders = {name: make_evaluation_loader(11) for name in ("a", "b", "c")}
    trainer = train(validation(dataloaders=loaders, sets=["c", "a"]), max_epoch=1)
    trainer()
    evaluated = [name for name in trainer.metrics.names() if name.startswith("eval/")]
    assert sorted(evaluated) == ["eval/a/loss", "eval/c/loss"]
    with pytest.raises(PipelineConfigError, match=r"no loader 'vall'; did you mean 'val'"):
        validation(sets=["vall"])
    with pytest.raises(PipelineConfigError, match=r"sets: .* 'x'; expected one of a, b, c"):
        validation(dataloaders=loaders, sets=["x"])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [5, 10]),
        ({"every": "5 steps"}, [5, 10]),
        ({"every": "4 steps", "at_start": True, "at_end": True}, [0, 4, 8, 12]),
        ({"every": "5 steps | 1 epoch", "at_end": True}, [5, 10, 12]),
        ({"every": "4 optimizer steps"}, [4, 8, 12]),
        ({"every": None, "at_end": True}, [12]),
        ({"every": None}, []),
    ],
)
def test_evaluations_follow_the_trigger(options: dict[str, Any], steps: list[int]) -> None:
    """Evaluations at start, end and in between, once per step, reach subscribers."""
    recorder = Recorder() if steps else PipelineHooks("no subscriber")
    train(validation(**options), recorder, max_step=12)()
    if isinstance(recorder, Recorder):
        assert recorder.steps == steps
        assert [value.step for value in recorder.values] == steps


def test_evaluations_on_request() -> None:
    """Hooks request one evaluation by name, or all; each is made once per step."""
    asking = PipelineHooks("asking")

    @asking.on_step.after(when="at steps 2, 4")
    def ask(args: PipelineHookArgs) -> None:
        name = "one" if args.global_step_id == 1 else None
        args.requests.evaluate("because", name=name)
        args.requests.evaluate("once more", name=name)

    one = validation("4 steps", dataloaders={"val": make_evaluation_loader(11)})
    two = validation(None, dataloaders={"second": make_evaluation_loader(11)})
    one.name, two.name = "one", "two"
    recorder = Recorder()
    train(one, two, asking, recorder, max_step=4)()
    assert recorder.evaluated == [("one", 2), ("one", 4), ("two", 4)]


def test_step_is_evaluated_once() -> None:
    """Data without a length ends an epoch at a step that was evaluated before."""
    recorder = Recorder()
    stream = DataLoader(Stream(40), batch_size=8)
    train(validation("5 steps | 1 epoch"), recorder, loader=stream, max_epoch=2)()
    assert recorder.steps == [5, 10]
    assert [value.step for value in recorder.values] == [5, 10]


def test_values_equal_an_evaluator() -> None:
    """Loss and metrics of each loader are published for their step."""
    loaders = {"small": make_evaluation_loader(3), "large": make_evaluation_loader(65)}
    hook = validation(dataloaders=loaders, metrics=make_metrics())
    trainer = train(hook, max_epoch=1)
    trainer()
    expected = Evaluator(trainer.model, Classify(), loaders, metrics=make_metrics()).evaluate()
    found = {name: trainer.metrics.last_value(f"eval/{name}") for name in expected}
    assert found == expected
    assert len(found) == 10


def noisy() -> dict[str, Any]:
    """Return loaders with random order and augmentation."""
    return {
        "plain": DataLoader(Rows(20, noise=0.3), batch_size=8, shuffle=True),
        "own": DataLoader(
            Rows(20, noise=0.3), batch_size=8, shuffle=True, generator=torch.Generator()
        ),
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_evaluation_does_not_change_training(accumulate: int) -> None:
    """Shuffled, augmented evaluations leave weights, buffers and RNG unchanged.

    A frozen module stays in evaluation mode.
    """
    ends = []
    for hooks in ([], [validation("2 steps", at_start=True, dataloaders=noisy())]):
        model = torch.nn.Sequential(make_normalised(), torch.nn.BatchNorm1d(2))
        modes: list[list[bool]] = []
        watch = PipelineHooks("watch")

        @watch.on_step.before
        def note(args: PipelineHookArgs, modes: list[list[bool]] = modes) -> None:
            modes.append([module.training for module in args.model.modules()])

        trainer = train(*hooks, watch, model=model, accumulate=accumulate, max_step=8)
        model[1].eval()
        before = buffers_of(model[1])
        trainer()
        assert modes == [[True] * 6 + [False]] * 8
        assert equal(buffers_of(model[1]), before)
        state = [value.clone() for value in model.state_dict().values()]
        ends.append([*state, torch.rand(2), torch.get_rng_state()])
    assert equal(*ends)


def test_evaluation_does_not_change_training_on_two_ranks(tmp_path: Path) -> None:
    """Two ranks train as without evaluations, with BatchNorm and within accumulation windows."""
    first, second = (rank["while_training"] for rank in run_on_ranks(tmp_path, "while_training"))
    assert first["same"]
    assert second["same"]
    assert first["values"] == second["values"]
    assert len(first["values"]) == 10


def test_hook_contract() -> None:
    """The hook resumes at any step, changes no weights and reads nothing while evaluating."""
    loader = make_loader(2, rest=2)

    def make(loader: Any = loader) -> ValidationHook:
        every = "2 steps | 1 epoch"
        return validation(every, at_start=True, at_end=True, dataloaders={"val": loader})

    assert_state_round_trip(make, steps=7)
    assert_weights_unchanged(make, steps=7)
    # In each of 5 evaluations, NumPy's random state, on the host.
    assert_no_device_sync(lambda: make(list(loader)), steps=7, allowed=5)


class Zeros(PipelineHooks):
    """Hook whose weights are all zero, with a flag while applied."""

    def __init__(self) -> None:
        super().__init__()
        self.used = 0
        self.register_hook("on_loop", HookContext.from_callable(before=self.open))

    def open(self, args: PipelineHookArgs) -> None:
        self.model = args.model
        args.run.weight_sets[self.name] = self

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = [parameter.clone() for parameter in self.model.parameters()]
        try:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.zero_()
            self.used += 1
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), before, strict=True):
                    parameter.copy_(value)

    def weights(self) -> dict[str, torch.Tensor]:
        return {}


def test_weights_of_another_hook_are_evaluated() -> None:
    """The weights of the named hook are evaluated; training continues with its own."""
    plain, recorder, zeros = train(max_epoch=1), Recorder(), Zeros()
    plain()
    trainer = train(validation(weights="Zeros"), zeros, recorder, max_epoch=1)
    trainer()
    assert zeros.used == 1
    assert recorder.values[0].value == pytest.approx(0.6931472)  # all classes have equal scores
    assert equal([*plain.model.state_dict().values()], [*trainer.model.state_dict().values()])


def test_moving_average_is_evaluated() -> None:
    """The values are those of a model with the averaged weights."""
    ema, recorder = EMAConfig(decay=0.9)(), Recorder()
    averaged: dict[str, torch.Tensor] = {}
    after = PipelineHooks("after")

    @after.on_evaluation.after
    def note(args: PipelineHookArgs) -> None:
        averaged.update({n: v.clone() for n, v in args.run.weight_set("EMA").weights().items()})

    train(ema, validation(weights="EMA"), recorder, after, max_epoch=1)()
    model = make_normalised()
    model.load_state_dict(averaged)
    evaluator = Evaluator(model, Classify(), {"val": make_evaluation_loader(11)})
    assert evaluator.evaluate() == {"val/loss": recorder.values[0].value}


def test_unknown_weights_are_refused() -> None:
    """The error comes before the first step, lists known weights and names the hook."""
    trainer = train(validation(weights="Zero"), Zeros(), max_epoch=1)
    with pytest.raises(PipelineConfigError, match="did you mean 'Zeros'") as raised:
        trainer()
    assert "ValidationHook" in raised.value.__notes__[0]
    assert trainer.progress.global_step_id == 0


class Failing(Classify):
    """Batch processor that fails in the last batch of an evaluation."""

    def forward(self, model: Any, batch: Any) -> Any:
        if not model.training and len(batch["id"]) < 8:
            raise RuntimeError("out of memory")
        return super().forward(model, batch)


def test_error_restores_weights_and_modes() -> None:
    """The trained model is restored if an evaluation with other weights fails."""
    plain = train(max_step=5)
    plain()
    trainer = train(validation(weights="Zeros"), Zeros(), max_epoch=1, batch_processor=Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer()
    assert all(module.training for module in trainer.model.modules())
    assert equal([*plain.model.state_dict().values()], [*trainer.model.state_dict().values()])


def test_resumed_run_does_not_repeat_an_evaluation(tmp_path: Path) -> None:
    """An evaluation made at the step of the save is not repeated."""
    first, recorder = train(validation(), Recorder(), max_epoch=1), Recorder()
    first()
    first.save_checkpoint(tmp_path / "saved")
    hook = validation(at_start=True, at_end=True)
    resumed = train(hook, recorder, max_epoch=2, resume_from=tmp_path / "saved")
    asking = PipelineHooks("asking")
    asking.register_hook(
        "on_loop",
        HookContext.from_callable(
            before=lambda args: args.requests.evaluate("at the same step", by="asking")
        ),
    )
    resumed.hooks += asking
    resumed()
    assert [value.step for value in recorder.values] == [10]


def test_hook_unregisters_after_the_run() -> None:
    """After the run, the hook can't be asked for evaluations."""
    hook = validation()
    trainer = train(hook, max_epoch=1)
    trainer()
    assert trainer._run.evaluations == {}


class RowsLoader(DataLoader[Any]):
    """Loader built from a config."""

    def __init__(self, size: int) -> None:
        super().__init__(Rows(size), batch_size=8)


class RowsLoaderConfig(ClassConfig[RowsLoader]):
    class_type: type[RowsLoader] = RowsLoader
    size: int


class AccuracyConfig(ClassConfig[MulticlassAccuracy]):
    class_type: type[MulticlassAccuracy] = MulticlassAccuracy
    num_classes: int
    average: str = "micro"


@pytest.mark.parametrize("format_", FORMATS)
def test_hook_can_be_configured_completely(format_: Literal["json", "yaml", "toml"]) -> None:
    """Loaders and metrics are built from configs that round-trip in every format."""
    cfg = ValidationHookConfig(
        every=EverySteps(5) | EveryEpochs(1),
        dataloaders={"val": RowsLoaderConfig(size=11)},
        metrics={"accuracy": AccuracyConfig(num_classes=2)},
    )
    trust = (__name__, "torchmetrics")
    loaded = ValidationHookConfig.from_str(cfg.to_str(format_), format_, trust=trust)
    assert loaded == cfg
    given = train(validation(metrics=make_metrics()), max_epoch=1)
    given()
    built = train(loaded(), max_epoch=1)
    built()
    for name in ("eval/val/loss", "eval/val/accuracy"):
        assert given.metrics.last_value(name) == built.metrics.last_value(name) is not None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ValidationHookConfig()(), PipelineConfigError, "ValidationHook: dataloaders is"),
        (
            lambda: validation(dataloaders={"val": []}),
            DataError,
            r"ValidationHook: the evaluation loader dataloaders\['val'\] gave no batch",
        ),
        (
            lambda: ValidationHookConfig(dataloaders={"val": RowsLoaderConfig(size=3)})(
                dataloaders={"val": [1]}
            ),
            PipelineConfigError,
            "dataloaders is given to the hook and in its config",
        ),
        (lambda: ValidationHookConfig(seed=-1), ValueError, "seed"),
        (lambda: validation("1 moon"), ValueError, "can't read '1 moon' as a trigger"),
        (
            lambda: validation(metrics={"each": MulticlassAccuracy(2, average=None)}),
            TypeError,
            r"ValidationHook: the metric 'each' computes a Tensor of shape \(2,\)",
        ),
    ],
)
def test_invalid_arguments_are_refused_at_construction(
    make: Any, error: type[Exception], message: str
) -> None:
    """Each error names the hook or the field."""
    with pytest.raises(error, match=message):
        make()


def test_state_of_another_version_is_refused() -> None:
    """The error names the hook and both versions."""
    state: Mapping[str, Any] = {**validation().state_dict(), "version": 7}
    with pytest.raises(StateError, match="ValidationHook of version 1, found version 7"):
        validation().load_state_dict(state)


def test_duplicate_loader_names_are_refused() -> None:
    """Two hooks would publish the same metric, so the run does not begin."""
    one, two = validation(), validation()
    one.name, two.name = "raw", "averaged"
    with pytest.raises(
        PipelineConfigError, match=r"averaged: .*'val'.* a loader of raw would both"
    ):
        train(one, two, max_epoch=1)()


class Measured(Classify):
    """Batch processor whose evaluations have named values."""

    def evaluation_forward(self, model: Any, batch: Any) -> Any:
        outputs, loss = super().forward(model, batch)
        return outputs, {"loss": loss, "l1": (outputs[:, 0] - batch["target"]).abs().mean()}


def test_two_weight_sets_are_published_side_by_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Named values of raw and averaged weights are in JSON lines, progress and TensorBoard."""
    names = [f"eval/val/{w}/{v}" for w in ("raw", "ema") for v in ("loss", "l1", "accuracy")]
    hooks = [
        ProgressBarHookConfig(metrics=names, plain=True)(),
        MetricsLoggerConfig(
            every="1 epoch",
            sinks=[
                JsonLinesSinkConfig(path=str(tmp_path / "metrics.jsonl")),
                TrackerSinkConfig(trackers=["tensorboard"], folder=str(tmp_path)),
            ],
        )(),
        EMAConfig(decay=0.5)(),
        validation(
            weights={"raw": None, "ema": "EMA"},
            max_batches=1,
            metrics={"accuracy": MulticlassAccuracy(2, average="micro")},
        ),
    ]
    with caplog.at_level("INFO"):
        trainer = train(*hooks, batch_processor=Measured(), max_epoch=1)
        trainer()
    found = {name: trainer.metrics.latest(name) for name in names}
    assert found["eval/val/raw/l1"] != found["eval/val/ema/l1"]
    weights = {"raw": None, "ema": "EMA"}
    loaders = {"val": make_evaluation_loader(11)}
    expected = trainer.evaluate(loaders, weights=weights, max_batches=1)
    assert {n: found[n] for n in names if "accuracy" not in n} == {
        f"eval/{name}": value for name, value in expected.items()
    }
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {name: line["metrics"][name] for name in names} == found
    *_, shown = [text for text in caplog.messages if "epoch 1/1" in text]
    assert all(f"{name} {number_text(value)}" in shown for name, value in found.items())
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    for name, value in found.items():
        [scalar] = events.Scalars(name)
        assert (scalar.step, scalar.value) == (5, pytest.approx(value))


def test_hooks_with_named_weights_share_a_loader_name() -> None:
    """Two hooks evaluate one set under names of their own."""
    one = validation(weights={"raw": None}, max_batches={"val": 1})
    two = validation(weights={"ema": "EMA"})
    one.name, two.name = "one", "two"
    trainer = train(EMAConfig(decay=0.5)(), one, two, max_epoch=1)
    trainer()
    evaluated = [name for name in trainer.metrics.names() if name.startswith("eval/")]
    assert evaluated == ["eval/val/raw/loss", "eval/val/ema/loss"]


class Silent(Classify):
    """Batch processor that has no loss in an evaluation."""

    def evaluation_forward(self, model: Any, batch: Any) -> Any:
        return model(batch["inputs"]), None


@pytest.mark.parametrize(
    ("options", "processor", "error", "message"),
    [
        ({}, Silent(), PipelineConfigError, "ValidationHook: there is nothing to measure"),
        (
            {"weights": {"raw": None, "ema": "EMB"}},
            Classify(),
            PipelineConfigError,
            r"ValidationHook.weights.ema: .*'EMB' keeps weights; did you mean 'EMA'",
        ),
        (
            {"weights": "EMB", "at_start": True},
            Classify(),
            PipelineConfigError,
            r"ValidationHook.weights: .*'EMB' keeps weights",
        ),
        (
            {"sets": ["val"]},
            Measured(),
            UnknownMetricError,
            r"EarlyStopping.monitor: no hook is known to publish 'eval/val/l2'.* 'eval/val/l1'",
        ),
    ],
)
def test_mistakes_are_errors_before_the_first_step(
    options: dict[str, Any], processor: Any, error: type[Exception], message: str
) -> None:
    """Nothing to measure, unknown weights and unknown named values end the run at once."""
    stopping = EarlyStoppingConfig(monitor="eval/val/l2", mode="min", patience=1)()
    hooks = [EMAConfig()(), validation(**options), *([stopping] if "sets" in options else [])]
    trainer = train(*hooks, batch_processor=processor, max_epoch=1)
    with pytest.raises(error, match=message):
        trainer()
    assert trainer.progress.global_step_id == 0


def test_named_values_can_be_monitored_from_the_first_step() -> None:
    """Looking for the names changes neither weights nor random numbers of the training."""
    ends = []
    for processor in (Classify(), Measured()):
        stopping = EarlyStoppingConfig(monitor="eval/val/loss", mode="min", patience=9)()
        trainer = train(validation(), stopping, batch_processor=processor, max_epoch=1)
        trainer()
        assert stopping.best_step == 5
        ends.append([*trainer.model.state_dict().values(), torch.get_rng_state()])
    assert equal(*ends)


class Adversarial(SimpleBatchProcessor):
    """Named steps of two optimizers."""

    def forward(self, model: Any, batch: Any) -> Any:
        outputs = model["g"](batch["inputs"])
        yield "d", model["d"](outputs.detach()).square().mean()
        yield "g", (1 - model["d"](outputs)).square().mean()
        return outputs


@pytest.mark.parametrize("monitor", ["eval/val/loss/g", "eval/val/loss"])
def test_losses_of_several_optimizers_are_evaluated(monitor: str) -> None:
    """Losses by name are known before the first step, and an evaluation makes no update."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"g": torch.nn.Linear(4, 4), "d": torch.nn.Linear(4, 1)})
    trainer = HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        make_evaluation_loader(40),
        Adversarial(),
        {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in model.items()},
        hooks=[
            validation(max_batches=2),
            EarlyStoppingConfig(monitor=monitor, mode="min", patience=3),
        ],
        max_epoch=1,
    )
    if monitor == "eval/val/loss":
        with pytest.raises(UnknownMetricError, match=r"Published: .*eval/val/loss/d, eval/val/los"):
            trainer()
        return
    trainer()
    rows = make_evaluation_loader(11).dataset.inputs  # type: ignore[attr-defined]  # of Rows
    with torch.no_grad():
        judged = model["d"](model["g"](rows))
    expected = {"d": judged.square().mean(), "g": (1 - judged).square().mean()}
    for name, value in expected.items():
        found = trainer.metrics.last_value(f"eval/val/loss/{name}")
        assert found == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batches": 0}, "max_batches: expected a number of batches >= 1, found 0"),
        ({"max_batches": {"val": -1}}, "expected a number of batches >= 1, found -1"),
        ({"max_batches": {"vall": 1}}, "there is no loader 'vall'; did you mean 'val'"),
        ({"weights": {}}, "weights: expected names without '/'"),
        ({"weights": {"a/b": None}}, "weights: expected names without '/'"),
    ],
)
def test_wrong_limits_and_names_are_refused(options: dict[str, Any], message: str) -> None:
    """The error names the field, and comes when the hook is made."""
    with pytest.raises(ValueError, match=message):
        validation(**options)


@pytest.mark.parametrize(
    ("field", "kind"),
    [("metrics", "torchmetrics.metric:Metric"), ("dataloaders", "collections.abc:Iterable")],
)
def test_other_kinds_of_parts_are_refused_before_building(field: str, kind: str) -> None:
    """A file can't build a class that is not a metric or a loader in these fields."""
    document = {field: {"it": {"class_type": "fractions:Fraction", "numerator": 1}}}
    with pytest.raises(ConfigReferenceError) as refused:
        ValidationHookConfig.from_dict(document, trust="fractions")
    assert refused.value.location == f"{field}.it.class_type"
    assert f"expected a subclass of {kind}" in refused.value.problem
