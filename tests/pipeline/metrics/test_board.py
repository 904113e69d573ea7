"""MetricsBoard in one process: accumulation, reductions, subscribers and saved states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_lab.pipeline import TrainerProgress
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.metrics import (
    MetricsBoard,
    MetricsRecord,
    MetricValue,
    MetricValueError,
    Reduction,
    UnknownMetricError,
    resolve,
)
from robo_orchard_lab.pipeline.metrics.exchange import StateReduction

NUMBERS = st.floats(-1e6, 1e6, width=32)
WEIGHTS = st.integers(0, 100)
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "max", "min", "last")


def logged(board: MetricsBoard) -> dict[str, float]:
    record = board.flush(log=True)
    assert record is not None
    return {value.name: value.value for value in record.values}


class Evaluated:
    """Evaluation whose sum is computed when the board reads it."""

    def __init__(self, name: str, *parts: float) -> None:
        self._name = name
        self._parts = torch.tensor(parts)

    def names(self) -> Sequence[str]:
        return [self._name]

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [(self._parts, "cat")]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        return {self._name: reduced[0].sum().item()}


@given(st.lists(st.tuples(NUMBERS, WEIGHTS, st.booleans(), st.booleans()), min_size=1))
def test_mean_is_weighted(items: list[tuple[float, int, bool, bool]]) -> None:
    """Numbers and tensors, with number or tensor weights, give the weighted mean."""
    board = MetricsBoard()
    for value, weight, as_tensor, tensor_weight in items:
        board.publish(
            "x",
            torch.tensor(value) if as_tensor else value,
            weight=torch.tensor(weight) if tensor_weight else weight,
        )
    total = sum(weight for _, weight, _, _ in items)
    mean = math.fsum(value * weight for value, weight, _, _ in items) / total if total else math.nan
    assert logged(board)["x"] == pytest.approx(mean, rel=1e-12, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@given(items=st.lists(st.tuples(NUMBERS, st.booleans()), min_size=1))
def test_reductions_accept_tensors_and_numbers(
    reduce: Reduction, items: list[tuple[float, bool]]
) -> None:
    """The result is the reduction of all values, numbers or tensors."""
    board = MetricsBoard()
    for value, as_tensor in items:
        board.publish("x", torch.tensor(value) if as_tensor else value, reduce)
    values = [value for value, _ in items]
    expected = {
        "mean": math.fsum(values) / len(values),
        "sum": math.fsum(values),
        "max": max(values),
        "min": min(values),
        "last": values[-1],
    }
    assert logged(board)["x"] == pytest.approx(expected[reduce], rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_all_dtypes_are_accepted(dtype: torch.dtype, reduce: Reduction) -> None:
    """Tensors of any real dtype are reduced in double precision."""
    board = MetricsBoard()
    for value in (1, 0, 1, 1):
        board.publish("x", torch.tensor([value], dtype=dtype), reduce)
    expected = {"mean": 0.75, "sum": 3, "max": 1, "min": 0, "last": 1}
    assert logged(board)["x"] == expected[reduce]


def test_published_tensor_may_change_later() -> None:
    """The board copies the value, and keeps neither the tensor nor its graph."""
    board = MetricsBoard()
    weight = torch.ones((), requires_grad=True)
    for reduce in REDUCTIONS:
        value = weight * 2
        board.publish(reduce, value, reduce)
        with torch.no_grad():
            value.fill_(5)
    assert set(logged(board).values()) == {2.0}


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "min", "last"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_nan_is_not_hidden(reduce: Reduction, as_tensor: bool) -> None:
    """NaN is not hidden by later values, except with reduce='last'."""
    board = MetricsBoard()
    for value in (1.0, math.nan, 2.0):
        board.publish("x", torch.tensor(value) if as_tensor else value, reduce)
    assert logged(board)["x"] == pytest.approx(2.0 if reduce == "last" else math.nan, nan_ok=True)


def test_inf_minus_inf_is_nan() -> None:
    """Adding inf to -inf gives NaN, not an error."""
    board = MetricsBoard()
    board.publish("x", math.inf)
    board.publish("x", torch.tensor(-math.inf))
    assert math.isnan(logged(board)["x"])


def test_accumulation_restarts_at_logging_point() -> None:
    """Logged values are not logged again; a name without new values is omitted."""
    board = MetricsBoard()
    board.publish("a", 1.0)
    board.publish("b", 1.0)
    assert logged(board) == {"a": 1.0, "b": 1.0}
    board.publish("a", 3.0)
    assert logged(board) == {"a": 3.0}
    assert board.latest("b") == 1.0
    assert board.names() == ["a", "b"]


def test_values_keep_their_step() -> None:
    """A value belongs to the step of its last publication, even if it is logged later."""
    progress = TrainerProgress()
    board = MetricsBoard(progress)
    for _ in range(4):
        progress.in_step = True
        board.publish("loss", progress.global_step_id)
        progress.finish_step()
        if progress.global_step_id == 2:
            board.publish("eval", 0.5)
            board.defer(Evaluated("deferred", 0.25, 0.5))
    record = board.flush(log=True)
    assert record == MetricsRecord(
        0,
        4,
        0,
        (
            MetricValue("eval", 0.5, 2),
            MetricValue("deferred", 0.75, 2),
            MetricValue("loss", 1.5, 4),
        ),
    )
    assert record.by_step() == {2: {"eval": 0.5, "deferred": 0.75}, 4: {"loss": 1.5}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), r"'x' must be a single number, got a tensor of shape \(2,\); reduce it"),
        (torch.ones((), dtype=torch.complex64), r"'x' must be real, got torch.complex64"),
        ("1", "'x' must be a number, got str"),
        (1j, "'x' must be a number, got complex"),
    ],
)
def test_non_numbers_are_refused(value: Any, message: str) -> None:
    """The error names the metric and the type that was found."""
    with pytest.raises(MetricValueError, match=message):
        MetricsBoard().publish("x", value)


def test_invalid_arguments_are_refused() -> None:
    """A name has one reduction; a weight is >= 0 and requires a mean."""
    board = MetricsBoard()
    board.publish("x", 1.0)
    with pytest.raises(ValueError, match="'x' was published with reduce='mean' before"):
        board.publish("x", 1.0, "sum")
    board.flush(log=True)
    with pytest.raises(ValueError, match="'x' was published with reduce='mean' before"):
        board.publish("x", 1.0, "sum")
    with pytest.raises(ValueError, match=r"reduce must be one of 'mean', .*, got 'median'"):
        board.publish("y", 1.0, "median")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match=r"a weight must be >= 0, got -1\.0"):
        board.publish("x", 1.0, weight=-1)
    with pytest.raises(ValueError, match="a weight requires reduce='mean', got 'sum'"):
        board.publish("z", 1.0, "sum", weight=2)


def test_subscribers_are_called_at_logging_points() -> None:
    """Each value is passed once, in step order, until the handle is removed."""
    board = MetricsBoard()
    received: list[MetricValue] = []
    handle = board.subscribe("x", received.append)
    board.publish("x", 1.0)
    board.publish("y", 1.0)
    assert received == []
    board.flush(log=True)
    assert received == [MetricValue("x", 1.0, 0)]
    handle.remove()
    board.publish("x", 2.0)
    board.flush(log=True)
    assert len(received) == 1


def test_subscribed_evaluation_is_read_at_commit_point() -> None:
    """Subscribers are called at the commit point; the next record has the value with its step."""
    progress = TrainerProgress(global_step_id=5)
    board = MetricsBoard(progress)
    records: list[MetricsRecord] = []
    received: list[MetricValue] = []
    board.listen(records.append)
    board.subscribe("eval/val/accuracy", received.append)
    board.publish("loss", 1.0)
    board.defer(Evaluated("eval/val/accuracy", 0.5))
    board.flush(log=False)
    assert received == [MetricValue("eval/val/accuracy", 0.5, 5)]
    assert records == []
    progress.global_step_id = 7
    board.flush(log=True)
    assert [value.step for value in records[0].values] == [5, 5]
    assert len(received) == 1


def test_unsubscribed_evaluation_is_read_at_logging_point() -> None:
    """A value waits for the logging point with a listener, and is read at once without one."""
    board = MetricsBoard()
    board.defer(Evaluated("eval/val/accuracy", 0.5))
    board.flush(log=False)
    assert board.latest("eval/val/accuracy") == 0.5
    board.listen(lambda record: None)
    board.defer(Evaluated("eval/val/accuracy", 0.75))
    board.flush(log=False)
    assert board.latest("eval/val/accuracy") == 0.5
    board.flush(log=True)
    assert board.latest("eval/val/accuracy") == 0.75


def test_misspelled_evaluation_name_is_refused() -> None:
    """The error for an unknown metric of an evaluation suggests an existing name."""
    board = MetricsBoard()
    board.subscribe("eval/val/accurac", print, who="EarlyStopping")
    board.defer(Evaluated("eval/val/accuracy", 0.5))
    message = (
        "no metric 'eval/val/accurac' was published, which EarlyStopping waits for; "
        "did you mean 'eval/val/accuracy'"
    )
    with pytest.raises(UnknownMetricError, match=message):
        board.flush(log=False)


def test_other_groups_may_publish_names_later() -> None:
    """Only an evaluation has all names of its group at once."""
    board = MetricsBoard()
    received: list[float] = []
    name = "train/accuracy_epoch"
    board.subscribe(name, lambda value: received.append(value.value), who="KeepBest")
    board.defer(Evaluated("train/accuracy", 0.5))
    board.flush(log=True)
    board.defer(Evaluated(name, 0.75))
    board.flush(log=False)
    assert received == [0.75]


def test_missing_names_are_found_at_end() -> None:
    """Subscribed and expected names must have been published, with any reduction."""
    board = MetricsBoard()
    board.publish("loss/total", 1.0)
    board.expect("loss/total", "ProgressBar")
    assert board.find_missing() is None
    board.expect("loss/totl", "ProgressBar")
    error = "'loss/totl' was published, which ProgressBar waits for; did you mean 'loss/total'"
    assert error in str(board.find_missing())


def test_missing_logging_points_have_a_remedy() -> None:
    """Hooks that publish at logging points are named in the error if there are none."""
    board = MetricsBoard()
    board.before_logging(lambda: board.publish("perf/eta_s", 1.0))
    board.expect("perf/eta_s", "ProgressBar")
    assert str(board.find_missing()).endswith("no hook requests one; register a MetricsLogger")
    board.listen(lambda record: None)
    assert str(board.find_missing()).endswith("Published: none")


def test_collectors_run_before_logging_points() -> None:
    """Collectors run only at logging points, until their handle is removed."""
    board = MetricsBoard()
    handle = board.before_logging(lambda: board.publish("x", 1.0))
    board.flush(log=False)
    assert board.names() == []
    assert logged(board) == {"x": 1.0}
    handle.remove()
    assert logged(board) == {}


@given(
    before=st.lists(st.tuples(st.sampled_from(REDUCTIONS), NUMBERS, st.booleans())),
    after=st.lists(st.tuples(st.sampled_from(REDUCTIONS), NUMBERS, st.booleans())),
)
def test_saved_board_resumes_accumulation(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[tuple[Reduction, float, bool]],
    after: list[tuple[Reduction, float, bool]],
) -> None:
    """A board saved between logging points, and loaded, logs the same values."""

    def publish(board: MetricsBoard, items: list[tuple[Reduction, float, bool]]) -> None:
        for reduce, value, as_tensor in items:
            board.publish(reduce, torch.tensor(value) if as_tensor else value, reduce)

    uninterrupted, resumed = MetricsBoard(), MetricsBoard()
    publish(uninterrupted, before)
    uninterrupted.defer(Evaluated("eval", 1.0))
    uninterrupted.read_deferred()
    folder = tmp_path_factory.mktemp("board") / "state"
    save_checkpoint(folder, 0, {"metrics": uninterrupted.state_dict()})
    resumed.load_state_dict(load_checkpoint(folder).parts["metrics"])
    assert resumed.names() == uninterrupted.names()
    publish(uninterrupted, after)
    publish(resumed, after)
    assert uninterrupted.flush(log=True) == resumed.flush(log=True)


def test_state_of_other_version_is_refused() -> None:
    """The error has the expected and the found version."""
    with pytest.raises(StateError, match="board of version 2, found version 7"):
        MetricsBoard().load_state_dict({"version": 7})


def test_resolve_reads_deferred_metrics() -> None:
    """``resolve`` returns the values at once."""
    assert resolve(Evaluated("x", 1.0, 2.0)) == {"x": 3.0}


class TestFlushPartial:
    """Unlogged values are passed to listeners when the run ends, and kept for a resumed run."""

    @given(
        before=st.lists(st.tuples(st.sampled_from(REDUCTIONS), NUMBERS, st.booleans())),
        after=st.lists(st.tuples(st.sampled_from(REDUCTIONS), NUMBERS, st.booleans())),
    )
    def test_values_are_passed_and_kept(
        self,
        before: list[tuple[Reduction, float, bool]],
        after: list[tuple[Reduction, float, bool]],
    ) -> None:
        """The partial record equals a logging point's, and does not change the next record."""
        partial, uninterrupted = MetricsBoard(), MetricsBoard()
        received: list[MetricsRecord] = []
        partial.listen(received.append)

        def publish(board: MetricsBoard, items: list[tuple[Reduction, float, bool]]) -> None:
            for reduce, value, as_tensor in items:
                board.publish(reduce, torch.tensor(value) if as_tensor else value, reduce)

        for board in (partial, uninterrupted):
            publish(board, before)
        expected = logged(_copy_of(partial))
        partial.flush_partial()
        assert [record.partial for record in received] == [True] * bool(before)
        assert {v.name: v.value for record in received for v in record.values} == expected
        for board in (partial, uninterrupted):
            publish(board, after)
        assert partial.flush(log=True) == uninterrupted.flush(log=True)

    def test_deferred_metrics_are_kept(self) -> None:
        """Deferred metrics are in the partial record, and again in the next one."""
        board = MetricsBoard()
        received: list[MetricsRecord] = []
        board.listen(received.append)
        board.defer(Evaluated("eval", 1.0, 2.0))
        board.flush_partial()
        board.flush(log=True)
        board.flush_partial()
        assert [record.values for record in received] == [(MetricValue("eval", 3.0, 0),)] * 2

    def test_collector_state_is_restored(self) -> None:
        """The owner of a collector gets its state back."""
        board = MetricsBoard()
        received: list[dict[int, dict[str, float]]] = []
        board.listen(lambda record: received.append(record.by_step()))

        class Collector:
            total = 3.0

            def publish(self) -> None:
                board.publish("x", self.total)
                self.total = 0.0

            def state_dict(self) -> dict[str, Any]:
                return {"total": self.total}

            def load_state_dict(self, state: Mapping[str, Any]) -> None:
                self.total = state["total"]

        collector = Collector()
        board.before_logging(collector.publish, owner=collector)
        board.flush_partial()
        collector.total += 4.0
        board.flush(log=True)
        assert received == [{0: {"x": 3.0}}, {0: {"x": 7.0}}]

    def test_subscribers_are_not_called(self) -> None:
        """Subscribers are called at the next logging point, with the complete mean."""
        board = MetricsBoard()
        board.listen(lambda record: None)
        received: list[float] = []
        board.subscribe("x", lambda value: received.append(value.value))
        board.publish("x", 1.0)
        board.flush_partial()
        assert received == []
        assert board.last_value("x") is None
        board.publish("x", 2.0)
        board.flush(log=True)
        assert received == [1.5]
        assert board.last_value("x") == 1.5

    def test_partial_names_count_as_published(self) -> None:
        """A name in a partial record is not missing."""
        board = MetricsBoard()
        board.listen(lambda record: None)
        board.before_logging(lambda: board.defer(Evaluated("train/accuracy", 1.0)))
        board.expect("train/accuracy", "ProgressBar")
        assert board.find_missing() is not None
        board.flush_partial()
        assert board.find_missing() is None

    def test_nothing_is_read_without_listeners(self) -> None:
        """Without a listener there is no record, and collectors are not called."""
        board = MetricsBoard()
        board.before_logging(lambda: pytest.fail("called"))
        board.publish("x", 1.0)
        assert board.flush_partial() is None


def _copy_of(board: MetricsBoard) -> MetricsBoard:
    """Return another board in the same state."""
    twin = MetricsBoard()
    twin.load_state_dict(board.state_dict())
    return twin


def test_refused_publication_leaves_no_trace() -> None:
    """After an error the name is unknown, and may be published correctly."""
    board = MetricsBoard()
    for value, options in ((1.0, {"weight": -1}), ("1", {}), (1.0, {"reduce": "median"})):
        with pytest.raises((TypeError, ValueError), match="'x'"):
            board.publish("x", value, **options)  # type: ignore[arg-type]  # what is tested
    assert board.names() == []
    board.publish("x", 1.0, "sum")
    assert logged(board) == {"x": 1.0}
