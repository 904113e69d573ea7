"""Several optimizers: named losses, each for its own optimizer, in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from gan import CACHES_CASTS, GAN, Batch, JointGAN, adams, loss_d, loss_g, make_batches, make_model
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    NamedSteps,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.batch_processor import ForwardResult
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import (
    BatchProcessorError,
    CheckpointError,
    PipelineConfigError,
    UnknownMetricError,
)
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    FreezeHookConfig,
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    NonFiniteGuardConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES


def make_trainer(
    hooks: list[HookLike] | None = None,
    processor: SimpleBatchProcessor | None = None,
    *,
    model: Any = None,
    optimizer: Any = None,
    lr_scheduler: Any = None,
    accumulate: int = 1,
    precision: str = "no",
    batches: list[Batch] | None = None,
    **options: Any,
) -> HookBasedTrainer:
    model = make_model() if model is None else model
    optimizer = adams(model) if optimizer is None else optimizer
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    if not options.keys() & {"max_epoch", "max_step"}:
        options["max_epoch"] = 1
    return HookBasedTrainer(
        accelerator,
        model,
        make_batches() if batches is None else batches,
        processor or GAN(),
        optimizer,
        lr_scheduler,
        hooks or [],
        **options,
    )


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Assert that all tensors are equal bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# --- equality with plain loops ---------------------------------------------------------------


def plain_gan(precision: str, *, joint: bool, window: int = 1, last: int = 4) -> Any:
    """Train with a plain loop: the updates of the critic and the generator, or both at the end."""
    model, batches = make_model(), make_batches(last=last)
    by_name = adams(model)
    options = {"enabled": precision == "bf16", "cache_enabled": CACHES_CASTS}
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, **options)
    for begin in range(0, len(batches), window):
        micro = batches[begin : begin + window]
        total = sum(len(real) for real, _ in micro)
        for count, (real, noise) in enumerate(micro, start=1):
            share = total / len(real)

            def backward(
                name: str, loss: torch.Tensor, keep: bool = False, share: float = share
            ) -> None:
                parameters = list(model[name].parameters())
                scaled = loss if share == 1 else loss / share
                gradients = torch.autograd.grad(scaled, parameters, retain_graph=keep)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    old = parameter.grad
                    parameter.grad = gradient if old is None else old + gradient

            def update(name: str, is_due: bool = count == len(micro)) -> None:
                if is_due:
                    by_name[name].step()
                    by_name[name].zero_grad()

            with autocast():
                fake = model["g"](noise)
                first = loss_g(model, fake) if joint else loss_d(model, real, fake)
                second = loss_d(model, real, fake) if joint else None
            if second is not None:
                backward("g", first, keep=True)
                backward("d", second)
                update("g")
                update("d")
                continue
            backward("d", first)
            update("d")
            with autocast():
                third = loss_g(model, fake)
            backward("g", third)
            update("g")
    return model


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("window", "last"), [(1, 4), (3, 2)])
@pytest.mark.parametrize("joint", [False, True], ids=["named steps", "mapping"])
def test_gan_equals_a_plain_loop(joint: bool, window: int, last: int, precision: str) -> None:
    """Both forms train bit for bit like a plain loop, with windows and a short last batch."""
    trainer = make_trainer(
        processor=JointGAN() if joint else GAN(),
        accumulate=window,
        precision=precision,
        batches=make_batches(last=last),
    )
    trainer()
    expected = plain_gan(precision, joint=joint, window=window, last=last)
    assert_equal(trainer.model.state_dict(), expected.state_dict())


class ActorCritic(SimpleBatchProcessor):
    """Two optimizers for one loss."""

    def forward(self, model: Any, batch: Batch) -> ForwardResult:
        target, noise = batch
        loss = mse_loss(model["d"](model["g"](noise)), target[:, :1])
        return None, {"g": loss, "d": loss}


def test_two_optimizers_share_a_loss() -> None:
    """A loss for two optimizers trains like one backward pass for all parameters."""
    trainer = make_trainer(processor=ActorCritic())
    trainer()
    model = make_model()
    by_name = adams(model)
    for target, noise in make_batches():
        mse_loss(model["d"](model["g"](noise)), target[:, :1]).backward()
        for optimizer in by_name.values():
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(trainer.model.state_dict(), model.state_dict())


# --- channels, args and counters --------------------------------------------------------------


def recorder(lines: list[str]) -> PipelineHooks:
    """Return hooks that record each before and after with the entry's fields."""
    hooks = PipelineHooks("recorder")

    def record(role: str, channel: str, args: PipelineHookArgs) -> None:
        values = [args.optimizer_name, args.loss is not None, args.update_committed]
        known = args.run.optimizers.get(args.optimizer_name or "none")
        assert args.optimizer is known
        assert set(args.losses) <= {"g", "d"}
        lines.append(" ".join([role, channel, *map(str, values)]))

    for channel in CHANNEL_NAMES[2:7]:
        on = getattr(hooks, channel)
        on.before(partial(record, "before", channel))
        on.after(partial(record, "after", channel))
    return hooks


