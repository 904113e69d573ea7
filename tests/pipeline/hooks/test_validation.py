"""Evaluations within a training, which goes on as if there were none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
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
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import DataError, PipelineConfigError, StateError
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks.ema import EMAConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.hooks.validation import ValidationHook, ValidationHookConfig
from robo_orchard_lab.pipeline.metrics import MetricValue
from robo_orchard_lab.pipeline.trigger import EveryEpochs, EverySteps, Trigger
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from tiny import equal, make_loader, make_trainer

FORMATS: tuple[Literal["json", "yaml", "toml"], ...] = ("json", "yaml", "toml")


class Told(PipelineHooks):
    """Writes down the steps at which something was evaluated, and the values of a name."""

    def __init__(self, name: str = "eval/val/loss") -> None:
        super().__init__()
        self.evaluated: list[tuple[str | None, int]] = []
        self.values: list[MetricValue] = []

        @self.on_loop.before
        def subscribe(args: PipelineHookArgs) -> None:
            args.metrics.subscribe(name, self.values.append, who="Told")

        @self.on_evaluation.before
        def note(args: PipelineHookArgs) -> None:
            self.evaluated.append((args.evaluation, args.progress.steps_done))

    @property
    def steps(self) -> list[int]:
        return [step for _, step in self.evaluated]


def train(*hooks: PipelineHooks, **options: Any) -> HookBasedTrainer:
    """A trainer with 5 steps to an epoch, batch statistics and dropout."""
    defaults = {
        "model": make_normalised(),
        "loader": make_evaluation_loader(40, shuffle=True),
        "batch_processor": Classify(),
    }
    trainer = make_trainer(hooks, **{**defaults, **options})
    torch.manual_seed(9)
    return trainer


def validation(every: str | None = "1 epoch", **options: Any) -> ValidationHook:
    schedule = None if every is None else Trigger.parse(every)
    dataloaders = options.pop("dataloaders", {"val": make_evaluation_loader(11)})
    live = {name: options.pop(name) for name in ("metrics", "metric_inputs") if name in options}
    return ValidationHookConfig(every=schedule, **options)(dataloaders=dataloaders, **live)


def test_it_evaluates_on_the_sets_that_are_named() -> None:
    """Of the loaders that it is given, in the order of their names there."""
    loaders = {name: make_evaluation_loader(11) for name in ("a", "b", "c")}
    trainer = train(validation(dataloaders=loaders, sets=["c", "a"]), max_epoch=1)
    trainer()
    evaluated = [name for name in trainer.metrics.names() if name.startswith("eval/")]
    assert sorted(evaluated) == ["eval/a/loss", "eval/c/loss"]
    with pytest.raises(PipelineConfigError, match=r"sets names 'vall', .*; did you mean 'val'\?"):
        validation(sets=["vall"])
    with pytest.raises(PipelineConfigError, match=r"sets names 'x', .* loaders: a, b, c"):
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
def test_it_evaluates_on_its_schedule(options: dict[str, Any], steps: list[int]) -> None:
    """At the start, at the end and in between, once at each step; someone who waits is told."""
    told = Told() if steps else PipelineHooks("nobody")
    train(validation(**options), told, max_step=12)()
    if isinstance(told, Told):
        assert told.steps == steps
        assert [value.step for value in told.values] == steps


def test_it_evaluates_what_it_is_asked_for() -> None:
    """Any hook asks for one evaluation by name, or for all; at one step each is made once."""
    asking = PipelineHooks("asking")

    @asking.on_step.after(when="at steps 2, 4")
    def ask(args: PipelineHookArgs) -> None:
        name = "one" if args.global_step_id == 1 else None
        args.requests.evaluate("because", name=name)
        args.requests.evaluate("once more", name=name)

    one = validation("4 steps", dataloaders={"val": make_evaluation_loader(11)})
    two = validation(None, dataloaders={"second": make_evaluation_loader(11)})
    one.name, two.name = "one", "two"
    told = Told()
    train(one, two, asking, told, max_step=4)()
    assert told.evaluated == [("one", 2), ("one", 4), ("two", 4)]


def test_it_is_not_made_again_at_the_same_step() -> None:
    """Data without a length ends an epoch at a step of its own, whose evaluation was made."""
    told = Told()
    stream = DataLoader(Stream(40), batch_size=8)
    train(validation("5 steps | 1 epoch"), told, loader=stream, max_epoch=2)()
    assert told.steps == [5, 10]
    assert [value.step for value in told.values] == [5, 10]


def test_values_are_those_of_an_evaluator() -> None:
    """Loss and metrics of each loader are published for the step at which they were found."""
    loaders = {"small": make_evaluation_loader(3), "large": make_evaluation_loader(65)}
    hook = validation(dataloaders=loaders, metrics=make_metrics())
    trainer = train(hook, max_epoch=1)
    trainer()
    expected = Evaluator(trainer.model, Classify(), loaders, metrics=make_metrics()).evaluate()
    found = {name: trainer.metrics.last_value(f"eval/{name}") for name in expected}
    assert found == expected
    assert len(found) == 10


def noisy() -> dict[str, Any]:
    """Loaders that draw an order and augmentation."""
    return {
        "plain": DataLoader(Rows(20, noise=0.3), batch_size=8, shuffle=True),
        "own": DataLoader(
            Rows(20, noise=0.3), batch_size=8, shuffle=True, generator=torch.Generator()
        ),
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_goes_on_as_if_there_were_none(accumulate: int) -> None:
    """Shuffled, augmented evaluations in the middle leave weights, buffers and draws as they are.

    The frozen part of the model, in evaluation mode, stays so.
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


