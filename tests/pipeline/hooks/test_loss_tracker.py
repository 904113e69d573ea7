"""Mean losses on the metrics board."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from robo_orchard_core.utils.hook import later_errors
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.hooks.loss_tracker import LossMean, LossTracker, LossTrackerConfig
from robo_orchard_lab.pipeline.metrics import MetricValueError
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
    run_hook,
)
from tiny import make_loader, make_trainer

ByStep = dict[int, float]


class Notes(PipelineHooks):
    """Hook that records each batch's loss and samples, and the logged values."""

    def __init__(self, log_every: str) -> None:
        super().__init__("notes")
        self.losses: list[tuple[float, int]] = []
        self.logged: dict[str, ByStep] = {}
        self.on_loop.before(lambda args: args.metrics.listen(self._tell))
        self.on_step.after(self._note)
        self.register_at_commit(lambda args: args.requests.log("it is time"), log_every)

    def _note(self, args: PipelineHookArgs) -> None:
        assert args.loss is not None
        self.losses.append((args.loss.item(), len(args.batch[0])))

    def _tell(self, record: Any) -> None:
        for value in record.values:
            if not record.partial:
                self.logged.setdefault(value.name, {})[value.step] = value.value


def mean(losses: Iterable[tuple[float, int]]) -> float:
    """Return the mean over samples, computed plainly."""
    total = samples = 0.0
    for loss, count in losses:
        total += loss * count
        samples += count
    return total / samples


def approx(by_step: ByStep) -> Any:
    return pytest.approx(by_step, rel=1e-12)


@pytest.mark.parametrize("every", [1, 3, 8])
def test_means_equal_a_plain_loop(every: int) -> None:
    """Means of windows and epochs are exact for uneven batches, in any alignment."""
    notes = Notes(f"{every} steps")
    loader = make_loader(batches=4, batch_size=4, rest=1)  # 5 steps per epoch
    make_trainer([notes, LossTrackerConfig()], loader=loader, max_epoch=5)()
    losses = notes.losses
    assert len(losses) == 25
    windows = {end: mean(losses[end - every : end]) for end in range(every, 26, every)}
    assert notes.logged["loss/total"] == approx(windows)
    if every <= 3:  # at most one epoch ends between two logging points
        logged = 25 // every * every
        epochs = {end: mean(losses[end - 5 : end]) for end in range(5, logged + 1, 5)}
        assert notes.logged["loss/total_epoch"] == approx(epochs)


class OnDevice(torch.Tensor):
    """CPU tensor that stands for a tensor on a device, which a hook must not read."""

    is_cpu = False


class Plain(SimpleBatchProcessor):
    """Batch processor whose losses are on the CPU, or stand for losses on a device."""

    def __init__(self, kind: type[torch.Tensor]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, model: Any, batch: Any) -> Any:
        return None, model(batch[0]).square().mean().as_subclass(self.kind)


on_both = pytest.mark.parametrize("kind", [torch.Tensor, OnDevice], ids=["cpu", "device"])


@on_both
def test_long_window_is_exact(kind: type[torch.Tensor]) -> None:
    """A window with more steps than slots has the same mean at every length."""
    notes = Notes("at steps 64, 129, 130, 195")
    loader = make_loader(batches=30, batch_size=2, rest=1)
    make_trainer(
        [notes, LossTrackerConfig()], loader=loader, max_step=195, batch_processor=Plain(kind)
    )()
    ends = [0, 64, 129, 130, 195]
    assert notes.logged["loss/total"] == approx(
        {end: mean(notes.losses[a:end]) for a, end in pairwise(ends)}
    )


class Weighing(SimpleBatchProcessor):
    """Batch processor with loss weights; losses with weight 0 are NaN."""

    def __init__(self, kind: type[torch.Tensor] = torch.Tensor) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, model: Any, batch: Any) -> Any:
        loss = model(batch[0]).square().mean()
        weight = (batch[0][0, 0].abs() * 10).int() % 4
        loss = torch.where(weight > 0, loss, loss + math.nan).as_subclass(self.kind)
        weight = weight.as_subclass(self.kind)
        return {"half": loss / 2}, loss, weight