def entry(name: str) -> list[str]:
    """Return the events of a named step at a boundary."""
    return [
        "before on_model_forward None False None",
        f"after on_model_forward {name} True None",
        f"before on_model_backward {name} True None",
        f"after on_model_backward {name} True None",
        f"before on_optimizer_step {name} True None",
        f"after on_optimizer_step {name} True True",
    ]


def around(channel: str, events: list[str]) -> list[str]:
    return [f"before {channel} None False None", *events, f"after {channel} None False None"]


def test_each_named_step_is_an_entry() -> None:
    """A named step opens forward, backward and update with its own fields, inside on_batch."""
    lines: list[str] = []
    make_trainer([recorder(lines)], max_step=1)()
    rest = around("on_model_forward", [])
    batch = around("on_batch", [*entry("d"), *entry("g"), *rest])
    assert lines == around("on_step", batch)


def test_a_mapping_updates_after_the_step() -> None:
    """A mapping has one forward pass, then backward passes, then updates after on_step."""
    lines: list[str] = []
    make_trainer([recorder(lines)], JointGAN(), max_step=1)()
    g, d = (entry(name)[2:4] for name in "gd")
    batch = around("on_batch", [*around("on_model_forward", []), *g, *d])
    updates = [*entry("g")[4:], *entry("d")[4:]]
    assert lines == [*around("on_step", batch), *updates]


@pytest.mark.parametrize("processor", [GAN(), JointGAN()], ids=["named steps", "mapping"])
def test_a_loss_reaches_only_its_own_parameters(processor: SimpleBatchProcessor) -> None:
    """The generator's loss leaves no gradient in the critic, within a window either."""
    found: dict[str, set[str]] = {}
    hooks = PipelineHooks("gradients")

    @hooks.on_model_backward.after
    def collect(args: PipelineHookArgs) -> None:
        named = args.model.named_parameters()
        with_gradient = {name[0] for name, p in named if p.grad is not None}
        found.setdefault(f"{args.step_id} {args.optimizer_name}", with_gradient)

    before: list[torch.Tensor] = []

    @hooks.on_model_backward.before
    def remember(args: PipelineHookArgs) -> None:
        if args.optimizer_name == "g":
            grads = [p.grad for p in args.model["d"].parameters()]  # type: ignore[index]  # a ModuleDict
            before[:] = [grad.clone() for grad in grads if grad is not None]

    @hooks.on_model_backward.after
    def compare(args: PipelineHookArgs) -> None:
        if args.optimizer_name == "g":
            grads = [p.grad for p in args.model["d"].parameters()]  # type: ignore[index]  # a ModuleDict
            kept = [grad for grad in grads if grad is not None]
            assert all(map(torch.equal, kept, before))

    make_trainer([hooks], processor, accumulate=3, max_step=3)()
    first = next(iter(found))
    assert found[first] == {first[-1]}


class Critics(SimpleBatchProcessor):
    """WGAN: the generator's loss comes every third step only."""

    def __init__(self, every: int = 3) -> None:
        super().__init__()
        self.every = every
        self.calls = 0

    def forward(self, model: Any, batch: Batch) -> NamedSteps:
        self.calls += 1
        fake = model["g"](batch[1])
        yield "d", loss_d(model, batch[0], fake)
        if self.calls % self.every == 0:
            yield "g", loss_g(model, fake)


def test_a_name_without_a_loss_makes_no_update() -> None:
    """Weights and counters of an optimizer stay in steps without its loss."""
    hooks, weights = PipelineHooks("weights"), []

    @hooks.on_step.after
    def keep(args: PipelineHookArgs) -> None:
        weights.append(args.model["g"][0].weight.detach().clone())  # type: ignore[index]  # a ModuleDict

    trainer = make_trainer([hooks], Critics())
    trainer()
    changed = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert changed == [False, True, False, False, True, False]
    assert trainer.progress.optimizer_steps == {"g": 2, "d": 7}
    assert trainer.progress.optimizer_step_id == 7


