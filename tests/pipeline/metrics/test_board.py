"""The board in one process: windows, reductions, who is told what and when."""

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
    """An evaluation that was made, and whose sum is to be read."""

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
def test_a_mean_weighs_each_value(items: list[tuple[float, int, bool, bool]]) -> None:
    """Numbers and tensors, with numbers or tensors as weights, give the weighted mean of all."""
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
def test_each_reduction_takes_tensors_and_numbers(
    reduce: Reduction, items: list[tuple[float, bool]]
) -> None:
    """What comes out is the reduction of all, whether they were numbers or tensors."""
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
def test_any_dtype_is_published(dtype: torch.dtype, reduce: Reduction) -> None:
    """Tensors of any real dtype are reduced in double precision."""
    board = MetricsBoard()
    for value in (1, 0, 1, 1):
        board.publish("x", torch.tensor([value], dtype=dtype), reduce)
    expected = {"mean": 0.75, "sum": 3, "max": 1, "min": 0, "last": 1}
    assert logged(board)["x"] == expected[reduce]


def test_a_published_tensor_may_change_afterwards() -> None:
    """The board took its value, and holds neither it nor its graph."""
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
def test_a_value_that_is_no_number_shows(reduce: Reduction, as_tensor: bool) -> None:
    """NaN is not hidden by the values after it, but for the last one, which is what it is."""
    board = MetricsBoard()
    for value in (1.0, math.nan, 2.0):
        board.publish("x", torch.tensor(value) if as_tensor else value, reduce)
    assert logged(board)["x"] == pytest.approx(2.0 if reduce == "last" else math.nan, nan_ok=True)


def test_infinities_of_both_signs_are_no_error() -> None:
    """Adding inf to -inf gives NaN, as everywhere."""
    board = MetricsBoard()
    board.publish("x", math.inf)
    board.publish("x", torch.tensor(-math.inf))
    assert math.isnan(logged(board)["x"])


def test_a_window_ends_at_a_logging_point() -> None:
    """What was logged is not logged again; a name without new values is left out."""
    board = MetricsBoard()
    board.publish("a", 1.0)
    board.publish("b", 1.0)
    assert logged(board) == {"a": 1.0, "b": 1.0}
    board.publish("a", 3.0)
    assert logged(board) == {"a": 3.0}
    assert board.latest("b") == 1.0
    assert board.names() == ["a", "b"]


def test_values_keep_their_step() -> None:
    """A value belongs to the step in which it was published last, also when it is logged later."""
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
def test_what_is_no_number_is_refused(value: Any, message: str) -> None:
    """The error names the metric and what it got."""
    with pytest.raises(MetricValueError, match=message):
        MetricsBoard().publish("x", value)


def test_wrong_arguments_are_refused() -> None:
    """One name has one reduction; a weight is not negative, and goes with a mean."""
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


def test_subscribers_are_told_at_logging_points() -> None:
    """Each value once, in the order of the steps, until the handle is used."""
    board = MetricsBoard()
    told: list[MetricValue] = []
    handle = board.subscribe("x", told.append)
    board.publish("x", 1.0)
    board.publish("y", 1.0)
    assert told == []
    board.flush(log=True)
    assert told == [MetricValue("x", 1.0, 0)]
    handle.remove()
    board.publish("x", 2.0)
    board.flush(log=True)
    assert len(told) == 1


def test_an_evaluation_is_read_at_once_for_those_who_wait() -> None:
    """It is told at the commit point, and is in the next record with the step it belongs to."""
    progress = TrainerProgress(global_step_id=5)
    board = MetricsBoard(progress)
    records: list[MetricsRecord] = []
    told: list[MetricValue] = []
    board.listen(records.append)
    board.subscribe("eval/val/accuracy", told.append)
    board.publish("loss", 1.0)
    board.defer(Evaluated("eval/val/accuracy", 0.5))
    board.flush(log=False)
    assert told == [MetricValue("eval/val/accuracy", 0.5, 5)]
    assert records == []
    progress.global_step_id = 7
    board.flush(log=True)
    assert [value.step for value in records[0].values] == [5, 5]
    assert len(told) == 1