@on_both
def test_means_are_weighted(kind: type[torch.Tensor]) -> None:
    """Means are weighted, also over more steps than slots; weight 0 is ignored."""
    notes = Notes("at steps 64, 129, 130, 195")
    weighed: list[tuple[float, int]] = []
    notes.on_step.after(lambda args: weighed.append((args.loss.item(), int(args.loss_weight))))
    make_trainer(
        [notes, LossTrackerConfig(losses_key="")],
        loader=make_loader(batches=30, batch_size=2, rest=1),
        batch_processor=Weighing(kind),
        max_step=195,
    )()
    assert {weight for _, weight in weighed} == {0, 1, 2, 3}
    ends = [0, 64, 129, 130, 195]
    expected = {end: mean(weighed[a:end]) for a, end in pairwise(ends)}
    assert notes.logged["loss/total"] == approx(expected)
    halves = {end: value / 2 for end, value in expected.items()}
    assert notes.logged["loss/half"] == pytest.approx(halves, rel=1e-6)


def test_incomplete_epoch_has_no_mean() -> None:
    """A run that ends in its second epoch publishes only the mean of the first."""
    metrics = run_hook(LossTrackerConfig(), steps=6).metrics  # 4 steps per epoch
    assert list(metrics["loss/total_epoch"]) == [4]