def test_a_loss_earlier_in_the_window_updates_at_its_end() -> None:
    """A name with a loss in a window, but not in its last step, is updated after on_step."""
    lines: list[str] = []
    trainer = make_trainer([recorder(lines)], Critics(every=2), accumulate=3, max_step=3)
    trainer()
    assert lines[-3:] == [
        "after on_step None False None",
        "before on_optimizer_step g False None",
        "after on_optimizer_step g False True",
    ]
    assert trainer.progress.optimizer_steps == {"g": 1, "d": 1}


class Counting(GAN):
    """GAN that keeps the results of its yields."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[bool | None] = []

    def forward(self, model: Any, batch: Batch) -> NamedSteps:
        fake = model["g"](batch[1])
        self.results.append((yield "d", loss_d(model, batch[0], fake)))
        self.results.append((yield "g", loss_g(model, fake)))


def test_a_yield_tells_whether_the_optimizer_was_stepped() -> None:
    """A yield is None within a window, then True, or False where a hook skipped the update."""
    hooks, processor = PipelineHooks("skip"), Counting()

    @hooks.on_optimizer_step.before
    def skip(args: PipelineHookArgs) -> None:
        if args.optimizer_name == "d" and args.step_id == 3:
            args.skip_reason = "the test skips it"

    trainer = make_trainer([hooks], processor, accumulate=2, max_step=4)
    trainer()
    assert processor.results == [None, None, True, True, None, None, False, True]
    assert trainer.progress.optimizer_steps == {"g": 2, "d": 1}
    assert trainer.progress.optimizer_step_id == 2


def test_each_optimizer_has_its_own_gradient_scaler() -> None:
    """An overflow of the critic's gradients skips its update and halves its scale only.

    The scalers are those of fp16; here they run on a CPU in fp32.
    """
    model = make_model()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    hooks = PipelineHooks("overflow")

    @hooks.on_model_backward.before
    def overflow(args: PipelineHookArgs) -> None:
        if args.optimizer_name == "d" and args.step_id == 1:
            assert args.attached_loss is not None
            args.attached_loss = args.attached_loss * torch.inf

    clipping = GradientClippingHookConfig(max_norm=0.05)
    trainer = HookBasedTrainer(
        accelerator,
        model,
        make_batches(),
        GAN(),
        adams(model),
        hooks=[clipping(), hooks],
        max_step=3,
    )
    trainer()
    assert trainer.progress.optimizer_steps == {"g": 3, "d": 2}
    assert trainer.progress.skipped_optimizer_steps == 1
    assert {name: scaler.get_scale() for name, scaler in trainer.scalers.items()} == {
        "g": 4.0,
        "d": 2.0,
    }


def test_scaled_gradients_train_like_plain_ones(tmp_path: Path) -> None:
    """Scaling by a power of two changes nothing, and a checkpoint holds each scaler."""

    def run(scale: float | None, **options: Any) -> HookBasedTrainer:
        model = make_model()
        accelerator = Accelerator(cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer = HookBasedTrainer(
            accelerator,
            model,
            make_batches(),
            JointGAN(),
            adams(model),
            hooks=[GradientClippingHookConfig(max_norm=0.05)()],
            **options,
        )
        trainer()
        return trainer

    expected = run(None, max_step=4).model.state_dict()
    assert_equal(run(1024.0, max_step=4).model.state_dict(), expected)
    run(1024.0, max_step=2).save_checkpoint(tmp_path / "saved")
    resumed = run(2.0, max_step=4, resume_from=tmp_path / "saved")
    assert_equal(resumed.model.state_dict(), expected)
    assert {scaler.get_scale() for scaler in resumed.scalers.values()} == {1024.0}


class OnlyGenerator(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Batch) -> NamedSteps:
        yield "g", loss_g(model, model["g"](batch[1]))


def test_an_optimizer_without_any_loss_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """The first epoch warns of the optimizer, and the completed run raises an error."""
    trainer = make_trainer(processor=OnlyGenerator(), max_epoch=2)
    with caplog.at_level(logging.WARNING), pytest.raises(BatchProcessorError, match="none for d"):
        trainer()
    assert "optimizer.d: expected a loss" in caplog.text
    assert "found none for d in 1 epoch;" in caplog.text
    assert trainer.progress.epoch_id == 2
    with pytest.raises(BatchProcessorError, match="none for d in 2 epochs"):
        trainer()  # as a command that is started again


def test_a_run_within_one_epoch_warns_of_an_optimizer_without_a_loss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run with few steps completes: a loss may be due in later steps."""
    with caplog.at_level(logging.WARNING):
        make_trainer(processor=OnlyGenerator(), max_step=2)()
    assert "found none for d in 2 steps; yield 'd', loss" in caplog.text