def test_an_evaluation_that_nobody_waits_for_is_read_with_the_log() -> None:
    """With a listener it waits for the logging point; without one it is read at once."""
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


def test_a_misspelled_name_is_refused_at_the_first_evaluation() -> None:
    """Who waits for a metric that the evaluation does not have is told which it has."""
    board = MetricsBoard()
    board.subscribe("eval/val/accurac", print, who="EarlyStopping")
    board.defer(Evaluated("eval/val/accuracy", 0.5))
    message = (
        "no metric 'eval/val/accurac' was published, which EarlyStopping waits for; "
        "did you mean 'eval/val/accuracy'"
    )
    with pytest.raises(UnknownMetricError, match=message):
        board.flush(log=False)


def test_other_groups_come_in_parts() -> None:
    """Only an evaluation has all names of its group at once: others may publish theirs later."""
    board = MetricsBoard()
    told: list[float] = []
    board.subscribe("train/accuracy_epoch", lambda value: told.append(value.value), who="KeepBest")
    board.defer(Evaluated("train/accuracy", 0.5))
    board.flush(log=True)
    board.defer(Evaluated("train/accuracy_epoch", 0.75))
    board.flush(log=False)
    assert told == [0.75]


def test_a_name_that_never_came_is_refused_at_the_end() -> None:
    """Names that are subscribed to or expected must have been published, by any reduction."""
    board = MetricsBoard()
    board.publish("loss/total", 1.0)
    board.expect("loss/total", "the bar")
    assert board.find_missing() is None
    board.expect("loss/totl", "the bar")
    error = "'loss/totl' was published, which the bar waits for; did you mean 'loss/total'"
    assert error in str(board.find_missing())


def test_what_nobody_logs_is_missed_with_a_remedy() -> None:
    """Where hooks publish at logging points and nobody makes any, the error says so."""
    board = MetricsBoard()
    board.before_logging(lambda: board.publish("perf/eta_s", 1.0))
    board.expect("perf/eta_s", "the bar")
    assert str(board.find_missing()).endswith("no hook requests one; register a MetricsLogger")
    board.listen(lambda record: None)
    assert str(board.find_missing()).endswith("Published: none")


def test_what_is_gathered_is_published_ahead_of_a_logging_point() -> None:
    """Collectors run at logging points only, until their handle is used."""
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
def test_a_saved_window_goes_on(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[tuple[Reduction, float, bool]],
    after: list[tuple[Reduction, float, bool]],
) -> None:
    """A board that is saved in the middle of a window, and loaded, finds what it would have."""

    def publish(board: MetricsBoard, items: list[tuple[Reduction, float, bool]]) -> None:
        for reduce, value, as_tensor in items:
            board.publish(reduce, torch.tensor(value) if as_tensor else value, reduce)

    straight, resumed = MetricsBoard(), MetricsBoard()
    publish(straight, before)
    straight.defer(Evaluated("eval", 1.0))
    straight.read_deferred()
    folder = tmp_path_factory.mktemp("board") / "state"
    save_checkpoint(folder, 0, {"metrics": straight.state_dict()})
    resumed.load_state_dict(load_checkpoint(folder).parts["metrics"])
    assert resumed.names() == straight.names()
    publish(straight, after)
    publish(resumed, after)
    assert straight.flush(log=True) == resumed.flush(log=True)


def test_a_state_of_another_version_is_refused() -> None:
    """The error says which was expected and which was found."""
    with pytest.raises(StateError, match="board of version 2, found version 7"):
        MetricsBoard().load_state_dict({"version": 7})


def test_deferred_metrics_can_be_read_without_a_board() -> None:
    """``resolve`` gives the values at once."""
    assert resolve(Evaluated("x", 1.0, 2.0)) == {"x": 3.0}


