"""The guard against non-finite losses and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import StepLR

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHooks
from robo_orchard_lab.pipeline.hooks.non_finite_guard import (
    NonFiniteError,
    NonFiniteGuard,
    NonFiniteGuardConfig,
)
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.quarantine import read_window, replay
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
    count_host_reads,
)
from tiny import Batch, equal, loss_of, make_loader, make_model, make_trainer

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
INFINITE_LOSS, BAD_GRADIENT = 1e6, 1e7
"""First target of a batch with an infinite loss and finite gradients, or with a finite loss and
one NaN gradient."""


def bad_loss_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = batch
    outputs, loss = loss_of(model, (inputs, targets.clamp(max=100)))
    mark = float(targets[0, 0])
    if mark == INFINITE_LOSS:
        loss = loss + math.inf
    if mark == BAD_GRADIENT:
        loss = loss + (outputs * 0).sum().sqrt()
    return outputs, loss


def batches_with(kind: str, bad: Iterable[int]) -> list[Batch]:
    """Return seven batches, some of them spoilt."""
    batches: list[Any] = [tuple(part.clone() for part in batch) for batch in make_loader()]
    for index in bad:
        inputs, targets = batches[index]
        if kind == "nan in the data":
            inputs[1, 2] = math.nan
        else:
            targets[0, 0] = {"infinite loss": INFINITE_LOSS, "bad gradient": BAD_GRADIENT}[kind]
    return batches


def normed_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    )


def tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


class Average:
    """Moving average of all tensors of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.values = tensors(model)

    def move(self) -> None:
        for value, now in zip(self.values, tensors(self.model), strict=True):
            value.copy_(value + 0.1 * (now - value))