def test_an_epoch_without_a_loss_is_no_plateau() -> None:
    """ReduceLROnPlateau keeps the learning rate of an optimizer whose losses begin later."""
    model = make_model()
    optimizer = adams(model)
    plateau = ReduceLROnPlateau(optimizer["g"], patience=0)
    rates: list[float] = []
    hooks = PipelineHooks("rates")

    @hooks.on_epoch.before
    def note(args: PipelineHookArgs) -> None:
        rates.append(float(plateau.get_last_lr()[0]))

    class Later(SimpleBatchProcessor):
        def forward(self, model: Any, batch: Batch) -> NamedSteps:
            fake = model["g"](batch[1])
            yield "d", loss_d(model, batch[0], fake)
            if trainer.progress.epoch_id >= 2:
                yield "g", loss_g(model, fake)

    schedulers = {"g": plateau}
    trainer = make_trainer(
        [hooks], Later(), model=model, optimizer=optimizer, lr_scheduler=schedulers, max_epoch=3
    )
    trainer()
    assert len(set(rates)) == 1
    assert plateau.best < float("inf")


def test_lr_schedulers_step_with_their_own_optimizer() -> None:
    """Units and monitored metrics of LR schedulers are given by name."""
    model = make_model()
    optimizer = adams(model)
    hooks = PipelineHooks("values")

    @hooks.on_epoch.after
    def publish(args: PipelineHookArgs) -> None:
        args.metrics.publish("value", 1.0)

    trainer = make_trainer(
        [hooks],
        Critics(),
        model=model,
        optimizer=optimizer,
        lr_scheduler={
            "g": StepLR(optimizer["g"], 1, 0.5),
            "d": ReduceLROnPlateau(optimizer["d"], factor=0.5, patience=0),
        },
        lr_scheduler_monitor={"d": "value"},
        max_epoch=3,
    )
    trainer()
    assert trainer.progress.optimizer_steps == {"g": 7, "d": 21}
    assert [group["lr"] for each in optimizer.values() for group in each.param_groups] == [
        0.01 * 0.5**7,
        0.01 * 0.5**2,
    ]
    assert trainer.optimizer is None
    assert list(trainer.lr_schedulers) == ["g", "d"]


def test_optimizer_step_triggers_count_boundaries() -> None:
    """A trigger in optimizer steps is due for all updates of a boundary, and for none between."""
    due: list[str] = []
    hooks = PipelineHooks("trigger")

    @hooks.on_optimizer_step.before(when="3 optimizer steps")
    def record_before(args: PipelineHookArgs) -> None:
        due.append(f"before {args.step_id} {args.optimizer_name}")

    @hooks.on_optimizer_step.after(when="3 optimizer steps")
    def record_after(args: PipelineHookArgs) -> None:
        due.append(f"after {args.step_id} {args.optimizer_name}")

    make_trainer([hooks], max_step=4)()
    assert due == ["before 2 d", "after 2 d", "before 2 g", "after 2 g"]


# --- hooks ------------------------------------------------------------------------------------


def observing() -> list[HookLike]:
    return [
        ProgressBarHookConfig(plain=True)(),
        LossTrackerConfig()(),
        StatsMonitorConfig()(),
        MetricsLoggerConfig(every="1 step")(),
    ]


def test_metrics_carry_the_names_of_optimizers() -> None:
    """Losses, learning rates and gradient norms are published for each optimizer."""
    model = make_model()
    optimizer = adams(model)
    optimizer["d"] = torch.optim.SGD([{"params": [p]} for p in model["d"].parameters()], lr=0.1)
    trainer = make_trainer(observing(), model=model, optimizer=optimizer)
    trainer()
    names = {name for name in trainer.metrics.names() if not name.startswith("perf/")}
    assert names == {
        *("grad_norm/g", "grad_norm/d", "lr/g", *(f"lr/d/group{i}" for i in range(4))),
        *("loss/g", "loss/d", "loss/g_epoch", "loss/d_epoch"),
    }