def test_nan_loss_makes_its_means_nan() -> None:
    """A NaN in one step makes only the means of its window and epoch NaN."""

    factors = iter([1.0, math.nan] + [1.0] * 6)

    def forward(model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        return None, model(batch[0]).square().mean() * next(factors)

    processor = SimpleBatchProcessor.from_callable(forward, need_backward=False)
    metrics = run_hook(LossTrackerConfig(), batch_processor=processor, epochs=2).metrics
    assert [math.isnan(x) for x in metrics["loss/total"].values()] == [False, True] + [False] * 6
    assert [math.isnan(x) for x in metrics["loss/total_epoch"].values()] == [True, False]


def test_no_loss_has_no_mean() -> None:
    """A batch processor without a loss is supported."""
    processor = SimpleBatchProcessor.from_callable(lambda m, b: (m(b[0]), None), False)
    assert run_hook(LossTrackerConfig(), batch_processor=processor).metrics == {}


class Counting(SimpleBatchProcessor):
    """Batch processor that counts samples, and the calls of its count."""

    calls = 0

    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        return {}, model(batch["x"]).square().mean() * 0 + batch["loss"]

    def count_samples(self, batch: Any) -> int:
        self.calls += 1
        return int(batch["count"])


def test_batch_processor_counts_samples() -> None:
    """The results of count_samples are the weights, with one call per step."""
    x = torch.ones(2, 4)
    data = [{"x": x, "loss": 1.0, "count": 3}, {"x": x, "loss": 5.0, "count": 1}]
    processor = Counting()
    trackers = [LossTrackerConfig()(), LossTrackerConfig(losses_key="")()]
    trackers[1].name = "another"
    run = run_hook(trackers, data=data, batch_processor=processor, steps=2, log_every="2 steps")
    assert run.metrics["loss/total"] == {2: 2.0}
    assert processor.calls == 2


OUTPUTS: dict[str, tuple[Any, str]] = {
    "a key": (lambda losses: {"boxes": [], "losses": losses}, "losses"),
    "the outputs": (lambda losses: losses, ""),
    "an attribute": (lambda losses: SimpleNamespace(loss_dict=losses), "loss_dict"),
}


def named(outputs: Any, values: Mapping[str, Any]) -> SimpleBatchProcessor:
    """Return a processor with losses in its outputs: functions of the batch's mean square."""

    def forward(model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        loss = model(batch[0]).square().mean()
        return outputs({name: value(loss) for name, value in values.items()}), loss

    return SimpleBatchProcessor.from_callable(forward)


@pytest.mark.parametrize("where", OUTPUTS)
def test_named_losses_are_found(where: str) -> None:
    """Losses are found by key, by attribute, or as the outputs themselves."""
    outputs, key = OUTPUTS[where]
    values = {
        "twice": lambda loss: loss * 2,  # with its graph
        "half": lambda loss: (loss.detach() / 2).reshape(1).to(torch.bfloat16),
        "number": lambda loss: loss.item() + 1,
        7: lambda loss: torch.tensor(7),
    }
    run = run_hook(
        LossTrackerConfig(losses_key=key),
        batch_processor=named(outputs, values),  # type: ignore[arg-type]  # a key that is no text
        epochs=1,
        log_every="1 epoch",
    )
    metrics = {name: by_step[4] for name, by_step in run.metrics.items()}
    total = metrics["loss/total"]
    assert metrics["loss/twice"] == metrics["loss/twice_epoch"] == pytest.approx(2 * total)
    assert metrics["loss/half"] == pytest.approx(total / 2, rel=1e-2)
    assert metrics["loss/number"] == metrics["loss/number_epoch"] == pytest.approx(total + 1)
    assert metrics["loss/7"] == 7
    assert list(run.metrics) == [
        *(f"loss/{n}_epoch" for n in ("total", *values)),
        *(f"loss/{n}" for n in ("total", *values)),
    ]


def test_loss_may_be_present_in_some_steps() -> None:
    """The mean is over the steps with this loss, for numbers and tensors."""

    def forward(model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        value = batch["aux"]
        return {} if value is None else {"aux": value}, model(batch["x"]).square().mean()

    aux = [None, 1.0, torch.tensor(4.0), None]
    run = run_hook(
        LossTrackerConfig(losses_key=""),
        data=[{"x": torch.ones(1 + i, 4), "aux": a} for i, a in enumerate(aux)],
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        epochs=1,
        log_every="2 steps",
    )
    assert run.metrics["loss/aux"] == {2: 1.0, 4: 4.0}
    assert run.metrics["loss/aux_epoch"] == {4: (2 * 1.0 + 3 * 4.0) / 5}


def test_only_listed_losses_are_tracked() -> None:
    """loss_names excludes other outputs of any type."""
    values = {"box": lambda loss: loss, "boxes": lambda loss: torch.zeros(5, 4)}
    cfg = LossTrackerConfig(losses_key="", loss_names=["box"])
    metrics = run_hook(cfg, batch_processor=named(lambda x: x, values), steps=2).metrics
    assert list(metrics) == ["loss/total", "loss/box"]


@pytest.mark.parametrize(
    ("cfg", "outputs", "error", "message"),
    [
        (
            {"losses_key": "loses"},
            {"losses": {}},
            PipelineConfigError,
            "'loses'.*dict with: losses",
        ),
        (
            {"losses_key": "losses"},
            [1],
            PipelineConfigError,
            "found NoneType.*a list with: no names",
        ),
        ({"losses_key": ""}, torch.ones(3), PipelineConfigError, "found Tensor"),
        (
            {"losses_key": "", "loss_names": ["boxx"]},
            {"box": 1.0, "class": 1.0},
            PipelineConfigError,
            "loss_names has 'boxx', expected names among: box, class; did you mean 'box'",
        ),
        ({"losses_key": ""}, {"total": 1.0}, PipelineConfigError, "a loss named 'total'.*rename"),
        ({"losses_key": ""}, {"box": torch.ones(3)}, MetricValueError, r"'loss/box'.*shape \(3,\)"),
        ({"losses_key": ""}, {"box": "high"}, MetricValueError, "'loss/box' must be a number"),
    ],
)
def test_invalid_outputs_are_refused(
    cfg: dict[str, Any], outputs: Any, error: type[Exception], message: str
) -> None:
    """The error comes in the first step before its update, with hook, field and names."""
    processor = SimpleBatchProcessor.from_callable(
        lambda model, batch: (outputs, model(batch[0]).square().mean())
    )
    trainer = make_trainer(LossTrackerConfig(**cfg), batch_processor=processor, max_step=3)
    with pytest.raises(error, match=message) as raised:
        trainer()
    assert "LossTracker" in "".join([str(raised.value), *raised.value.__notes__])
    assert trainer.progress.optimizer_step_id == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_names": ["box"]}, "needs losses_key"),
        ({"losses_key": "", "loss_names": []}, "loss_names"),
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """loss_names needs losses_key and at least one name."""
    with pytest.raises(ValidationError, match=message):
        LossTrackerConfig(**fields)


@on_both
def test_resume_keeps_loss_weights(kind: type[torch.Tensor]) -> None:
    """A run resumed within a window of weighted losses is exact."""
    assert_state_round_trip(
        LossTrackerConfig(losses_key=""), log_every="3 steps", batch_processor=Weighing(kind)
    )


def test_loss_on_the_cpu_counts_like_its_number() -> None:
    """The means of CPU tensors equal the means of their numbers, and leave no tensor behind."""
    of_tensors, of_numbers = LossMean("a"), LossMean("a")
    for number in torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist():
        of_tensors.add(torch.tensor(number, requires_grad=True), torch.tensor(3))
        of_numbers.add(number, 3.0)
    assert of_tensors.state_dict() == of_numbers.state_dict()
    assert of_tensors.check_finite()
    of_tensors.add(torch.tensor(math.inf), 1)
    assert not of_tensors.check_finite()


def test_losses_on_the_host_add_up_in_their_order() -> None:
    """The sums equal those of a plain loop, bit for bit, with checks and states in between."""
    mean, total, weight = LossMean("a"), 0.0, 0.0
    for step, loss in enumerate(torch.rand(150, generator=torch.Generator().manual_seed(0))):
        mean.add(loss, 1 + step % 3)
        total += loss.item() * (1 + step % 3)
        weight += 1 + step % 3
        if step % 20 == 0:
            assert mean.check_finite()
        if step % 30 == 0:
            assert mean.state_dict()["epoch"]["host"] == total
    other = LossMean("a")
    other.add(math.nan, 1)  # not of the loaded state
    other.load_state_dict(mean.state_dict(), torch.device("cpu"))
    found = other.state_dict()["window"]
    assert (found["host"], found["host_weight"]) == (total, weight)
    assert other.check_finite()


@pytest.mark.parametrize("key", [None, ""])
def test_resumed_run_publishes_the_same_values(key: str | None) -> None:
    """A run saved after any step publishes the values of an uninterrupted run."""
    values = {"twice": lambda loss: loss * 2, "number": lambda loss: loss.item()}
    assert_state_round_trip(
        LossTrackerConfig(losses_key=key),
        epochs=2,
        log_every="3 steps",
        batch_processor=named(lambda x: x, values),
    )


@on_both
def test_resume_with_full_slots_is_exact(kind: type[torch.Tensor]) -> None:
    """A run saved with all slots filled resumes exactly."""
    assert_state_round_trip(
        LossTrackerConfig(),
        steps=70,
        log_every="70 steps",
        stop_at=[63, 64, 65],
        batch_processor=Plain(kind),
    )


def test_unused_state_is_returned() -> None:
    """A tracker that was loaded but not run returns the loaded state."""
    run = run_hook(LossTrackerConfig(), steps=3, log_every=None)
    state = run.hook.state_dict()
    tracker = LossTracker(LossTrackerConfig())
    tracker.load_state_dict(state)
    assert tracker.state_dict() == state


def test_state_of_another_version_is_refused() -> None:
    """The error names the hook and both versions."""
    with pytest.raises(StateError, match="LossTracker of version 2, found version 3"):
        LossTrackerConfig()().load_state_dict({"version": 3})


def test_hook_does_not_affect_training() -> None:
    """The hook reads no tensors and changes no weights."""
    values = {"twice": lambda loss: loss * 2}
    cfg, processor = LossTrackerConfig(losses_key=""), named(lambda x: x, values)
    assert_no_device_sync(cfg, steps=70, log_every="20 steps", batch_processor=processor)
    weighing = Weighing(OnDevice)
    assert_no_device_sync(cfg, steps=70, log_every="20 steps", batch_processor=weighing)
    assert_weights_unchanged(cfg, batch_processor=processor)


def test_two_hooks_publish_separately() -> None:
    """Two trackers with different names each publish their losses."""
    first, second = LossTrackerConfig()(), LossTrackerConfig(losses_key="")()
    second.name = "named losses"
    processor = named(lambda x: x, {"twice": lambda loss: loss * 2})
    metrics = run_hook([first, second], batch_processor=processor, steps=1).metrics
    assert metrics["loss/twice"][1] == pytest.approx(2 * metrics["loss/total"][1])


def test_failed_step_is_not_tracked() -> None:
    """The error of the step propagates, without a complaint about missing losses."""

    def forward(model: Any, batch: Any) -> Any:
        raise RuntimeError("out of luck")

    processor = SimpleBatchProcessor.from_callable(forward)
    with pytest.raises(RuntimeError, match="out of luck") as raised:
        run_hook(LossTrackerConfig(losses_key="losses"), batch_processor=processor)
    assert not later_errors(raised.value)