def flat(state: Any) -> list[torch.Tensor]:
    """Return all numbers of an optimizer's state."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, (list, tuple)):
        return [leaf for item in state for leaf in flat(item)]
    if isinstance(state, torch.Tensor):
        return [state]
    return [torch.tensor(state)] if isinstance(state, (int, float)) else []


def on(channel: Any, **functions: Any) -> PipelineHooks:
    hooks = PipelineHooks(f"{channel} of the test")
    hooks.register_hook(channel, HookContext.from_callable(**functions))
    return hooks


def train(
    hooks: Any, batches: list[Batch], model: torch.nn.Module | None = None, **options: Any
) -> HookBasedTrainer:
    options.setdefault("max_epoch", 1)
    trainer = make_trainer(
        hooks,
        model=make_model() if model is None else model,
        loader=batches,
        batch_processor=SimpleBatchProcessor.from_callable(bad_loss_of),
        **options,
    )
    trainer()
    return trainer


@pytest.mark.parametrize("clip", [None, "before", "after"])
@pytest.mark.parametrize("kind", ["nan in the data", "infinite loss", "bad gradient"])
@pytest.mark.parametrize(("accumulate", "bad"), [(1, [2, 5]), (3, [1])])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipped_update_leaves_no_trace(
    optimizer: str, accumulate: int, bad: list[int], kind: str, clip: str | None
) -> None:
    """Weights, statistics, optimizer, LR scheduler and average equal a plain loop that drops the
    windows with a bad batch.
    """
    batches = batches_with(kind, bad)
    model = normed_model()
    made = OPTIMIZERS[optimizer](model.parameters())
    scheduler = StepLR(made, step_size=2, gamma=0.5)
    average = Average(model)
    hooks: list[Any] = [
        on(
            "on_optimizer_step",
            after=lambda args: average.move() if args.update_committed else None,
        ),
        NonFiniteGuardConfig(policy="skip"),
    ]
    if clip:
        hooks.insert(1 if clip == "before" else 2, GradientClippingHookConfig(max_norm=0.05))
    trainer = train(
        hooks, batches, model, optimizer=made, lr_scheduler=scheduler, accumulate=accumulate
    )

    reference = normed_model()
    updates = OPTIMIZERS[optimizer](reference.parameters())
    moved = StepLR(updates, step_size=2, gamma=0.5)
    expected = Average(reference)
    done = skipped = 0
    for first in range(0, len(batches), accumulate):
        window = batches[first : first + accumulate]
        if any(first <= index < first + accumulate for index in bad):
            skipped += 1
            continue
        for batch in window:
            (loss_of(reference, batch)[1] / len(window)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        updates.step()
        moved.step()
        updates.zero_grad()
        expected.move()
        done += 1
    assert equal(tensors(model), tensors(reference))
    assert equal(flat(made.state_dict()), flat(updates.state_dict()))
    assert equal(average.values, expected.values)
    assert scheduler.state_dict() == moved.state_dict()
    assert trainer.progress.optimizer_step_id == done
    assert trainer.progress.skipped_optimizer_steps == skipped
    assert trainer.metrics.latest("guard/skipped") == skipped


def test_finite_run_is_unchanged() -> None:
    """A finite run with any kind of guard is bit-identical to a run without a guard."""

    def run(*hooks: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(normed_model(), torch.nn.Dropout(0.5))
        train(list(hooks), batches_with("infinite loss", []), model, max_epoch=2, accumulate=2)
        return [*tensors(model), torch.get_rng_state()]

    alone = run()
    for read in ("now", "one update late", "at logging points"):
        assert equal(run(NonFiniteGuardConfig(read=read)), alone)
    assert equal(run(NonFiniteGuardConfig(policy="skip")), alone)


def test_error_leaves_weights_unchanged() -> None:
    """The error names the value, the counters, the first parameters and the remedy."""
    model = make_model()
    batches = batches_with("bad gradient", [3])
    with pytest.raises(
        NonFiniteError,
        match=r"NonFiniteGuard: the gradient norm is nan, at step 4 \(epoch 1, 3 "
        r"updates committed, 0 skipped\), by the gradients of 0.weight, 0.bias, 2.weight and 1 "
        r"more. The update was not made: .* Set quarantine to a folder",
    ) as raised:
        train(NonFiniteGuardConfig(), batches, model)
    assert raised.value.parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert raised.value.folder is None
    assert isinstance(raised.value, FloatingPointError)
    until = make_model()
    train([], batches, until, max_step=3)
    assert equal(tensors(model), tensors(until))


def test_error_names_the_batch_of_the_window() -> None:
    """The error names the batch with the bad loss within an accumulation window."""
    with pytest.raises(NonFiniteError, match=r"the loss is inf in batch 2 of the window's 3, at"):
        train(NonFiniteGuardConfig(), batches_with("infinite loss", [4]), accumulate=3)


def test_no_parameter_is_named_after_clipping() -> None:
    """Clipping by NaN makes all gradients NaN, so the source is unknown."""
    hooks = [GradientClippingHookConfig(max_norm=1.0), NonFiniteGuardConfig()]
    with pytest.raises(NonFiniteError, match="clipped before the gradient could be") as raised:
        train(hooks, batches_with("bad gradient", [0]))
    assert raised.value.parameters == ()


def test_overflowing_norm() -> None:
    """Finite gradients with an infinite norm are reported as such."""

    def enlarge(args: PipelineHookArgs) -> None:
        for parameter in args.model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(1e30)

    hooks = [on("on_optimizer_step", before=enlarge), NonFiniteGuardConfig()]
    with pytest.raises(NonFiniteError, match=r"norm is inf, at .* though each gradient is finite"):
        train(hooks, batches_with("infinite loss", []))


def test_consecutive_skips_are_limited() -> None:
    """A committed update resets the count; the update past the limit raises."""
    guard = NonFiniteGuardConfig(policy="skip", max_skips_in_a_row=2)
    trainer = train(guard, batches_with("infinite loss", [0, 1, 3, 4]))
    assert trainer.progress.skipped_optimizer_steps == 4
    with pytest.raises(
        NonFiniteError,
        match=r"at step 5 .*The 2 before it were skipped \(max_skips_in_a_row=2\)",
    ):
        train(guard, batches_with("infinite loss", [2, 3, 4]))
    endless = NonFiniteGuardConfig(policy="skip", max_skips_in_a_row=None)
    trainer = train(endless, batches_with("infinite loss", range(7)), max_epoch=2)
    assert trainer.progress.skipped_optimizer_steps == 14


def stop_at(step: int) -> PipelineHooks:
    def stop(args: PipelineHookArgs) -> None:
        if args.global_step_id == step:
            args.requests.stop("the test", by="the test")

    return on("on_step", after=stop)


def test_resume_restores_the_skip_count(tmp_path: Path) -> None:
    """Two skips before the save and one after are three in a row."""
    guard = NonFiniteGuardConfig(policy="skip", max_skips_in_a_row=2)
    batches = batches_with("infinite loss", [2, 3, 4])
    train([guard, stop_at(3)], batches).save_checkpoint(tmp_path / "saved")
    with pytest.raises(NonFiniteError, match="The 2 before it were skipped"):
        train([guard, stop_at(9)], batches, resume_from=tmp_path / "saved")


def test_resume_within_a_window(tmp_path: Path) -> None:
    """A bad loss before the save skips the window after the resume and restores its buffers."""
    batches = batches_with("infinite loss", [3])  # the first of the second window
    guard = NonFiniteGuardConfig(policy="skip")
    uninterrupted = normed_model()
    train([guard, stop_at(9)], batches, uninterrupted, accumulate=3)
    stopped = train([guard, stop_at(3)], batches, normed_model(), accumulate=3)
    stopped.save_checkpoint(tmp_path / "saved")
    resumed = normed_model()
    trainer = train(
        [guard, stop_at(9)], batches, resumed, accumulate=3, resume_from=tmp_path / "saved"
    )
    assert trainer.progress.skipped_optimizer_steps == 1
    assert equal(tensors(resumed), tensors(uninterrupted))


def test_state_of_another_version_is_refused() -> None:
    """The error names both versions."""
    guard = NonFiniteGuardConfig()()
    with pytest.raises(StateError, match="NonFiniteGuard of version 1, found version 0"):
        guard.load_state_dict({**guard.state_dict(), "version": 0})


def test_buffers_are_kept_with_restore_buffers_false() -> None:
    """Statistics of a skipped window are kept with restore_buffers=False."""
    batches = batches_with("infinite loss", [1])
    restored, moved = normed_model(), normed_model()
    train(NonFiniteGuardConfig(policy="skip"), batches, restored, max_step=2)
    train(NonFiniteGuardConfig(policy="skip", restore_buffers=False), batches, moved, max_step=2)
    buffers = [dict(model.named_buffers()) for model in (restored, moved)]
    assert [found["1.num_batches_tracked"] for found in buffers] == [1, 2]
    assert not torch.equal(*(found["1.running_mean"] for found in buffers))


class Counting(torch.nn.Module):
    """Module that replaces its buffers by new tensors, one of them growing."""

    count: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        self.seen = torch.cat([self.seen, inputs[:1, 0]])
        outputs: torch.Tensor = self.inner(inputs)
        return outputs


def test_replaced_buffers_are_restored() -> None:
    """Buffers are restored also if the forward pass creates tensors of another shape."""
    model = Counting()
    batches = batches_with("infinite loss", [1, 4, 6])
    train(NonFiniteGuardConfig(policy="skip"), batches, model)
    good = [batches[index][0][0, 0] for index in (0, 2, 3, 5)]
    assert model.count == 4
    assert torch.equal(model.seen, torch.stack(good))


def test_update_skipped_by_another_hook_is_ignored() -> None:
    """An update skipped by a user's hook is neither an error nor counted."""

    def skip(args: PipelineHookArgs) -> None:
        args.skip_reason = "the test" if args.global_step_id == 2 else None

    for read in ("now", "one update late", "at logging points"):
        guard = NonFiniteGuardConfig(read=read)()
        hooks = [on("on_optimizer_step", before=skip), guard]
        trainer = train(hooks, batches_with("infinite loss", [2]))
        assert trainer.progress.skipped_optimizer_steps == 1
        assert guard.skips_in_a_row == 0


