"""torchmetrics metrics: states of parts and ranks, merged and computed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torchmetrics import (
    CatMetric,
    ExplainedVariance,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    R2Score,
    SpearmanCorrCoef,
)
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassConfusionMatrix,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.metrics import MetricsBoard, MetricValue, MetricValueError
from robo_orchard_lab.pipeline.metrics.exchange import reduce_states
from robo_orchard_lab.pipeline.metrics.torchmetrics import (
    MetricsLike,
    MetricsSnapshot,
    TorchMetrics,
)

# SpearmanCorrCoef warns that it keeps all samples.
pytestmark = pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save:UserWarning")

Pairs = tuple[torch.Tensor, torch.Tensor]


def classes(size: int = 65) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, 3, generator=generator), torch.arange(size) % 3


def numbers(size: int = 65) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, generator=generator)
    return inputs, inputs + torch.randn(size, generator=generator)


class Largest(Metric):
    """Metric whose state is reduced by a function."""

    value: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.tensor(-9.0), lambda stacked: stacked.max(0).values)

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.value = torch.maximum(self.value, preds.max())

    def compute(self) -> torch.Tensor:
        return self.value


class Elements(Metric):
    """Metric with a list of tensors of different shapes, a mean, and a stacked state.

    The stacked state gets its shape with the first update.
    """

    kept: list[torch.Tensor]
    mean: torch.Tensor
    columns: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", [], None)
        self.add_state("mean", torch.tensor(0.0), "mean")
        self.add_state("columns", torch.tensor(0.0), None)

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.kept += [preds[:1], target.max()]
        count = self.update_count
        self.mean = (self.mean * (count - 1) + preds.sum()) / count
        self.columns = self.columns + preds.sum(0)

    def compute(self) -> dict[str, float | torch.Tensor]:
        return {
            "count": float(len(self.kept)),
            "dims": float(sum(tensor.dim() for tensor in self.kept)),
            "sum": sum(float(tensor.sum()) for tensor in self.kept),
            "mean": self.mean,
            "columns": self.columns.sum() if self.columns.dim() else self.columns,
        }


def of_classes() -> MetricsLike:
    return {
        "accuracy": MulticlassAccuracy(3),
        "each": ClasswiseWrapper(MulticlassAccuracy(3, average=None)),
        "sum": MulticlassAccuracy(3) * 2 + MulticlassRecall(3),
        "range": MinMaxMetric(MulticlassAccuracy(3)),
        "largest": Largest(),
        "group": MetricCollection(
            [MulticlassAUROC(3), MulticlassAveragePrecision(3), MulticlassPrecision(3)],
            prefix="of_",
        ),
    }


def of_numbers() -> MetricsLike:
    return MetricCollection(
        [
            *(MeanSquaredError(), PearsonCorrCoef(), SpearmanCorrCoef()),
            *(ExplainedVariance(), R2Score()),
        ]
    )


def of_all_data(metrics: MetricsLike, data: Pairs) -> dict[str, float]:
    """Return the values that torchmetrics computes from all data at once."""
    named: dict[str, Any] = {"": metrics} if isinstance(metrics, MetricCollection) else {**metrics}
    values = {}
    for name, metric in named.items():
        metric.update(*data)
        result = metric.compute()
        for key, value in (result if isinstance(result, dict) else {"": result}).items():
            values["/".join(filter(None, (name, key)))] = float(value)
    return values


def batches(data: Pairs) -> list[Pairs]:
    return [
        (data[0][begin : begin + 8], data[1][begin : begin + 8])
        for begin in range(0, len(data[0]), 8)
    ]


def reduced(snapshots: Sequence[MetricsSnapshot]) -> dict[str, float]:
    """Return the values that each rank computes from the states of all ranks."""
    states = [snapshot.states() for snapshot in snapshots]
    tensors = [[tensor for tensor, _ in own] for own in states]
    reduced = reduce_states(tensors, [reduce for _, reduce in states[0]])
    found = [dict(snapshot.values(reduced)) for snapshot in snapshots]
    assert all(str(values) == str(found[0]) for values in found)
    return found[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [7, 64, 65])
@pytest.mark.parametrize(
    ("make", "data"), [(of_classes, classes), (of_numbers, numbers)], ids=["classes", "numbers"]
)
def test_states_of_all_ranks_give_values_of_all_data(
    make: Callable[[], MetricsLike], data: Callable[[int], Pairs], size: int, ranks: int
) -> None:
    """Holds for every reduction, in compute groups, and if some ranks have no batch."""
    sets = [TorchMetrics(make()) for _ in range(ranks)]
    for index, batch in enumerate(batches(data(size))):
        sets[index % ranks].update(*batch)
    found = reduced([metrics.snapshot(metrics.pop_states()) for metrics in sets])
    assert found == pytest.approx(of_all_data(make(), data(size)), rel=1e-4)
    assert sets[0].names() == list(found)


@pytest.mark.parametrize("ranks", [1, 2, 3])  # of three, one has no batch
def test_list_states_are_not_concatenated(ranks: int) -> None:
    """A list without reduction keeps its elements; a mean is weighted by updates."""
    sets = [TorchMetrics({"x": Elements()}) for _ in range(ranks)]
    data = batches(classes(20))
    for index, batch in enumerate(data):
        sets[0 if index < 2 else -1].update(*batch)
    found = reduced([metrics.snapshot(metrics.pop_states()) for metrics in sets])
    assert found["x/count"] == 6
    assert found["x/dims"] == 6
    assert found["x/mean"] == pytest.approx(sum(float(p.sum()) for p, _ in data) / 3)
    assert found["x/columns"] == pytest.approx(sum(float(p.sum()) for p, _ in data))
    expected = sum(float(p[:1].sum()) + float(t.max()) for p, t in data)
    assert found["x/sum"] == pytest.approx(expected)


def test_pop_states_resets_metrics() -> None:
    """A snapshot keeps its values during later updates, and can be read twice."""
    metrics = TorchMetrics(of_classes())
    first, second = classes(10), classes(30)
    metrics.update(*first)
    snapshot = metrics.snapshot(metrics.pop_states(), "a/", "_b")
    metrics.update(*second)
    expected = {f"a/{n}_b": v for n, v in of_all_data(of_classes(), first).items()}
    assert reduced([snapshot]) == reduced([snapshot]) == pytest.approx(expected)
    assert reduced([metrics.snapshot(metrics.pop_states())]) == pytest.approx(
        of_all_data(of_classes(), second)
    )


def test_given_metrics_are_not_changed() -> None:
    """A metric may be given twice and used elsewhere."""
    accuracy = MulticlassAccuracy(3)
    accuracy.update(*classes(10))
    one, two = TorchMetrics({"a": accuracy}), TorchMetrics({"a": accuracy})
    one.update(*classes(20))
    assert (
        two.snapshot(two.pop_states()).values(
            [t for t, _ in two.snapshot(two.pop_states()).states()]
        )
        == {}
    )
    assert accuracy.update_count == 1


def test_shared_state_is_packed_once() -> None:
    """Metrics of a compute group share their states."""
    data = classes(64)

    def bytes_of(*metrics: Metric) -> int:
        collection = TorchMetrics(MetricCollection(list(metrics)))
        for batch in batches(data):
            collection.update(*batch)
        _, packed = (t for t, _ in collection.snapshot(collection.pop_states()).states())
        return len(packed)

    assert bytes_of(MulticlassAUROC(3), MulticlassAveragePrecision(3)) == bytes_of(
        MulticlassAUROC(3)
    )


def test_mergeable_states_are_merged() -> None:
    """Two parts give the value of both if torchmetrics can merge states."""
    metrics = TorchMetrics(
        {
            "accuracy": MulticlassAccuracy(3),
            "auroc": MulticlassAUROC(3),
            "largest": Largest(),
            "sum": MulticlassAccuracy(3) + 1,
        }
    )
    mergeable, others = metrics.select(mergeable=True), metrics.select(mergeable=False)
    assert (mergeable.names(), others.names()) == (
        ["accuracy", "auroc", "auroc/*"],
        ["largest", "sum"],
    )
    data = classes(40)
    parts = [mergeable.pop_states()]  # no updates
    for batch in batches(data):
        mergeable.update(*batch)
        parts.append(mergeable.pop_states())
    expected = of_all_data({"accuracy": MulticlassAccuracy(3), "auroc": MulticlassAUROC(3)}, data)
    assert reduced([mergeable.snapshot(mergeable.merge(parts))]) == pytest.approx(expected)


def test_resume_restores_metric_states() -> None:
    """Restored metrics compute the values of uninterrupted ones."""
    data = batches(classes(40))
    uninterrupted, resumed = TorchMetrics(of_classes()), TorchMetrics(of_classes())
    for batch in data[:3]:
        uninterrupted.update(*batch)
    resumed.load_state_dict(uninterrupted.state_dict())
    for batch in data[3:]:
        uninterrupted.update(*batch)
        resumed.update(*batch)
    values = [
        reduced([metrics.snapshot(metrics.pop_states())]) for metrics in (uninterrupted, resumed)
    ]
    assert values[0] == values[1]


def test_state_of_other_metrics_is_refused() -> None:
    """The error lists the states; an unknown version is named."""
    state = TorchMetrics({"a": MulticlassAccuracy(3)}, "MetricTracker").state_dict()
    with pytest.raises(StateError, match="the saved metrics of MetricTracker differ"):
        TorchMetrics({"a": MulticlassAUROC(3)}, "MetricTracker").load_state_dict(state)
    with pytest.raises(StateError, match="version 1, found version 9"):
        TorchMetrics({}).load_state_dict({**state, "version": 9})


def test_keyword_arguments_are_filtered() -> None:
    """Metrics with different signatures are updated from one mapping."""
    metrics = TorchMetrics(
        {"mean": MeanMetric(), "group": MetricCollection([MulticlassAccuracy(3, average="micro")])}
    )
    metrics.update(value=torch.tensor(2.0), preds=torch.tensor([0, 1]), target=torch.tensor([0, 0]))
    assert reduced([metrics.snapshot(metrics.pop_states())]) == {
        "mean": 2.0,
        "group/MulticlassAccuracy": 0.5,
    }


class RandomValue(Metric):
    """Metric that computes a random number."""

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None: ...

    def compute(self) -> torch.Tensor:
        return torch.rand(())


def test_random_metrics_agree_on_all_ranks() -> None:
    """Computing restores the RNG state, and gives every rank the same number."""
    values = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        metrics = TorchMetrics({"random": RandomValue()})
        metrics.update(*classes(3))
        values.append(reduced([metrics.snapshot(metrics.pop_states())]))
        assert torch.equal(torch.get_rng_state(), before)
    assert values[0] == values[1]


def test_mapping_names_are_known_after_first_value() -> None:
    """Before, ``name/*`` stands for all names, so that subscribers are called in time."""

    class Late(Elements):
        def compute(self) -> dict[str, float | torch.Tensor]:
            if not self.kept:
                raise ValueError("needs data")
            return {"a": 1.0, "b": 2.0}

    metrics = TorchMetrics({"late": Late()})
    board = MetricsBoard()
    received: list[MetricValue] = []
    board.listen(lambda record: None)
    board.subscribe("eval/val/late/b", received.append)
    metrics.update(*classes(3))
    snapshot = metrics.snapshot(metrics.pop_states(), "eval/val/")
    assert snapshot.names() == ["eval/val/late", "eval/val/late/*"]
    board.defer(snapshot)
    board.flush(log=False)
    assert [(value.name, value.value) for value in received] == [("eval/val/late/b", 2.0)]
    assert metrics.names() == ["late/a", "late/b"]


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        (MeanMetric(), PipelineConfigError, "must be a mapping from names .* got MeanMetric"),
        (
            {"a": "mean"},
            PipelineConfigError,
            r"Hook: metrics\['a'\] must be a torchmetrics metric, got str",
        ),
        ({"": MeanMetric()}, PipelineConfigError, "metric names must be non-empty"),
        (
            {"each": MulticlassAccuracy(3, average=None)},
            MetricValueError,
            r"Hook: the metric 'each' computes a Tensor of shape \(3,\); .*\(average='macro'\)",
        ),
        (
            {"group": MetricCollection([MulticlassConfusionMatrix(2)])},
            MetricValueError,
            r"metric 'group/MulticlassConfusionMatrix' computes a Tensor of shape \(2, 2\)",
        ),
    ],
)
def test_invalid_metrics_are_refused_at_construction(
    metrics: Any, error: type[Exception], message: str
) -> None:
    """Each error names the owner, the metric and the remedy."""
    with pytest.raises(error, match=message):
        TorchMetrics(metrics, "Hook")


def test_non_scalar_value_is_refused_when_computed() -> None:
    """A metric whose shape is unknown before its first update is refused when computed."""
    metrics = TorchMetrics({"all": CatMetric()}, "Hook")
    metrics.update(torch.ones(4))
    with pytest.raises(MetricValueError, match=r"Hook: the metric 'all' .* of shape \(4,\)"):
        reduced([metrics.snapshot(metrics.pop_states())])


def test_error_of_metric_has_note() -> None:
    """An error during compute gets a note with the name of the metric."""
    metrics = TorchMetrics({"r2": R2Score()}, "Hook")
    metrics.update(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="at least two samples") as raised:
        reduced([metrics.snapshot(metrics.pop_states())])
    assert raised.value.__notes__ == ["while Hook computed the metric 'r2'"]


def test_non_tensor_state_is_refused() -> None:
    """The error names the state that holds strings."""

    class Texts(Elements):
        def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
            self.kept.append("text")  # type: ignore[arg-type]  # the point of the test

    metrics = TorchMetrics({"texts": Texts()}, "Hook")
    metrics.update(*classes(1))
    with pytest.raises(MetricValueError, match="Hook: the state 'kept' of Texts holds a str"):
        metrics.pop_states()


def test_torchmetrics_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without metrics nothing imports torchmetrics; the error has the install command."""
    metric = MeanMetric()
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert len(TorchMetrics(None)) == len(TorchMetrics({})) == 0
    with pytest.raises(PipelineConfigError, match=r'install "robo-orchard-hooks\[metrics\]"'):
        TorchMetrics({"mean": metric})


def test_nan_is_a_value() -> None:
    """Some metrics return NaN for too little data."""
    metrics = TorchMetrics({"pearson": PearsonCorrCoef()})
    metrics.update(torch.ones(2), torch.ones(2))
    with pytest.warns(UserWarning, match="close to zero"):
        found = reduced([metrics.snapshot(metrics.pop_states())])
    assert math.isnan(found["pearson"])
