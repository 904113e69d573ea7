"""Metrics of the training data, per logging window and per epoch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision

from evaluate_on_ranks import Classify, make_evaluation_loader, make_metrics, run_on_ranks
from robo_orchard_core.utils.config import ClassConfig
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.hooks.metric_tracker import MetricTracker, MetricTrackerConfig
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from tiny import make_trainer

Inputs = dict[str, torch.Tensor]


class Notes(PipelineHooks):
    """Hook that logs on a trigger, and records logged values and metric inputs."""

    def __init__(self, when: str | None = "3 steps") -> None:
        super().__init__()
        self.inputs: list[Inputs] = []
        self.values: dict[str, dict[int, float]] = {}

        @self.on_loop.before
        def listen(args: PipelineHookArgs) -> None:
            args.metrics.listen(self.note)

        @self.on_batch.after
        def gather(args: PipelineHookArgs) -> None:
            processor = args.batch_processor
            if isinstance(processor, Classify):
                self.inputs.append(processor.metric_inputs(args.model_outputs.detach(), args.batch))

        if when is not None:

            @self.on_step.after(when=when)
            def log(args: PipelineHookArgs) -> None:
                args.requests.log("it is time")

    def note(self, record: MetricsRecord) -> None:
        for step, values in record.by_step().items():
            for name, value in values.items():
                self.values.setdefault(name, {})[step] = value


def train(*hooks: PipelineHooks, **options: Any) -> None:
    """Train with 5 batches per epoch, the last one short."""
    options = {"loader": make_evaluation_loader(36, shuffle=True), "max_step": 12, **options}
    make_trainer(hooks, batch_processor=Classify(), **options)()


def value_of(name: str, inputs: list[Inputs]) -> float:
    metric = make_metrics()[name]
    keys = ("score", "truth") if name in ("squared_error", "correlation") else ("preds", "target")
    metric.update(*(torch.cat([batch[key] for batch in inputs]) for key in keys))
    return float(metric.compute())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_windows_and_epochs_are_separate(accumulate: int) -> None:
    """Both equal torchmetrics over all their batches, in any alignment."""
    notes = Notes()
    tracker = MetricTrackerConfig()(metrics=make_metrics())
    train(tracker, notes, accumulate=accumulate)
    windows = {3: (0, 3), 6: (3, 6), 9: (6, 9), 12: (9, 12)}
    epochs = {5: (0, 5), 10: (5, 10)}
    assert set(notes.values) == {
        f"train/{n}{end}" for n in make_metrics() for end in ("", "_epoch")
    }
    for name in make_metrics():
        for suffix, spans in (("", windows), ("_epoch", epochs)):
            expected = {s: value_of(name, notes.inputs[a:b]) for s, (a, b) in spans.items()}
            found = notes.values[f"train/{name}{suffix}"]
            assert found == pytest.approx(expected, rel=1e-4), name


def test_values_are_over_all_ranks(tmp_path: Path) -> None:
    """Windows and epochs cover the batches of both ranks, on both ranks."""
    ranks = [rank["tracked"] for rank in run_on_ranks(tmp_path, "tracked")]
    assert ranks[0]["records"] == ranks[1]["records"]
    batches = list(zip(*(rank["batches"] for rank in ranks), strict=True))

    def values(begin: int, end: int, suffix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("accuracy", "auroc"):
            metric = make_metrics()[name]
            for preds, target in (batch for both in batches[begin:end] for batch in both):
                metric.update(torch.tensor(preds), torch.tensor(target))
            found[f"train/{name}{suffix}"] = pytest.approx(float(metric.compute()), rel=1e-5)
        return found

    assert ranks[0]["records"] == [
        {"2": values(0, 2)},
        {"3": values(0, 3, "_epoch"), "4": values(2, 4)},
        {"6": {**values(4, 6), **values(3, 6, "_epoch")}},
    ]


class Counted(MeanSquaredError):  # noqa: N818 - no exception
    """Metric that counts the updates of all copies."""

    updates = 0

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        type(self).updates += 1
        assert not preds.requires_grad
        super().update(preds, target)


class CountedApart(Counted):
    """Metric whose updates may depend on earlier ones."""

    full_state_update = True


def test_step_makes_one_update() -> None:
    """Metrics that can't be merged need two, unless epochs are not tracked."""
    for each_epoch in (True, False):
        Counted.updates = CountedApart.updates = 0
        notes = Notes()
        tracker = MetricTrackerConfig(each_epoch=each_epoch)(
            metrics={"one": Counted(), "two": CountedApart()},
            metric_inputs=lambda outputs, batch: (outputs[:, 0], batch["inputs"][:, 0]),
        )
        train(tracker, notes)
        assert Counted.updates == 12
        assert CountedApart.updates == (24 if each_epoch else 12)
        assert notes.values["train/one"] == pytest.approx(notes.values["train/two"])
        assert ("train/one_epoch" in notes.values) is each_epoch