def test_skips_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each skip logs one warning with value, counters and number of skips."""
    train(NonFiniteGuardConfig(policy="skip"), batches_with("infinite loss", [2, 3]))
    warnings = [record.message for record in caplog.records]
    assert [text.split(" (epoch")[0] for text in warnings] == [
        "NonFiniteGuard skips the update, 1 in a row: the loss is inf, at step 3",
        "NonFiniteGuard skips the update, 2 in a row: the loss is inf, at step 4",
    ]


@pytest.mark.parametrize(("bad", "raised_at"), [(2, 3), (6, 7)])
def test_one_update_late(bad: int, raised_at: int) -> None:
    """The error comes before the next update or at the end, with the bad update's counters."""
    guard = NonFiniteGuardConfig(read="one update late")
    trainer = make_trainer(
        guard,
        loader=batches_with("infinite loss", [bad]),
        batch_processor=SimpleBatchProcessor.from_callable(bad_loss_of),
        max_epoch=1,
    )
    with pytest.raises(
        NonFiniteError,
        match=rf"the loss is inf, at step {bad + 1} \(epoch 1, {bad} updates "
        r"committed.*made before the values were read \(read='one update late'\)",
    ):
        trainer()
    assert trainer.progress.global_step_id == raised_at
    assert trainer.progress.optimizer_step_id == raised_at