class TestTellRest:
    """What no logging point has had is told when the run ends, and kept for a run that goes on."""

    @given(
        before=st.lists(st.tuples(st.sampled_from(REDUCTIONS), NUMBERS, st.booleans())),
        after=st.lists(st.tuples(st.sampled_from(REDUCTIONS), NUMBERS, st.booleans())),
    )
    def test_it_is_told_and_kept(
        self,
        before: list[tuple[Reduction, float, bool]],
        after: list[tuple[Reduction, float, bool]],
    ) -> None:
        """The partial record is that of a logging point, and the next one is as without it."""
        looked, unlooked = MetricsBoard(), MetricsBoard()
        told: list[MetricsRecord] = []
        looked.listen(told.append)

        def publish(board: MetricsBoard, items: list[tuple[Reduction, float, bool]]) -> None:
            for reduce, value, as_tensor in items:
                board.publish(reduce, torch.tensor(value) if as_tensor else value, reduce)

        for board in (looked, unlooked):
            publish(board, before)
        expected = logged(_same(looked))
        looked.flush_partial()
        assert [record.partial for record in told] == [True] * bool(before)
        assert {v.name: v.value for record in told for v in record.values} == expected
        for board in (looked, unlooked):
            publish(board, after)
        assert looked.flush(log=True) == unlooked.flush(log=True)

    def test_evaluations_are_kept(self) -> None:
        """Deferred metrics are told with it, and again at the next logging point."""
        board = MetricsBoard()
        told: list[MetricsRecord] = []
        board.listen(told.append)
        board.defer(Evaluated("eval", 1.0, 2.0))
        board.flush_partial()
        board.flush(log=True)
        board.flush_partial()
        assert [record.values for record in told] == [(MetricValue("eval", 3.0, 0),)] * 2

    def test_what_was_gathered_is_given_back(self) -> None:
        """The owner of what a collector publishes gets its state back."""
        board = MetricsBoard()
        told: list[dict[int, dict[str, float]]] = []
        board.listen(lambda record: told.append(record.by_step()))

        class Gatherer:
            gathered = 3.0

            def publish(self) -> None:
                board.publish("x", self.gathered)
                self.gathered = 0.0

            def state_dict(self) -> dict[str, Any]:
                return {"gathered": self.gathered}

            def load_state_dict(self, state: Mapping[str, Any]) -> None:
                self.gathered = state["gathered"]

        gatherer = Gatherer()
        board.before_logging(gatherer.publish, owner=gatherer)
        board.flush_partial()
        gatherer.gathered += 4.0
        board.flush(log=True)
        assert told == [{0: {"x": 3.0}}, {0: {"x": 7.0}}]

    def test_who_acts_on_values_is_not_told(self) -> None:
        """A subscriber is told at the next logging point, of the whole window."""
        board = MetricsBoard()
        board.listen(lambda record: None)
        told: list[float] = []
        board.subscribe("x", lambda value: told.append(value.value))
        board.publish("x", 1.0)
        board.flush_partial()
        assert told == []
        assert board.last_value("x") is None
        board.publish("x", 2.0)
        board.flush(log=True)
        assert told == [1.5]
        assert board.last_value("x") == 1.5

    def test_a_name_that_it_has_was_published(self) -> None:
        """Who waits for a metric that came too late for a logging point does not wait in vain."""
        board = MetricsBoard()
        board.listen(lambda record: None)
        board.before_logging(lambda: board.defer(Evaluated("train/accuracy", 1.0)))
        board.expect("train/accuracy", "the bar")
        assert board.find_missing() is not None
        board.flush_partial()
        assert board.find_missing() is None

    def test_nothing_is_read_where_nobody_listens(self) -> None:
        """Without a listener there is no record, and collectors are not called."""
        board = MetricsBoard()
        board.before_logging(lambda: pytest.fail("called"))
        board.publish("x", 1.0)
        assert board.flush_partial() is None


def _same(board: MetricsBoard) -> MetricsBoard:
    """Another board in the same state."""
    twin = MetricsBoard()
    twin.load_state_dict(board.state_dict())
    return twin


def test_what_is_refused_leaves_no_trace() -> None:
    """A caller that goes on after the error has no such name, and may publish it rightly."""
    board = MetricsBoard()
    for value, options in ((1.0, {"weight": -1}), ("1", {}), (1.0, {"reduce": "median"})):
        with pytest.raises((TypeError, ValueError), match="'x'"):
            board.publish("x", value, **options)  # type: ignore[arg-type]  # what is tested
    assert board.names() == []
    board.publish("x", 1.0, "sum")
    assert logged(board) == {"x": 1.0}