def test_updates_within_a_batch_count_as_compute() -> None:
    """The time of named steps is compute time, not that of hooks."""

    class Slow(GAN):
        def forward(self, model: Any, batch: Batch) -> NamedSteps:
            for name, loss in super().forward(model, batch):
                time.sleep(0.02)
                yield name, loss

    records: dict[str, float] = {}
    hooks = PipelineHooks("records")

    @hooks.register_for_loop
    def listen(args: PipelineHookArgs) -> Any:
        return args.metrics.listen(
            lambda record: records.update({v.name: v.value for v in record.values})
        )

    make_trainer([*observing()[1:], hooks], Slow(), max_step=2)()
    assert records["perf/compute_s"] >= 0.04
    assert records["perf/hooks_s"] < 0.02


def test_metrics_of_optimizers_can_be_monitored() -> None:
    """Hooks may wait for the metrics of an optimizer; an unknown name is an error at the start."""
    bar = ProgressBarHookConfig(plain=True, metrics=["grad_norm/g", "loss/d_epoch", "lr/g"])
    make_trainer([*observing()[1:], bar()])()
    wrong = ProgressBarHookConfig(plain=True, metrics=["loss/x"])
    trainer = make_trainer([*observing()[1:], wrong()])
    with pytest.raises(UnknownMetricError, match="loss/x"):
        trainer()
    assert trainer.progress.global_step_id == 0


def test_a_frozen_optimizer_pauses() -> None:
    """While a hook freezes all parameters of an optimizer, its losses change nothing."""
    freeze = FreezeHookConfig(patterns=["d.*"], until_step=4)
    trainer = make_trainer([freeze()], max_step=4)
    before = state_of(trainer.model["d"])  # type: ignore[index]  # a ModuleDict
    trainer()
    assert_equal(trainer.model["d"].state_dict(), before)  # type: ignore[index]  # a ModuleDict
    assert trainer.progress.optimizer_steps == {"g": 4, "d": 4}


def test_clipping_can_name_its_optimizers() -> None:
    """Gradients of the named optimizer are clipped by its own norm, and others are not."""
    norms: dict[str, float] = {}
    hooks = PipelineHooks("norms")

    @hooks.on_optimizer_step.before
    def measure(args: PipelineHookArgs) -> None:
        assert args.optimizer is not None
        assert args.optimizer_name is not None
        gradients = [p.grad for g in args.optimizer.param_groups for p in g["params"]]
        norms[args.optimizer_name] = float(torch.nn.utils.get_total_norm(gradients))

    clipping = GradientClippingHookConfig(max_norm=1e-3, optimizers=["d"])
    trainer = make_trainer([clipping(), hooks], max_step=1)
    trainer()
    assert norms["d"] == pytest.approx(1e-3, rel=1e-3)
    assert norms["g"] > 1e-2
    assert "grad_norm/d" in trainer.metrics.names()
    assert "grad_norm/g" not in trainer.metrics.names()


class Poisoned(GAN):
    """GAN whose third critic loss is NaN."""

    calls = 0

    def forward(self, model: Any, batch: Batch) -> NamedSteps:
        self.calls += 1
        for name, loss in super().forward(model, batch):
            yield name, loss * (torch.nan if name == "d" and self.calls == 3 else 1)


def test_the_guard_skips_the_update_of_one_optimizer() -> None:
    """A NaN loss of the critic skips its update only, and the message names the optimizer."""
    trainer = make_trainer([NonFiniteGuardConfig(policy="skip")()], Poisoned())
    trainer()
    assert trainer.progress.optimizer_steps == {"g": 7, "d": 6}
    assert trainer.progress.skipped_optimizer_steps == 1
    assert trainer.progress.optimizer_step_id == 7
    failing = make_trainer([NonFiniteGuardConfig()()], Poisoned())
    with pytest.raises(FloatingPointError, match="norm is nan for the optimizer 'd'") as caught:
        failing()
    assert "quarantine" not in str(caught.value)  # for one optimizer only


def test_guards_can_differ_by_optimizer() -> None:
    """A guard for the generator ignores a NaN loss of the critic, which another guard skips."""
    only_g = NonFiniteGuardConfig(optimizers=["g"])()
    only_g.name = "raise"
    skip_d = NonFiniteGuardConfig(policy="skip", optimizers=["d"])()
    trainer = make_trainer([only_g, skip_d], Poisoned())
    trainer()
    assert trainer.progress.optimizer_steps == {"g": 7, "d": 6}


@pytest.mark.parametrize("read", ["one update late", "at logging points"])
def test_the_guard_finds_bad_updates_later(read: Any) -> None:
    """Checks after the update find a NaN loss of one optimizer as well."""
    hooks = [NonFiniteGuardConfig(read=read)(), *observing()]
    trainer = make_trainer(hooks, Poisoned())
    with pytest.raises(FloatingPointError, match="made before the values were read"):
        trainer()
    assert trainer.progress.global_step_id in (2, 3)