def pair_metrics() -> MetricTracker:
    """Return mergeable and non-mergeable metrics for the test kit's regression."""
    return MetricTrackerConfig()(metrics={"error": MeanSquaredError(), "apart": CountedApart()})


def sample_metric() -> MetricTracker:
    """Return a metric that keeps all samples."""
    return MetricTrackerConfig()(
        metrics={"auroc": MulticlassAUROC(2, validate_args=False)},
        metric_inputs=lambda outputs, batch: (outputs.softmax(1), torch.arange(len(outputs)) % 2),
    )


@pytest.mark.parametrize("make", [pair_metrics, sample_metric])
@pytest.mark.parametrize("log_every", ["1 step | 1 epoch", "3 steps", None])
def test_hook_contract(make: Any, log_every: str | None) -> None:
    """The hook resumes within a window and an epoch, and changes no weights."""
    assert_state_round_trip(make, steps=9, stop_at=(1, 4, 5, 7), log_every=log_every)
    assert_weights_unchanged(make, steps=9, log_every=log_every)


def test_hook_reads_no_tensors() -> None:
    """Between logging points nothing is read, except by a metric itself."""
    accuracy = MulticlassAccuracy(2, average="micro", validate_args=False)

    def of_classes() -> MetricTracker:
        return MetricTrackerConfig()(
            metrics={"accuracy": accuracy},
            metric_inputs=lambda outputs, batch: (outputs, batch[1].argmax(1)),
        )

    for make in (pair_metrics, of_classes):
        assert_no_device_sync(make, steps=9, log_every="3 steps")


def test_collection_names_its_metrics() -> None:
    """The keys of a collection are the names, after the collection's own name if given."""
    collection = MetricCollection([MulticlassAccuracy(2), MulticlassPrecision(2)], prefix="my_")
    notes = Notes("5 steps")
    given = MetricTrackerConfig()(metrics=collection)
    named = MetricTrackerConfig()(metrics={"all": collection})
    named.name = "named"
    train(given, named, notes, max_step=5)
    names = ["my_MulticlassAccuracy", "my_MulticlassPrecision"]
    expected = [
        f"train/{part}{n}{end}" for part in ("", "all/") for n in names for end in ("", "_epoch")
    ]
    assert sorted(notes.values) == sorted(expected)
    assert len({str(values) for values in notes.values.values()}) == 2


def test_epoch_values_reach_subscribers() -> None:
    """Epoch values arrive with the logging point after the epoch."""
    received: list[MetricValue] = []
    hooks = PipelineHooks("waiting")

    @hooks.on_loop.before
    def wait(args: PipelineHookArgs) -> None:
        args.metrics.subscribe("train/accuracy_epoch", received.append, who="waiting")

    tracker = MetricTrackerConfig()(metrics={"accuracy": MulticlassAccuracy(2)})
    train(tracker, hooks, Notes("2 steps"))
    assert [value.step for value in received] == [5, 10]


class AccuracyConfig(ClassConfig[MulticlassAccuracy]):
    class_type: type[MulticlassAccuracy] = MulticlassAccuracy
    num_classes: int
    average: str = "micro"