def test_two_ranks_go_on_as_if_there_were_none(tmp_path: Path) -> None:
    """Also with batch statistics that differ between ranks, within an accumulation window."""
    first, second = (rank["while_training"] for rank in run_on_ranks(tmp_path, "while_training"))
    assert first["same"]
    assert second["same"]
    assert first["values"] == second["values"]
    assert len(first["values"]) == 10


def test_it_keeps_what_a_hook_promises() -> None:
    """It can be stopped anywhere, changes no weights, and reads nothing while it evaluates."""
    loader = make_loader(2, rest=2)

    def make(loader: Any = loader) -> ValidationHook:
        every = "2 steps | 1 epoch"
        return validation(every, at_start=True, at_end=True, dataloaders={"val": loader})

    assert_state_round_trip(make, steps=7)
    assert_weights_unchanged(make, steps=7)
    # Once in each of 5 evaluations, NumPy's random state, which lies on the host.
    assert_no_device_sync(lambda: make(list(loader)), steps=7, allowed=5)


class Zeros(PipelineHooks):
    """Keeps weights that are all zero, and says when they are in use."""

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


def test_other_weights_are_evaluated() -> None:
    """With the weights that another hook keeps; training goes on with its own."""
    plain, told, zeros = train(max_epoch=1), Told(), Zeros()
    plain()
    trainer = train(validation(weights="Zeros"), zeros, told, max_epoch=1)
    trainer()
    assert zeros.used == 1
    assert told.values[0].value == pytest.approx(0.6931472)  # as all classes are alike to it
    assert equal([*plain.model.state_dict().values()], [*trainer.model.state_dict().values()])


def test_the_moving_average_is_evaluated() -> None:
    """The values are those of a model with the averaged weights."""
    ema, told = EMAConfig(decay=0.9)(), Told()
    averaged: dict[str, torch.Tensor] = {}
    after = PipelineHooks("after")

    @after.on_evaluation.after
    def note(args: PipelineHookArgs) -> None:
        averaged.update({n: v.clone() for n, v in args.run.weight_set("EMA").weights().items()})

    train(ema, validation(weights="EMA"), told, after, max_epoch=1)()
    model = make_normalised()
    model.load_state_dict(averaged)
    evaluator = Evaluator(model, Classify(), {"val": make_evaluation_loader(11)})
    assert evaluator.evaluate() == {"val/loss": told.values[0].value}