def test_the_guard_rolls_back_named_updates(tmp_path: Path) -> None:
    """A NaN loss of one optimizer returns to the last checkpoint, and the run completes."""
    guard = NonFiniteGuardConfig(then="rollback")()
    save = SaveCheckpointConfig(every="2 steps")()
    trainer = make_trainer([guard, save], Poisoned(), run_folder=tmp_path)
    trainer()
    assert guard.rollbacks == 1
    assert trainer.progress.optimizer_steps == {"g": 7, "d": 7}


@pytest.mark.parametrize(("name", "updates"), [(None, 7), ("g", 2)])
def test_ema_averages_once_a_step_or_after_one_optimizer(name: str | None, updates: int) -> None:
    """The average counts steps with any update, or the updates of the named optimizer."""
    ema = EMAConfig(decay=0.5, optimizer=name)()
    make_trainer([ema], Critics())()
    assert ema.state_dict()["updates"] == updates


# --- checkpoints ------------------------------------------------------------------------------


def all_hooks(stop_after: int | None = None) -> list[HookLike]:
    stop = PipelineHooks("stop")

    @stop.on_step.after
    def request(args: PipelineHookArgs) -> None:
        if args.global_step_id + 1 == stop_after:
            args.requests.stop("the test stops here")

    return [
        *observing(),
        GradientClippingHookConfig(max_norm=1.0)(),
        NonFiniteGuardConfig(policy="skip")(),
        EMAConfig(decay=0.9)(),
        SaveCheckpointConfig(every="3 steps")(),
        stop,
    ]


def stopping_trainer(folder: Path, stop_after: int | None, **options: Any) -> HookBasedTrainer:
    model = make_model()
    outside = torch.nn.Parameter(torch.zeros(()))
    optimizer = adams(model)
    optimizer["d"].add_param_group({"params": [outside], "lr": 0.1})

    class WithOutside(Critics):
        def forward(self, model: Any, batch: Batch) -> NamedSteps:
            for name, loss in super().forward(model, batch):
                yield name, loss + (outside - 1) ** 2 if name == "d" else loss

    processor = WithOutside(every=2)
    trainer = make_trainer(
        all_hooks(stop_after),
        processor,
        model=model,
        optimizer=optimizer,
        lr_scheduler={"g": StepLR(optimizer["g"], 2, 0.5)},
        run_folder=folder,
        max_epoch=2,
        **options,
    )
    processor.calls = trainer.progress.global_step_id
    return trainer


def full_state(trainer: HookBasedTrainer) -> dict[str, Any]:
    from robo_orchard_lab.testing.run_record import state_facts

    facts = state_facts(trainer)
    return {n: v for n, v in facts.items() if "perf" not in n and not n.startswith("random")}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(accumulate: int, tmp_path: Path) -> None:
    """Weights, both optimizers, LR scheduler and hook states are equal after a stop anywhere.

    With windows of three steps, most stops are within a window that has gradients of both losses.
    """
    straight = stopping_trainer(tmp_path / "straight", None, accumulate=accumulate)
    straight()
    expected = full_state(straight)
    assert any(name.startswith("optimizer d d.group1.param0.") for name in expected)
    for stop_after in (1, 2, 4, 5, 7, 11):
        folder = tmp_path / str(stop_after)
        stopping_trainer(folder, stop_after, accumulate=accumulate)()
        resumed = stopping_trainer(folder, None, accumulate=accumulate, resume_from="auto")
        assert resumed.progress.global_step_id == stop_after
        resumed()
        found = full_state(resumed)
        assert {n for n in expected if found.get(n) != expected[n]} == set()
        assert found.keys() == expected.keys()


def renamed(model: Any) -> dict[str, torch.optim.Optimizer]:
    return dict(zip(("gen", "d"), adams(model).values(), strict=True))


def other_class(model: Any) -> dict[str, torch.optim.Optimizer]:
    return {**adams(model), "d": torch.optim.SGD(model["d"].parameters(), 0.1)}