def test_late_error_does_not_name_gradients() -> None:
    """The gradients are freed by then, so the error does not describe any."""
    guard = NonFiniteGuardConfig(read="one update late")
    with pytest.raises(NonFiniteError, match=r"norm is nan, at [^)]*\)\. The update was made bef"):
        train(guard, batches_with("bad gradient", [3]))


def log_every(steps: int, records: list[MetricsRecord]) -> PipelineHooks:
    """Return a hook that requests logging points and records them."""
    hooks = PipelineHooks("logging")
    hooks.register_at_commit(lambda args: args.requests.log("due", by="logging"), f"{steps} steps")
    hooks.register_hook(
        "on_loop",
        HookContext.from_callable(before=lambda args: args.metrics.listen(records.append)),
    )
    return hooks


@pytest.mark.parametrize(
    ("fields", "reads"),
    [
        ({}, 3),
        ({"policy": "skip"}, 3),
        ({"read": "one update late"}, 3),
        ({"read": "at logging points"}, 1),
    ],
)
def test_reads_and_resume(fields: dict[str, Any], reads: int) -> None:
    """Six steps in windows of two cost a read per update, or one at the end; the guard resumes at
    any step and changes nothing.
    """
    guard = NonFiniteGuardConfig(**fields)
    for log_every in ("2 steps", None):
        assert_no_device_sync(guard, allowed=reads, accumulate=2, log_every=log_every)
        with pytest.raises(AssertionError, match=rf"reads from tensors {reads} times in 6 steps"):
            assert_no_device_sync(guard, allowed=reads - 1, accumulate=2, log_every=log_every)
    hooks = [guard, GradientClippingHookConfig(max_norm=0.05)]
    assert_state_round_trip(hooks, accumulate=2, log_every="4 steps")
    assert_weights_unchanged(guard, accumulate=2)


@pytest.mark.parametrize("plant", [None, "item", "tolist"])
def test_nothing_is_read_between_logging_points(plant: str | None) -> None:
    """Only the board and the end of the run read tensors; a planted read is detected."""

    def read(args: PipelineHookArgs) -> None:
        if plant is not None and args.global_step_id == 4:
            assert args.loss is not None
            getattr(args.loss, plant)()

    records: list[MetricsRecord] = []
    hooks: list[HookLike] = [
        log_every(5, records),
        on("on_step", after=read),
        NonFiniteGuardConfig(read="at logging points"),
    ]
    trainer = make_trainer(hooks, loader=list(make_loader(20)), max_epoch=1, accumulate=2)
    with count_host_reads() as reads:
        trainer()
    by = [call.hook for call in reads if not call.at_commit]
    assert by == [*(["on_step of the test"] if plant else []), "NonFiniteGuard"]
    flags = [value.value for record in records for value in record.values if "guard" in value.name]
    assert flags == [0.0] * 4


