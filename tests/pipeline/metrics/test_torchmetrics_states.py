"""Metrics of torchmetrics, gathered in parts and computed from the states of all of them."""

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

# All samples are kept for it, which it says.
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
    """Reduced by a function of its own."""

    value: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.tensor(-9.0), lambda stacked: stacked.max(0).values)

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.value = torch.maximum(self.value, preds.max())

    def compute(self) -> torch.Tensor:
        return self.value


class Elements(Metric):
    """A list of tensors of different shapes, which stay apart, and a mean of the updates.

    Another state has its shape only with the first update.
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


def whole(metrics: MetricsLike, data: Pairs) -> dict[str, float]:
    """What torchmetrics computes of all data at once."""
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
    """The values, as each rank finds them of all ranks' states."""
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
def test_states_of_all_ranks_make_the_values_of_the_whole(
    make: Callable[[], MetricsLike], data: Callable[[int], Pairs], size: int, ranks: int
) -> None:
    """However states are reduced, also in compute groups and where some ranks have no batch."""
    sets = [TorchMetrics(make()) for _ in range(ranks)]
    for index, batch in enumerate(batches(data(size))):
        sets[index % ranks].update(*batch)
    found = reduced([metrics.snapshot(metrics.pop_states()) for metrics in sets])
    assert found == pytest.approx(whole(make(), data(size)), rel=1e-4)
    assert sets[0].names() == list(found)


@pytest.mark.parametrize("ranks", [1, 2, 3])  # of three, one has no batch
def test_elements_stay_apart(ranks: int) -> None:
    """A list that is not concatenated keeps its elements and shapes; a mean weighs its updates."""
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


def test_what_was_taken_starts_anew() -> None:
    """A snapshot keeps its values whatever is gathered afterwards, and can be read twice."""
    metrics = TorchMetrics(of_classes())
    first, second = classes(10), classes(30)
    metrics.update(*first)
    snapshot = metrics.snapshot(metrics.pop_states(), "a/", "_b")
    metrics.update(*second)
    expected = {f"a/{n}_b": v for n, v in whole(of_classes(), first).items()}
    assert reduced([snapshot]) == reduced([snapshot]) == pytest.approx(expected)
    assert reduced([metrics.snapshot(metrics.pop_states())]) == pytest.approx(
        whole(of_classes(), second)
    )


def test_the_given_metrics_stay_as_they_are() -> None:
    """The same ones may be given twice, and used elsewhere."""
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


def test_a_shared_state_travels_once() -> None:
    """Metrics of a collection that torchmetrics has grouped keep one list between them."""
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


def test_parts_are_joined() -> None:
    """Where torchmetrics can merge states, those of two parts make what both would have been."""
    metrics = TorchMetrics(
        {
            "accuracy": MulticlassAccuracy(3),
            "auroc": MulticlassAUROC(3),
            "largest": Largest(),
            "sum": MulticlassAccuracy(3) + 1,
        }
    )
    joinable, others = metrics.select(mergeable=True), metrics.select(mergeable=False)
    assert (joinable.names(), others.names()) == (
        ["accuracy", "auroc", "auroc/*"],
        ["largest", "sum"],
    )
    data = classes(40)
    parts = [joinable.pop_states()]  # nothing yet
    for batch in batches(data):
        joinable.update(*batch)
        parts.append(joinable.pop_states())
    expected = whole({"accuracy": MulticlassAccuracy(3), "auroc": MulticlassAUROC(3)}, data)
    assert reduced([joinable.snapshot(joinable.merge(parts))]) == pytest.approx(expected)


def test_a_state_goes_on() -> None:
    """Metrics that load a state compute what those that were saved would have."""
    data = batches(classes(40))
    straight, resumed = TorchMetrics(of_classes()), TorchMetrics(of_classes())
    for batch in data[:3]:
        straight.update(*batch)
    resumed.load_state_dict(straight.state_dict())
    for batch in data[3:]:
        straight.update(*batch)
        resumed.update(*batch)
    values = [reduced([metrics.snapshot(metrics.pop_states())]) for metrics in (straight, resumed)]
    assert values[0] == values[1]


def test_a_state_of_other_metrics_is_refused() -> None:
    """The error tells which states there are; an unknown version is named."""
    state = TorchMetrics({"a": MulticlassAccuracy(3)}, "MetricTracker").state_dict()
    with pytest.raises(StateError, match="the saved metrics of MetricTracker differ"):
        TorchMetrics({"a": MulticlassAUROC(3)}, "MetricTracker").load_state_dict(state)
    with pytest.raises(StateError, match="version 1, found version 9"):
        TorchMetrics({}).load_state_dict({**state, "version": 9})