def moved(model: Any) -> dict[str, torch.optim.Optimizer]:
    last = [*model["g"].parameters()][-1]
    rest = [*model["g"].parameters()][:-1]
    return {
        "g": torch.optim.Adam(rest, 0.01),
        "d": torch.optim.Adam([*model["d"].parameters(), last], 0.01),
    }


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (renamed, r"expected the optimizer.gen of the saved run, none; found Adam"),
        (other_class, r"expected the optimizer.d of the saved run, Adam; found SGD"),
        (moved, r"the optimizer.g has a parameter group that was not saved"),
        (
            lambda model: torch.optim.Adam(model.parameters()),
            r"expected the optimizer of the saved run, none; found Adam",
        ),
        (
            lambda model: {"g": torch.optim.Adam(model.parameters())},
            r"expected the optimizer.d of the saved run, Adam; found none",
        ),
    ],
)
def test_resume_names_the_optimizer_that_differs(
    optimizers: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    """A checkpoint of other optimizers is refused with the name, before anything changes."""
    make_trainer(max_step=2).save_checkpoint(tmp_path / "saved")
    model = make_model()
    before = state_of(model)
    with pytest.raises(CheckpointError, match=message):
        make_trainer(
            model=model, optimizer=optimizers(model), resume_from=tmp_path / "saved", max_step=2
        )
    assert_equal(model.state_dict(), before)


# --- errors -----------------------------------------------------------------------------------


def shared(model: Any) -> dict[str, torch.optim.Optimizer]:
    return {**adams(model), "d": torch.optim.Adam(model.parameters())}


@pytest.mark.parametrize(
    ("optimizers", "options", "message"),
    [
        (lambda model: {}, {}, "found an empty mapping; pass"),
        (lambda model: {"a b": adams(model)["g"]}, {}, "names that are identifiers.* 'a b'"),
        (
            lambda model: {"g": 1},
            {},
            r"optimizer\['g'\]: expected a torch.optim.Optimizer, found 1",
        ),
        (shared, {}, "each parameter in one optimizer, found g.0.weight in 'g' and 'd'"),
        (lambda model: {"g": adams(model)["g"]}, {}, r"found none for d.0.weight, .* \(4 param"),
        (adams, {"lr_scheduler": {"gen": None}}, "lr_scheduler: expected names .*'gen'"),
        (adams, {"lr_scheduler": 3}, "a mapping of names to LR schedulers"),
        (adams, {"lr_scheduler_every": "epoch"}, "lr_scheduler_every='epoch': expected an LR"),
        (adams, {"lr_scheduler_every": {"x": "epoch"}}, "lr_scheduler_every: .* found 'x'"),
        (adams, {"lr_scheduler_every": {"d": "epoch"}}, r"lr_scheduler_every\['d'\]='epoch': exp"),
        (adams, {"lr_scheduler_monitor": {"d": "loss"}}, r"lr_scheduler_monitor\['d'\]='loss' is"),
        (adams, {"lr_scheduler_monitor": "loss"}, "expected a ReduceLROnPlateau, found none"),
    ],
)
def test_wrong_optimizers_are_refused(
    optimizers: Callable[[Any], Any], options: dict[str, Any], message: str
) -> None:
    """Names, parameters and LR schedulers are checked before the first step."""
    model = make_model()
    with pytest.raises(PipelineConfigError, match=message):
        make_trainer(model=model, optimizer=optimizers(model), **options)


def test_several_optimizers_need_a_backward_pass() -> None:
    """A processor without a backward pass is refused."""
    with pytest.raises(PipelineConfigError, match="need_backward=True for several"):
        make_trainer(processor=GAN(need_backward=False))


def test_an_lr_scheduler_of_another_optimizer_is_refused() -> None:
    """Each LR scheduler must belong to the optimizer of its name."""
    model = make_model()
    optimizer = adams(model)
    scheduler = {"g": StepLR(optimizer["d"], 1)}
    with pytest.raises(PipelineConfigError, match=r"lr_scheduler\['g'\]: expected an LR scheduler"):
        make_trainer(model=model, optimizer=optimizer, lr_scheduler=scheduler)
    with pytest.raises(PipelineConfigError, match="one LR scheduler for one optimizer, found a"):
        make_trainer(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            lr_scheduler=scheduler,
        )


def wrong_results() -> dict[str, Callable[[Any, Any], Any]]:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        return loss_g(model, model["g"](batch[1]))

    def unknown(model: Any, batch: Any) -> Any:
        yield "gen", loss(model, batch)

    def nameless(model: Any, batch: Any) -> Any:
        yield loss(model, batch)

    return {
        "optimizer: .*a loss for 'gen', which is no optimizer; optimizers: g, d": unknown,
        "a loss for 'q', which is no optimizer; optimizers: g, d": lambda model, batch: (
            None,
            {"q": loss(model, batch)},
        ),
        r"must yield \(name, loss\) .* got a yield of tensor": nameless,
        "or return .outputs, .'g': loss, 'd': loss.*got tuple": lambda model, batch: (
            None,
            loss(model, batch),
        ),
        "a weight, which several optimizers don't support": lambda model, batch: (
            None,
            {"g": loss(model, batch)},
            1.0,
        ),
        r"a scalar loss .*'g', found a tensor of shape \(4, 2\)": lambda model, batch: (
            None,
            {"g": model["g"](batch[1])},
        ),
        "found a tensor of shape .., without a gradient": lambda model, batch: (
            None,
            {"g": loss(model, batch).detach()},
        ),
        "the loss for 'g' reaches none of its 6 parameters": lambda model, batch: (
            None,
            {"g": loss_d(model, *([batch[0]] * 2))},
        ),
    }


@pytest.mark.parametrize("message", list(wrong_results()))
def test_wrong_losses_end_the_first_step(message: str) -> None:
    """A result of the wrong form is an error in the first step, before any update."""
    processor = SimpleBatchProcessor.from_callable(wrong_results()[message])
    trainer = make_trainer(processor=processor)
    before = state_of(trainer.model["d"])  # type: ignore[index]  # a ModuleDict
    with pytest.raises(BatchProcessorError, match=message):
        trainer()
    assert_equal(trainer.model["d"].state_dict(), before)  # type: ignore[index]  # a ModuleDict


@pytest.mark.parametrize("processor", [GAN(), JointGAN()], ids=["named steps", "mapping"])
def test_one_optimizer_refuses_named_losses(processor: SimpleBatchProcessor) -> None:
    """The error for a trainer with one optimizer states how to pass several."""
    model = make_model()
    trainer = make_trainer(
        processor=processor, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    with pytest.raises(BatchProcessorError, match=r"pass optimizer=\{name: ...\}"):
        trainer()


def test_losses_that_share_a_graph_name_the_remedy() -> None:
    """A second yielded loss on a freed graph is torch's error with the way out."""

    class Shared(SimpleBatchProcessor):
        def forward(self, model: Any, batch: Batch) -> NamedSteps:
            judged = model["d"](model["g"](batch[1]))
            yield "d", judged.square().mean()
            yield "g", judged.mean()

    with pytest.raises(RuntimeError, match="second time") as caught:
        make_trainer(processor=Shared())()
    assert "two yielded losses share a part of their graph" in str(caught.value.__notes__)


def test_a_loss_from_before_an_update_names_the_remedy() -> None:
    """A loss computed before the update of its network is torch's error with the way out."""

    class Early(SimpleBatchProcessor):
        def forward(self, model: Any, batch: Batch) -> NamedSteps:
            fake = model["g"](batch[1])
            early = loss_g(model, fake)
            yield "d", loss_d(model, batch[0], fake)
            yield "g", early

    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        make_trainer(processor=Early())()
    assert "compute a loss after the yields" in str(caught.value.__notes__)


def test_a_second_loss_of_a_step_is_refused_with_accumulation() -> None:
    """Within a window, a second update would use the last batch only; without one, it is right."""

    class Twice(SimpleBatchProcessor):
        def forward(self, model: Any, batch: Batch) -> NamedSteps:
            fake = model["g"](batch[1])
            for _ in range(2):
                yield "d", loss_d(model, batch[0], fake)
            yield "g", loss_g(model, fake)

    with pytest.raises(BatchProcessorError, match="one loss for 'd' in a step with gradient accu"):
        make_trainer(processor=Twice(), accumulate=2)()
    trainer = make_trainer(processor=Twice(), max_step=2)
    trainer()
    assert trainer.progress.optimizer_steps == {"g": 2, "d": 4}


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (GradientClippingHookConfig(max_norm=1.0, optimizers=["x"]), "optimizers.0: no optimizer"),
        (EMAConfig(optimizer="x"), "EMA.optimizer: no optimizer is named 'x'; optimizers: g, d"),
        (NonFiniteGuardConfig(optimizers=["x"]), "NonFiniteGuard.optimizers.0: no optimizer is"),
        (NonFiniteGuardConfig(quarantine=Path("q")), "quarantine needs a trainer with one"),
    ],
)
def test_hooks_refuse_unknown_names(hook: Any, message: str) -> None:
    """A hook for an unknown optimizer, and a quarantine, end the run before the first step."""
    trainer = make_trainer([hook])
    with pytest.raises(PipelineConfigError, match=message):
        trainer()
    assert trainer.progress.global_step_id == 0