@pytest.mark.parametrize("kind", ["nan in the data", "infinite loss", "bad gradient"])
def test_error_follows_the_logging_point(kind: str) -> None:
    """The step after the logging point raises and names the update; the record was written."""
    records: list[MetricsRecord] = []
    trainer = make_trainer(
        [log_every(3, records), NonFiniteGuardConfig(read="at logging points")],
        loader=batches_with(kind, [4]),
        batch_processor=SimpleBatchProcessor.from_callable(bad_loss_of),
        max_epoch=1,
    )
    # A bad gradient spoils the weights, and so the next loss.
    what = "the loss is" if kind == "infinite loss" else "the loss and the gradient norm are"
    with pytest.raises(NonFiniteError, match=rf"{what} not finite in update 4 \(from 0, .*spoilt"):
        trainer()
    assert trainer.progress.global_step_id == 6
    assert [value.value for record in records for value in record.values] == [0.0, 1.0]


def test_end_of_run_checks_after_last_logging_point() -> None:
    """A bad update after the last logging point fails the run, which writes a partial record."""
    records: list[MetricsRecord] = []
    with pytest.raises(NonFiniteError, match="not finite in update 6"):
        train(
            [log_every(3, records), NonFiniteGuardConfig(read="at logging points")],
            batches_with("infinite loss", [6]),
        )
    assert [record.partial for record in records] == [False, False, True]


def test_finding_of_another_rank_is_raised() -> None:
    """The board's flag covers all ranks; here a hook publishes for another rank."""

    def publish(args: PipelineHookArgs) -> None:
        args.metrics.publish("guard/non_finite", float(args.global_step_id == 6), reduce="max")

    hooks = [
        log_every(7, []),
        on("on_step", before=publish),
        NonFiniteGuardConfig(read="at logging points"),
    ]
    with pytest.raises(NonFiniteError, match="another rank found non-finite values"):
        train(hooks, batches_with("infinite loss", []))


def test_end_of_run_checks_without_logging_points() -> None:
    """Updates without a logging point are read once at the end."""
    guard = NonFiniteGuardConfig(read="at logging points")
    with pytest.raises(NonFiniteError, match="not finite in update 5"):
        train(guard, batches_with("infinite loss", [5]))
    trainer = train(guard, batches_with("infinite loss", []))
    assert trainer.progress.optimizer_step_id == 7


def fp16_trainer(
    batches: list[Batch], model: torch.nn.Module, hooks: Any, scale: float
) -> HookBasedTrainer:
    """Build a trainer with a real gradient scaler (only for a GPU); forward in float32."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    accelerator.state._mixed_precision = "fp16"
    trainer = HookBasedTrainer(
        accelerator,
        model,
        batches,
        SimpleBatchProcessor.from_callable(bad_loss_of),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        hooks=hooks,
        max_epoch=1,
    )
    accelerator.native_amp = True  # now, so that the model runs in float32
    return trainer


def test_bad_loss_does_not_change_the_scaler() -> None:
    """Scale and growth with fp16 equal a run that drops the update."""
    guard = NonFiniteGuardConfig(policy="skip")
    clip = GradientClippingHookConfig(max_norm=0.05)
    batches = batches_with("nan in the data", [2])
    model = make_model()
    trainer = fp16_trainer(batches, model, [guard, clip], 1024.0)
    trainer()
    reference = make_model()
    dropped = fp16_trainer(batches[:2] + batches[3:], reference, [clip], 1024.0)
    dropped()
    assert trainer.progress.skipped_optimizer_steps == 1
    assert trainer.accelerator.scaler.state_dict() == dropped.accelerator.scaler.state_dict()
    assert trainer.accelerator.scaler.get_scale() == 4096.0
    assert equal(tensors(model), tensors(reference))


@pytest.mark.parametrize("read", ["now", "one update late", "at logging points"])
def test_scaler_handles_overflows(read: Any) -> None:
    """While the scaler searches its scale, only gradients overflow, and the guard is silent."""
    model = make_model()
    guard = NonFiniteGuardConfig(read=read)
    trainer = fp16_trainer(batches_with("infinite loss", []), model, [guard], 2.0**127)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 8)  # infinite until scaled by 2**124
    trainer()
    assert trainer.progress.skipped_optimizer_steps >= 2
    assert trainer.progress.optimizer_step_id >= 1


class Elsewhere(Accelerator):  # type: ignore[misc]  # which has no types
    """Accelerator of one process that claims another distributed type."""

    kind = DistributedType.NO
    ranks = 1
    deepspeed_engine_wrapped = None

    @property
    def distributed_type(self) -> DistributedType:
        return self.kind

    @property
    def num_processes(self) -> int:
        return self.ranks


def check_update(kind: DistributedType, loss: float, **fields: Any) -> PipelineHookArgs:
    """Check one update of finite gradients by a guard that believes to be one of two ranks."""
    accelerator = Elsewhere(cpu=True)
    accelerator.kind, accelerator.ranks = kind, 2
    model = make_model()
    loss_of(model, batches_with("infinite loss", [])[0])[1].backward()
    args = PipelineHookArgs(
        PipelineRun.standalone(accelerator=accelerator, model=model),
        attached_loss=torch.tensor(loss),
    )
    guard = NonFiniteGuardConfig(**fields)()
    for channel in ("on_model_forward", "on_model_backward", "on_optimizer_step"):
        with guard.begin(channel, args):
            pass
    return args


def test_bad_loss_with_finite_gradients_is_not_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Other ranks can't know, so all ranks make the update, and a warning is logged."""
    args = check_update(DistributedType.MULTI_CPU, math.inf, policy="skip")
    assert args.skip_reason is None
    assert "the loss is inf on rank 0 at step 0" in caplog.text
    assert "but all gradients are finite; the update is made" in caplog.text