def test_arguments_by_name_go_where_they_are_declared() -> None:
    """Metrics of different signatures are updated from one mapping."""
    metrics = TorchMetrics(
        {"mean": MeanMetric(), "group": MetricCollection([MulticlassAccuracy(3, average="micro")])}
    )
    metrics.update(value=torch.tensor(2.0), preds=torch.tensor([0, 1]), target=torch.tensor([0, 0]))
    assert reduced([metrics.snapshot(metrics.pop_states())]) == {
        "mean": 2.0,
        "group/MulticlassAccuracy": 0.5,
    }


class Drawn(Metric):
    """Computes a random number."""

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None: ...

    def compute(self) -> torch.Tensor:
        return torch.rand(())


def test_what_a_metric_draws_is_the_same_on_all_ranks() -> None:
    """Computing leaves the random state as it is, and gives every rank the same number."""
    values = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        metrics = TorchMetrics({"drawn": Drawn()})
        metrics.update(*classes(3))
        values.append(reduced([metrics.snapshot(metrics.pop_states())]))
        assert torch.equal(torch.get_rng_state(), before)
    assert values[0] == values[1]


def test_names_of_a_mapping_are_known_once_it_was_computed() -> None:
    """Before, a name stands for all of them, so that who waits for one is told in time."""

    class Late(Elements):
        def compute(self) -> dict[str, float | torch.Tensor]:
            if not self.kept:
                raise ValueError("needs data")
            return {"a": 1.0, "b": 2.0}

    metrics = TorchMetrics({"late": Late()})
    board = MetricsBoard()
    told: list[MetricValue] = []
    board.listen(lambda record: None)
    board.subscribe("eval/val/late/b", told.append)
    metrics.update(*classes(3))
    snapshot = metrics.snapshot(metrics.pop_states(), "eval/val/")
    assert snapshot.names() == ["eval/val/late", "eval/val/late/*"]
    board.defer(snapshot)
    board.flush(log=False)
    assert [(value.name, value.value) for value in told] == [("eval/val/late/b", 2.0)]
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
def test_wrong_metrics_are_refused_at_construction(
    metrics: Any, error: type[Exception], message: str
) -> None:
    """Each error names who uses it, the metric and the remedy."""
    with pytest.raises(error, match=message):
        TorchMetrics(metrics, "Hook")


def test_what_needs_data_is_refused_at_its_first_value() -> None:
    """A metric that tells its shape only with data is an error when it is computed."""
    metrics = TorchMetrics({"all": CatMetric()}, "Hook")
    metrics.update(torch.ones(4))
    with pytest.raises(MetricValueError, match=r"Hook: the metric 'all' .* of shape \(4,\)"):
        reduced([metrics.snapshot(metrics.pop_states())])


def test_an_error_of_a_metric_says_whose() -> None:
    """What a metric raises while it is computed gets a note with its name."""
    metrics = TorchMetrics({"r2": R2Score()}, "Hook")
    metrics.update(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="at least two samples") as raised:
        reduced([metrics.snapshot(metrics.pop_states())])
    assert raised.value.__notes__ == ["while Hook computed the metric 'r2'"]


def test_a_state_that_is_no_tensor_is_refused() -> None:
    """Texts can't travel with tensors; the error names the state."""

    class Texts(Elements):
        def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
            self.kept.append("text")  # type: ignore[arg-type]  # which is the point

    metrics = TorchMetrics({"texts": Texts()}, "Hook")
    metrics.update(*classes(1))
    with pytest.raises(MetricValueError, match="Hook: the state 'kept' of Texts holds a str"):
        metrics.pop_states()


def test_torchmetrics_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without metrics nothing asks for it; with some, the error says how to install it."""
    metric = MeanMetric()
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert len(TorchMetrics(None)) == len(TorchMetrics({})) == 0
    with pytest.raises(PipelineConfigError, match=r'install "robo-orchard-hooks\[metrics\]"'):
        TorchMetrics({"mean": metric})


def test_a_number_that_is_not_finite_is_a_value() -> None:
    """NaN is what some metrics say of too little data."""
    metrics = TorchMetrics({"pearson": PearsonCorrCoef()})
    metrics.update(torch.ones(2), torch.ones(2))
    with pytest.warns(UserWarning, match="close to zero"):
        found = reduced([metrics.snapshot(metrics.pop_states())])
    assert math.isnan(found["pearson"])