def test_weights_that_nobody_keeps_are_refused_ahead_of_the_first_step() -> None:
    """The error lists those that there are, and names the hook that asks for them."""
    trainer = train(validation(weights="Zero"), Zeros(), max_epoch=1)
    with pytest.raises(PipelineConfigError, match="did you mean 'Zeros'") as raised:
        trainer()
    assert "ValidationHook" in raised.value.__notes__[0]
    assert trainer.progress.global_step_id == 0


class Failing(Classify):
    """Fails in the last batch of an evaluation."""

    def forward(self, model: Any, batch: Any) -> Any:
        if not model.training and len(batch["id"]) < 8:
            raise RuntimeError("out of memory")
        return super().forward(model, batch)


def test_an_error_leaves_weights_and_modes_as_they_were() -> None:
    """When an evaluation with other weights fails, the model is the one that was trained."""
    plain = train(max_step=5)
    plain()
    trainer = train(validation(weights="Zeros"), Zeros(), max_epoch=1, batch_processor=Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer()
    assert all(module.training for module in trainer.model.modules())
    assert equal([*plain.model.state_dict().values()], [*trainer.model.state_dict().values()])


def test_an_evaluation_is_not_made_again_by_a_resumed_run(tmp_path: Path) -> None:
    """What was evaluated at the step of the save is not evaluated there once more."""
    first, told = train(validation(), Told(), max_epoch=1), Told()
    first()
    first.save_checkpoint(tmp_path / "saved")
    hook = validation(at_start=True, at_end=True)
    resumed = train(hook, told, max_epoch=2, resume_from=tmp_path / "saved")
    asking = PipelineHooks("asking")
    asking.register_hook(
        "on_loop",
        HookContext.from_callable(
            before=lambda args: args.requests.evaluate("at the same step", by="asking")
        ),
    )
    resumed.hooks += asking
    resumed()
    assert [value.step for value in told.values] == [10]


def test_nothing_can_be_evaluated_after_the_run() -> None:
    """The hook takes itself out of the run that it was in."""
    hook = validation()
    trainer = train(hook, max_epoch=1)
    trainer()
    assert trainer._run.evaluations == {}


class RowsLoader(DataLoader[Any]):
    """A loader that is made from a configuration."""

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
def test_all_of_it_can_come_from_a_file(format_: Literal["json", "yaml", "toml"]) -> None:
    """Loaders and metrics are built from configurations that survive every format."""
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
            "dataloaders are given to the hook and in its configuration",
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
def test_wrong_arguments_are_refused_at_construction(
    make: Any, error: type[Exception], message: str
) -> None:
    """Each error names the hook or the field."""
    with pytest.raises(error, match=message):
        make()


def test_a_state_of_another_version_is_refused() -> None:
    """An unknown one is named."""
    state: Mapping[str, Any] = {**validation().state_dict(), "version": 7}
    with pytest.raises(StateError, match=r"ValidationHook: .* version 1, found version 7"):
        validation().load_state_dict(state)


def test_two_hooks_with_one_loader_name_are_refused() -> None:
    """Both would publish under one name, so the run does not begin."""
    one, two = validation(), validation()
    one.name, two.name = "raw", "averaged"
    with pytest.raises(PipelineConfigError, match=r"averaged: dataloaders\['val'\] .* raw has as"):
        train(one, two, max_epoch=1)()


@pytest.mark.parametrize(
    ("field", "kind"),
    [("metrics", "torchmetrics.metric:Metric"), ("dataloaders", "collections.abc:Iterable")],
)
def test_what_builds_something_else_is_refused_before_it_is_built(field: str, kind: str) -> None:
    """A document can't have a class called that makes no metric, or no loader, in their places."""
    document = {field: {"it": {"class_type": "fractions:Fraction", "numerator": 1}}}
    with pytest.raises(ConfigReferenceError) as refused:
        ValidationHookConfig.from_dict(document, trust="fractions")
    assert refused.value.place == f"{field}.it.class_type"
    assert f"expected a subclass of {kind}" in refused.value.problem