def test_sharded_weights_are_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The quarantined window of a sharded model lacks the weights."""
    with pytest.raises(NonFiniteError, match="on rank 0 of 2") as raised:
        check_update(DistributedType.FSDP, math.nan, quarantine=tmp_path)
    assert raised.value.folder is not None
    window = read_window(raised.value.folder)
    assert window.weights == {}
    assert window.num_processes == 2
    assert "the weights are sharded over ranks, and are not written" in caplog.text


def test_engine_without_norm() -> None:
    """Only losses are checked with DeepSpeed."""
    assert check_update(DistributedType.DEEPSPEED, 1.0).grad_norm is None
    for read in ("now", "at logging points"):
        check_update(DistributedType.DEEPSPEED, 1.0, read=read)
    with pytest.raises(NonFiniteError, match="the loss is nan on rank 0 of 2, at"):
        check_update(DistributedType.DEEPSPEED, math.nan)


def test_unsupported_skip_is_refused() -> None:
    """DeepSpeed and fp16 on several processes refuse policy='skip', not policy='raise'."""
    accelerator = Elsewhere(cpu=True)
    args = PipelineHookArgs(PipelineRun.standalone(accelerator=accelerator, model=make_model()))

    def begin(**fields: Any) -> None:
        with NonFiniteGuardConfig(**fields)().begin("on_loop", args):
            pass

    accelerator.kind = DistributedType.DEEPSPEED
    with pytest.raises(PipelineConfigError, match=r"not supported with .*DEEPSPEED"):
        begin(policy="skip")
    begin(policy="raise")
    accelerator.kind, accelerator.ranks = DistributedType.MULTI_GPU, 2
    begin(policy="skip")
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(PipelineConfigError, match="not supported with fp16 on several processes"):
        begin(policy="skip")
    begin(policy="raise")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "skip", "read": "one update late"}, "policy='skip' needs read='now', got"),
        ({"policy": "skip", "read": "at logging points"}, "can be skipped only before the update"),
        ({"read": "at logging points", "quarantine": "q"}, "the batches have been freed by then"),
        ({"policy": "roll back"}, "policy"),
        ({"policy": "skip", "then": "roll back"}, "then"),
        ({"max_skips_in_a_row": 0}, "max_skips_in_a_row"),
        ({"max_quarantined": 0}, "max_quarantined"),
    ],
)
def test_conflicting_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """The error names the field and the reason."""
    with pytest.raises(ValueError, match=message):
        NonFiniteGuardConfig(**fields)


def test_config_round_trips(tmp_path: Path) -> None:
    """All fields round-trip through JSON, the folder included, and build the guard."""
    config = NonFiniteGuardConfig(
        policy="skip", max_skips_in_a_row=None, quarantine=tmp_path / "q", sample_ids=2
    )
    config.save(tmp_path / "guard.json")
    loaded = NonFiniteGuardConfig.load(tmp_path / "guard.json")
    assert loaded == config
    assert isinstance(loaded(), NonFiniteGuard)
    assert copy.deepcopy(loaded).quarantine == tmp_path / "q"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_decide_together(accumulate: int, tmp_path: Path) -> None:
    """If the loss of one rank is infinite, with finite gradients, both ranks skip or raise without
    a collective; finite runs are bit-identical to runs without a guard.
    """
    script = SCRIPTS / "guard_on_ranks.py"
    launch(script, tmp_path, accumulate)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank, found in enumerate(ranks):
        # Each trainer compared its setup, broadcast its data seed, and compared its hooks;
        # nothing more.
        at_the_start = ["all_gather_object", "broadcast_object_list", "all_gather_object"]
        assert found["calls"] == at_the_start * 7
        assert torch.equal(found["finite_guarded"]["weights"], found["finite"]["weights"])
        assert torch.equal(found["guarded"]["weights"], found["known"]["weights"])
        assert torch.equal(found["guarded"]["weights"], ranks[0]["guarded"]["weights"])
        assert found["guarded"]["progress"] == found["known"]["progress"]
        assert found["guarded"]["progress"]["skipped_optimizer_steps"] == 1
        # The guard restores the statistics from before the window; without a guard they change.
        counts = [found[kind]["buffers"][2] for kind in ("guarded", "known")]
        assert counts == [7 - accumulate, 7]
        for kind in ("late", "at_the_end", "raised"):
            assert "NonFiniteGuard: " in found[kind]["error"]
        assert f"on rank {rank} of 2" in found["raised"]["error"]
        assert ("where the loss is finite" in found["raised"]["error"]) == (rank == 0)

    step = f"step_{2 + accumulate:08d}"
    folder = tmp_path / "quarantine"
    assert sorted(path.name for path in folder.iterdir()) == [step, f"{step}_rank1"]
    assert (folder / step / "model.safetensors").stat().st_size > 200
    processor = SimpleBatchProcessor.from_callable(loss_of)
    for name, finite in ((step, True), (f"{step}_rank1", False)):
        model = torch.nn.Sequential(make_model(1), torch.nn.BatchNorm1d(2))
        replayed = replay(folder / name, model, processor)
        assert replayed.is_identical == finite  # this process's losses are finite
        assert [loss.isfinite() for loss in replayed.losses] == [True] * accumulate
        assert replayed.window.steps[0].finite == finite


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("read", ["one update late", "at logging points"])
def test_late_read_does_not_sync_a_gpu(read: Any) -> None:
    """No step of a finite run waits for the device, and non-finite values are still found."""

    def on_device(kind: str, bad: list[int]) -> list[Batch]:
        return [(inputs.cuda(), targets.cuda()) for inputs, targets in batches_with(kind, bad)]

    def trainer(batches: list[Batch]) -> HookBasedTrainer:
        model = make_model()
        return HookBasedTrainer(
            Accelerator(),
            model,
            batches,
            SimpleBatchProcessor.from_callable(loss_of),
            torch.optim.SGD(model.parameters(), lr=0.1),
            hooks=[on("on_step", before=forbid), NonFiniteGuardConfig(read=read)],
            max_epoch=1,
        )

    def forbid(args: PipelineHookArgs) -> None:
        # The first steps set up; at the end a sync is allowed.
        mode = "error" if 2 <= args.global_step_id < 6 else "default"
        torch.cuda.set_sync_debug_mode(mode)

    try:
        trainer(on_device("infinite loss", []))()
        with pytest.raises(NonFiniteError, match=r"not finite|the loss is nan"):
            trainer(on_device("nan in the data", [5]))()
    finally:
        torch.cuda.set_sync_debug_mode("default")