def test_metrics_can_be_configured() -> None:
    """Metrics are built from configs."""
    cfg = MetricTrackerConfig(metrics={"accuracy": AccuracyConfig(num_classes=2)})
    loaded = MetricTrackerConfig.from_str(
        cfg.to_str("yaml"), "yaml", trust=(__name__, "torchmetrics")
    )
    assert loaded == cfg
    notes, given = Notes(), Notes()
    torch.manual_seed(0)
    train(loaded(), notes)
    torch.manual_seed(0)
    train(MetricTrackerConfig()(metrics={"accuracy": make_metrics()["accuracy"]}), given)
    assert notes.values == given.values
    assert len(notes.values["train/accuracy"]) == 4


def test_invalid_arguments_are_refused_at_construction() -> None:
    """Each error names the hook and the field."""
    with pytest.raises(PipelineConfigError, match="MetricTracker: metrics is empty"):
        MetricTrackerConfig()()
    with pytest.raises(PipelineConfigError, match="MetricTracker: metrics is empty"):
        MetricTrackerConfig()(metrics={})
    with pytest.raises(PipelineConfigError, match="MetricTracker: metrics must be a mapping"):
        MetricTrackerConfig()(metrics=MeanSquaredError())
    cfg = MetricTrackerConfig(metrics={"accuracy": AccuracyConfig(num_classes=2)})
    with pytest.raises(PipelineConfigError, match="metrics is given to the hook and in its"):
        cfg(metrics=make_metrics())
    cfg = MetricTrackerConfig(metric_inputs=logits_of_class_one)
    with pytest.raises(PipelineConfigError, match="metric_inputs is given to the hook and in its"):
        cfg(metrics=make_metrics(), metric_inputs=logits_of_class_one)


def logits_of_class_one(outputs: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs[:, 1], batch["target"].float()


def test_metric_inputs_can_be_configured() -> None:
    """A configured function works like a passed one, and round-trips."""
    configured = MetricTrackerConfig(metric_inputs=logits_of_class_one)
    loaded = MetricTrackerConfig.from_str(
        configured.to_str("yaml"), "yaml", trust=[logits_of_class_one.__module__]
    )
    assert loaded == configured
    values = []
    for make in (loaded, partial(MetricTrackerConfig(), metric_inputs=logits_of_class_one)):
        notes = Notes()
        torch.manual_seed(0)
        train(make(metrics={"error": MeanSquaredError()}), notes)
        values.append(notes.values)
    assert values[0] == values[1]
    assert values[0]


def test_missing_metric_inputs_are_refused() -> None:
    """A batch that is not a pair needs metric inputs; the error names the method to define."""
    tracker = MetricTrackerConfig()(metrics={"error": MeanSquaredError()})
    trainer = make_trainer(
        [tracker],
        loader=[(torch.zeros(2, 4), torch.zeros(2, 2), 0)],
        batch_processor=Triple(),
        max_step=1,
    )
    with pytest.raises(PipelineConfigError, match=r"MetricTracker: expected .* of length 3; def"):
        trainer()


class Triple(Classify):
    """Batch processor for batches of three, without metric inputs."""

    metric_inputs = None  # type: ignore[assignment]  # as if it had none

    def forward(self, model: Any, batch: Any) -> Any:
        outputs = model(batch[0])
        return outputs, torch.nn.functional.mse_loss(outputs, batch[1])


def test_state_of_another_version_is_refused() -> None:
    """The error names the hook and both versions."""
    state = {**pair_metrics().state_dict(), "version": 7}
    with pytest.raises(StateError, match="MetricTracker of version 1, found version 7"):
        pair_metrics().load_state_dict(state)


@pytest.mark.parametrize("logs", [None, "7 steps"])
def test_subscribers_receive_values_at_epoch_end(logs: str | None) -> None:
    """Values arrive also with rare or no logging points, the last epoch included."""
    received: list[int] = []
    waits = PipelineHooks("waits")

    @waits.on_loop.before
    def subscribe(args: PipelineHookArgs) -> None:
        args.metrics.subscribe(
            "train/squared_error_epoch", lambda v: received.append(v.step), "waits"
        )

    hooks = [waits, MetricTrackerConfig()(metrics=make_metrics())]
    train(*hooks, *([Notes(logs)] if logs is not None else []), max_step=15)
    assert received == [5, 10, 15]
