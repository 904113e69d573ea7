"""Redistribution of states over a different number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanSquaredError, PearsonCorrCoef

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hooks import LossTrackerConfig, MetricTrackerConfig, OptimizerHook
from robo_orchard_lab.pipeline.metrics import MetricsBoard, WeightedSum, resolve
from robo_orchard_lab.pipeline.metrics.accumulators import combine
from robo_orchard_lab.pipeline.metrics.torchmetrics import TorchMetrics
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from tiny import make_model

NUMBERS = [(1, 2), (2, 1), (3, 2), (2, 3), (4, 1)]


def combined(states: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the values of a logging point of all ranks."""
    boards = []
    for state in states:
        boards.append(MetricsBoard())
        boards[-1].load_state_dict(state)
    published: dict[str, list[Any]] = {}
    for board in boards:
        for name, accumulator in board._accumulators.items():
            published.setdefault(name, []).append(accumulator)
    return {
        name: combine(
            of_ranks[0].reduce,
            [(each.numbers(), [float(t) for t in each.tensors()]) for each in of_ranks],
        )
        for name, of_ranks in sorted(published.items())
    }


def publish(board: MetricsBoard, rank: int, on_device: bool) -> None:
    value: Any = torch.tensor(rank + 1.0) if on_device else rank + 1.0
    board.publish("weighted", value, weight=rank + 1)
    board.publish("plain", value)
    for reduce in ("sum", "max", "min", "last"):
        board.publish(reduce, value, reduce=reduce)
    if rank == 0:
        board.publish("of the first", value)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("saved", "now"), NUMBERS)
def test_published_values(saved: int, now: int, on_device: bool) -> None:
    """A logging point has equal values, and further publishing continues the mean."""
    boards = [MetricsBoard() for _ in range(saved)]
    for rank, board in enumerate(boards):
        publish(board, rank, on_device)
    before = [board.state_dict() for board in boards]
    after = MetricsBoard.redistribute_states(before, now)
    assert len(after) == now
    assert combined(after) == pytest.approx(combined(before))
    mean = combined(before)["plain"]
    later = []
    for state in after:
        later.append(MetricsBoard())
        later[-1].load_state_dict(state)
        later[-1].publish("plain", 10.0)
    found = combined([board.state_dict() for board in later])
    assert found["plain"] == pytest.approx((mean + 10.0) / 2)


def train_on(hook: PipelineHooks, losses: Sequence[float], run: PipelineRun) -> None:
    with hook.begin("on_loop", PipelineHookArgs(run)):
        for loss in losses:
            args = PipelineHookArgs(run, torch.ones(int(loss), 1), attached_loss=torch.tensor(loss))
            with hook.begin("on_step", args), hook.begin("on_batch", args):
                pass


@pytest.mark.parametrize(("saved", "now"), NUMBERS)
def test_mean_losses(saved: int, now: int) -> None:
    """Each sample counts once in the mean, whichever rank saw the sample."""
    states = []
    for rank in range(saved):
        tracker = LossTrackerConfig()()
        train_on(tracker, [rank + 1.0, rank + 2.0], PipelineRun.standalone())
        states.append(tracker.state_dict())
    found = LossTrackerConfig()().redistribute_states(states, now)
    boards = []
    for state in found:
        run, tracker = (
            PipelineRun.standalone(accelerator=Accelerator(cpu=True)),
            LossTrackerConfig()(),
        )
        tracker.load_state_dict(state)
        with tracker.begin("on_loop", PipelineHookArgs(run)):
            tracker._publish(run.metrics, "window")
        boards.append(run.metrics.state_dict())
    losses = [rank + more for rank in range(saved) for more in (1.0, 2.0)]
    expected = math.fsum(x * x for x in losses) / math.fsum(losses)
    assert combined(boards) == {"loss/total": pytest.approx(expected)}


@pytest.mark.parametrize(("saved", "now"), NUMBERS)
def test_the_plateau_loss_keeps_its_totals(saved: int, now: int) -> None:
    """Sums and counts equal the totals of all ranks."""
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    hook = OptimizerHook(
        Accelerator(cpu=True), optimizer, ReduceLROnPlateau(optimizer), PipelineHooks()
    )
    states: list[Any] = []
    for rank in range(saved):
        losses = WeightedSum()
        if rank:  # the first had no data
            losses.add(torch.tensor(rank + 1.0), rank)
        states.append({"mean_loss": losses.state_dict()})
    found = hook.redistribute_states(states, now)
    assert len(found) == now
    totals = torch.zeros(2, dtype=torch.float64)
    for state in found:
        losses = WeightedSum()
        losses.load_state_dict(state["mean_loss"], None)
        totals += losses.to_tensor(torch.device("cpu"))
    ranks = range(saved)
    assert totals.tolist() == [sum(rank * (rank + 1) for rank in ranks), sum(ranks)]


def test_the_plateau_loss_is_restored_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loaded sum is on the device of the exchange, also before the first loss."""
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    losses = WeightedSum()
    losses.add(torch.tensor(3.0), torch.tensor(2.0))
    device = torch.device("meta")
    monkeypatch.setattr(Accelerator, "device", device)
    hook = OptimizerHook(
        Accelerator(cpu=True), optimizer, ReduceLROnPlateau(optimizer), PipelineHooks()
    )
    hook.load_state_dict({"mean_loss": losses.state_dict()})
    kept = hook.state_dict()["mean_loss"]
    assert {kept["tensor"].device, kept["tensor_weight"].device} == {device}


def gathered(metric: Any, *parts: int) -> TorchMetrics:
    """Return metrics updated with some parts of the data."""
    metrics = TorchMetrics({"m": metric})
    for part in parts:
        metrics.update(torch.arange(4.0) ** (part + 1), torch.tensor([1.0, 2.0, 0.0, 1.0]))
    return metrics


def test_mergeable_metrics_are_merged() -> None:
    """One rank gets the merged metrics of all ranks, and a new rank begins with empty metrics."""
    hook = MetricTrackerConfig()(metrics={"m": MeanSquaredError()})
    empty = hook.state_dict()
    states = [
        {
            **empty,
            "merged": {**empty["merged"], "live": gathered(MeanSquaredError(), n).state_dict()},
        }
        for n in range(2)
    ]
    (one,) = hook.redistribute_states(states, 1)
    metrics = TorchMetrics({"m": MeanSquaredError()})
    metrics.load_state_dict(one["merged"]["live"])
    complete = gathered(MeanSquaredError(), 0, 1)
    found, due = (resolve(m.snapshot(m.pop_states())) for m in (metrics, complete))
    assert found == pytest.approx(due)
    *_, new = hook.redistribute_states(states, 3)
    metrics.load_state_dict(new["merged"]["live"])
    assert resolve(metrics.snapshot(metrics.pop_states())) == {}


def test_unmergeable_metrics_resume_on_more_ranks_only() -> None:
    """Unmergeable metrics with updates on one rank are kept; on several ranks they are refused."""
    hook = MetricTrackerConfig()(metrics={"m": PearsonCorrCoef()})
    idle = hook.state_dict()
    first, second = (
        {**idle, "window": gathered(PearsonCorrCoef(), n).state_dict()} for n in range(2)
    )
    for states in ([first, idle], [idle, first]):
        (found,) = hook.redistribute_states(states, 1)
        (metric,) = found["window"]["metrics"]
        assert metric["updates"] == 1
    with pytest.raises(StateError, match="PearsonCorrCoef has updates on 2 ranks"):
        hook.redistribute_states([first, second], 1)
