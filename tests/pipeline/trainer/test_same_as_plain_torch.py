"""The trainer's weights equal a plain torch loop's, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import DataError, PipelineConfigError
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.gradient_clipping import GradientClippingHook
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHooks
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], LRScheduler]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused_adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
SCHEDULERS: dict[str, MakeScheduler] = {
    "step": lambda o: StepLR(o, step_size=2, gamma=0.5),
    "one_cycle": lambda o: OneCycleLR(o, max_lr=0.2, total_steps=50),
}


def plain_loop(
    make_optimizer: MakeOptimizer,
    make_scheduler: MakeScheduler | None,
    loader: DataLoader[Any] | list[Any],
    epochs: int,
    accumulate: int = 1,
    clip: dict[str, float] | None = None,
    model: torch.nn.Module | None = None,
) -> tuple[list[torch.Tensor], float]:
    """Train in a plain loop and return the weights and the last learning rate."""
    model = make_model() if model is None else model
    optimizer = make_optimizer(model.parameters())
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    for _ in range(epochs):
        batches = len(loader)
        for index, batch in enumerate(loader):
            first = index - index % accumulate
            window = min(accumulate, batches - first)
            _, loss = loss_of(model, batch)
            (loss / window).backward()
            if index == first + window - 1:
                if clip and "max_norm" in clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip["max_norm"])
                elif clip:
                    torch.nn.utils.clip_grad_value_(model.parameters(), clip["max_value"])
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
    return weights(model), optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("schedule", [None, *SCHEDULERS])
@pytest.mark.parametrize("clip", [None, {"max_norm": 0.05}, {"max_value": 0.01}])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_bit_identical(
    optimizer: str, accumulate: int, clip: dict[str, float] | None, schedule: str | None
) -> None:
    """After seven shuffled batches and three epochs, weights and learning rate are equal."""
    make_optimizer = OPTIMIZERS[optimizer]
    make_scheduler = SCHEDULERS[schedule] if schedule else None

    def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
        return make_loader(shuffle=True, generator=torch.Generator().manual_seed(7))

    model = make_model()
    made = make_optimizer(model.parameters())
    trainer = make_trainer(
        [GradientClippingHookConfig(**clip)] if clip else [],  # type: ignore[arg-type]  # floats
        model=model,
        loader=loader(),
        optimizer=made,
        lr_scheduler=make_scheduler(made) if make_scheduler else None,
        accumulate=accumulate,
        max_epoch=3,
    )
    trainer()

    reference = make_model()
    expected, rate = plain_loop(
        make_optimizer, make_scheduler, loader(), 3, accumulate, clip, model=reference
    )
    assert equal(weights(model), expected)
    assert made.param_groups[0]["lr"] == rate
    assert trainer.progress.optimizer_step_id == (21 if accumulate == 1 else 9)


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Draws from torch's RNG while loading, as augmentation does."""

    def __len__(self) -> int:
        return 28

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4,), float(index)) + torch.rand(4), torch.rand(2)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_loading_does_not_change_dropout(workers: int, accumulate: int) -> None:
    """Weights with random augmentation equal a plain loop's over the same batches."""

    def model_with_dropout() -> torch.nn.Module:
        return torch.nn.Sequential(make_model(), torch.nn.Dropout(0.5))

    batches: list[Any] = []
    recorder = PipelineHooks("recorder")
    recorder.on_step.before(lambda args: batches.append(args.batch))
    model = model_with_dropout()
    trainer = make_trainer(
        [recorder],
        model=model,
        loader=DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        accumulate=accumulate,
        max_epoch=1,
    )
    torch.manual_seed(5)
    trainer()
    reference = model_with_dropout()
    torch.manual_seed(5)
    expected, _ = plain_loop(
        lambda p: torch.optim.SGD(p, lr=0.1), None, batches, 1, accumulate, model=reference
    )
    assert equal(weights(model), expected)


@pytest.mark.parametrize("clip", [{"max_norm": 0.05}, {"max_value": 0.01}])
def test_clipping_publishes_the_norm_before_clipping(clip: dict[str, float]) -> None:
    """The logged grad_norm is the joint norm of the unclipped gradients of the last update."""
    loader = make_loader(1)
    model = make_model()
    config = GradientClippingHookConfig(**clip)  # type: ignore[arg-type]  # floats
    trainer = make_trainer(config, model=model, loader=loader, max_step=1)
    trainer()
    reference = make_model()
    loss_of(reference, next(iter(loader)))[1].backward()
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in reference.parameters() if p.grad is not None]
    )
    assert trainer.metrics.latest("grad_norm") == norm.item()


def test_clipping_needs_exactly_one_bound() -> None:
    """Zero or two bounds are refused, and so is a bound of zero."""
    with pytest.raises(ValueError, match="exactly one of max_norm and max_value"):
        GradientClippingHookConfig()
    with pytest.raises(ValueError, match="exactly one of max_norm and max_value"):
        GradientClippingHookConfig(max_norm=1.0, max_value=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        GradientClippingHookConfig(max_norm=0.0)
    assert isinstance(GradientClippingHookConfig(max_norm=1.0)(), GradientClippingHook)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9),
    accumulate=st.integers(2, 4),
    sized=st.booleans(),
)
def test_micro_batches_equal_one_batch(sizes: list[int], accumulate: int, sized: bool) -> None:
    """N micro-batches of any sizes update the weights as one joined batch."""
    if sized:  # a DataLoader's batches: equal but for the last
        sizes = [4] * len(sizes) + ([sizes[-1]] if sizes[-1] < 4 else [])
    inputs, targets = torch.randn(sum(sizes), 4).double(), torch.randn(sum(sizes), 2).double()
    batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    loader: Iterable[Any] = batches
    if sized:
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    model = make_model().double()
    make_trainer(model=model, loader=loader, accumulate=accumulate, max_epoch=1)()

    joined = [
        tuple(torch.cat(parts) for parts in zip(*batches[i : i + accumulate], strict=True))
        for i in range(0, len(batches), accumulate)
    ]
    reference = make_model().double()
    make_trainer(model=reference, loader=joined, max_epoch=1)()
    for ours, theirs in zip(weights(model), weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_window_that_max_step_cuts_short_is_committed() -> None:
    """Five steps in windows of three average two batches in the second update."""
    loader = make_loader()
    model = make_model()
    trainer = make_trainer(model=model, loader=loader, accumulate=3, max_step=5)
    trainer()
    assert trainer.progress.optimizer_step_id == 2
    reference = make_model()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        if index == 5:
            break
        (loss_of(reference, batch)[1] / (3 if index < 3 else 2)).backward()
        if index in (2, 4):
            optimizer.step()
            optimizer.zero_grad()
    assert equal(weights(model), weights(reference))


def test_one_cycle_stays_at_its_last_rate() -> None:
    """More updates than OneCycleLR has steps are no error, and the learning rate stays."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=5)
    trainer = make_trainer(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, max_optimizer_step=14
    )
    trainer()
    assert trainer.progress.optimizer_step_id == 14
    assert scheduler.last_epoch == 5


def test_the_lr_scheduler_may_step_once_an_epoch() -> None:
    """The LR scheduler steps after each completed epoch with lr_scheduler_every="epoch"."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    trainer = make_trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        lr_scheduler_every="epoch",
        max_step=16,  # two epochs of seven, and two steps
    )
    trainer()
    assert scheduler.last_epoch == 2
    assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("unit", [None, "epoch", "optimizer_step"])
def test_plateau_gets_the_mean_loss(unit: Any) -> None:
    """ReduceLROnPlateau sees the mean loss since its last step, by default once an epoch."""
    loader = make_loader(6)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[float] = []

    class Watched(ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # as its parent
            seen.append(float(metrics))
            super().step(metrics)

    trainer = make_trainer(
        model=model,
        loader=loader,
        optimizer=optimizer,
        lr_scheduler=Watched(optimizer, factor=0.1, patience=0),
        lr_scheduler_every=unit,
        accumulate=2,
        max_epoch=2,
    )
    trainer()

    reference = make_model()
    updates = torch.optim.SGD(reference.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(updates, factor=0.1, patience=0)
    losses: list[float] = []
    expected: list[float] = []

    def move() -> None:
        expected.append(sum(losses) / len(losses))
        plateau.step(expected[-1])
        losses.clear()

    for _ in range(2):
        for index, batch in enumerate(loader):
            loss = loss_of(reference, batch)[1]
            losses.append(loss.item())
            (loss / 2).backward()
            if index % 2 == 1:
                updates.step()
                updates.zero_grad()
                if unit == "optimizer_step":
                    move()
        if unit != "optimizer_step":
            move()
    assert seen == pytest.approx(expected, rel=1e-12)
    assert equal(weights(model), weights(reference))


def test_an_unknown_lr_scheduler_unit_is_refused() -> None:
    """An unknown lr_scheduler_every is refused with the valid values."""
    with pytest.raises(PipelineConfigError, match="one of 'optimizer_step', 'epoch', got 'step'"):
        make_trainer(lr_scheduler_every="step", max_step=1)


class Sample:
    """A batch without a size."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets


class CountingProcessor(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        return loss_of(model, (batch.inputs, batch.targets))

    def count_samples(self, batch: Sample) -> int:
        return len(batch.inputs)


def test_a_processor_can_count_the_samples(caplog: pytest.LogCaptureFixture) -> None:
    """count_samples weighs batches; without a count, batches have equal weights."""
    inputs, targets = torch.randn(5, 4), torch.randn(5, 2)
    batches = [Sample(inputs[:4], targets[:4]), Sample(inputs[4:], targets[4:])]

    def train(processor: SimpleBatchProcessor, loader: Any, accumulate: int) -> list[torch.Tensor]:
        model = make_model()
        make_trainer(
            model=model,
            loader=loader,
            batch_processor=processor,
            accumulate=accumulate,
            max_epoch=1,
        )()
        return weights(model)

    joined = train(CountingProcessor(), [Sample(inputs, targets)], 1)
    for ours, theirs in zip(train(CountingProcessor(), batches, 2), joined, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not caplog.text
    uncounted = SimpleBatchProcessor.from_callable(CountingProcessor().forward)
    train(uncounted, batches, 2)
    assert "a batch of type Sample has no tensor to count its samples by" in caplog.text


class LyingSampler(torch.utils.data.Sampler[int]):
    def __init__(self, says: int, yields: int) -> None:
        self.says, self.yields = says, yields

    def __len__(self) -> int:
        return self.says

    def __iter__(self) -> Any:
        return iter(range(self.yields))


@pytest.mark.parametrize("limit", [{"max_epoch": 1}, {"max_step": 20}])
@pytest.mark.parametrize(("says", "yields", "compared"), [(28, 20, "fewer"), (12, 28, "more")])
def test_a_sampler_of_another_length_is_an_error(
    says: int, yields: int, compared: str, limit: dict[str, Any]
) -> None:
    """A wrong sampler length is an error, so no batch is lost silently."""
    trainer = make_trainer(
        loader=make_loader(sampler=LyingSampler(says, yields)), accumulate=3, **limit
    )
    with pytest.raises(
        DataError, match=f"yielded {compared} batches than the length of its sampler"
    ):
        trainer()


class WithoutSetToNone(torch.optim.SGD):
    def zero_grad(self) -> None:  # type: ignore[override]  # what is tested
        super().zero_grad()


class KeepingByDefault(torch.optim.SGD):
    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("cls", [WithoutSetToNone, KeepingByDefault])
def test_gradients_are_freed_by_any_zero_grad(cls: type[torch.optim.SGD]) -> None:
    """An optimizer without set_to_none works, and a default of set_to_none=False is overridden."""
    model = make_model()
    make_trainer(model=model, optimizer=cls(model.parameters(), lr=0.1), max_epoch=1)()
    assert all(parameter.grad is None for parameter in model.parameters())
    expected, _ = plain_loop(lambda p: torch.optim.SGD(p, lr=0.1), None, make_loader(), 1)
    assert equal(weights(model), expected)


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    """LBFGS evaluates the model within its step, which is refused by the constructor."""
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(PipelineConfigError, match=r"LBFGS\.step needs a closure"):
        make_trainer(model=model, optimizer=optimizer, max_step=1)


def test_old_gradients_do_not_enter_the_first_update() -> None:
    """Gradients from before the run are dropped."""
    model = make_model()
    loss_of(model, next(iter(make_loader())))[1].backward()
    make_trainer(model=model, max_epoch=1)()
    expected, _ = plain_loop(lambda p: torch.optim.SGD(p, lr=0.1), None, make_loader(), 1)
    assert equal(weights(model), expected)


def test_a_compiled_model_trains_the_same() -> None:
    """torch.compile around the model leaves the weights equal."""
    model = make_model()
    compiled: Any = torch.compile(model, backend="eager")
    make_trainer(model=compiled, max_epoch=2)()
    expected, _ = plain_loop(lambda p: torch.optim.SGD(p, lr=0.1), None, make_loader(), 2)
    assert equal(weights(model), expected)


def test_bf16_equals_autocast() -> None:
    """The model runs under autocast with mixed_precision="bf16", and its outputs are fp32."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    HookBasedTrainer(
        Accelerator(cpu=True, mixed_precision="bf16"),
        model,
        make_loader(),
        SimpleBatchProcessor.from_callable(loss_of),
        optimizer,
        max_epoch=1,
    )()
    reference = make_model()
    updates = torch.optim.SGD(reference.parameters(), lr=0.1)
    for inputs, targets in make_loader():
        with torch.autocast("cpu", torch.bfloat16):
            outputs = reference(inputs)
        torch.nn.functional.mse_loss(outputs.float(), targets).backward()
        updates.step()
        updates.zero_grad()
    assert equal(weights(model), weights(reference))


class WithMethod(torch.nn.Module):
    """Model whose loss comes from a method, as in Lightning modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layers(inputs)
        return outputs

    def compute_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layers(inputs).float(), targets)


def test_bf16_covers_methods_of_the_model() -> None:
    """Autocast is around all of the batch processor, in training and in evaluation."""
    model = WithMethod()
    processor = SimpleBatchProcessor.from_callable(
        lambda model, batch: (None, model.compute_loss(*batch))
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    HookBasedTrainer(accelerator, model, make_loader(), processor, optimizer, max_epoch=1)()
    reference = WithMethod()
    updates = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in make_loader():
        with torch.autocast("cpu", torch.bfloat16):
            loss = reference.compute_loss(*batch)
        loss.backward()
        updates.step()
        updates.zero_grad()
    assert equal(weights(model), weights(reference))
    batch = next(iter(make_loader(1)))
    values = Evaluator(model, processor, {"val": [batch]}, accelerator=accelerator).evaluate()
    with torch.no_grad():
        exact = reference.compute_loss(*batch).item()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = reference.compute_loss(*batch).item()
    assert values == {"val/loss": rounded}
    assert rounded != exact


def test_bf16_keeps_gradients_after_a_call_without_gradients() -> None:
    """A call under ``no_grad`` before, as for a target, does not end the gradients of a call."""
    model = make_model()
    before = weights(model)

    def forward(model: Any, batch: Any) -> Any:
        inputs, _ = batch
        with torch.no_grad():
            targets = model(inputs) + 1
        outputs = model(inputs)
        return outputs, torch.nn.functional.mse_loss(outputs, targets)

    HookBasedTrainer(
        Accelerator(cpu=True, mixed_precision="bf16"),
        model,
        make_loader(),
        SimpleBatchProcessor.from_callable(forward),
        torch.optim.SGD(model.parameters(), lr=0.1),
        max_step=1,
    )()
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_an_overflow_skips_the_update_and_the_lr_scheduler() -> None:
    """Infinite gradients skip the update and are counted with a gradient scaler."""
    accelerator = Accelerator(cpu=True)
    # On a CPU, Accelerate makes no scaler; torch's works as on a GPU.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=100)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    batches = list(make_loader(3))
    batches[1][0].fill_(float("inf"))
    committed: list[bool | None] = []
    watching = PipelineHooks()
    watching.register_hook(
        "on_optimizer_step",
        HookContext.from_callable(after=lambda args: committed.append(args.update_committed)),
    )
    trainer = HookBasedTrainer(
        accelerator,
        model,
        batches,
        SimpleBatchProcessor.from_callable(loss_of),
        optimizer,
        scheduler,
        [watching],
        max_epoch=1,
    )
    trainer()
    assert committed == [True, False, True]
    assert trainer.progress.optimizer_step_id == 2
    assert trainer.progress.skipped_optimizer_steps == 1
    assert scheduler.last_epoch == 2
    expected, _ = plain_loop(
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda o: StepLR(o, step_size=1, gamma=0.5),
        [batches[0], batches[2]],
        1,
    )
    for ours, theirs in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_plateau_follows_a_monitored_metric(tmp_path: Path) -> None:
    """It steps with each value, in the step that published the value, also after a resume."""
    values = {3: 1.0, 6: 0.5, 9: math.inf, 12: math.nan, 15: 0.4, 18: 0.6}

    def trained(*, resume_from: Path | None = None, max_step: int) -> tuple[Any, Any]:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        hooks = PipelineHooks("publishes")
        rates: dict[int, float] = {}

        @hooks.on_step.before
        def note(args: PipelineHookArgs) -> None:
            rates[args.progress.steps_done] = optimizer.param_groups[0]["lr"]

        @hooks.on_step.after(when="3 steps")
        def publish(args: PipelineHookArgs) -> None:
            args.metrics.publish("rollout/loss", values[args.progress.steps_done])

        trainer = make_trainer(
            [hooks],
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            lr_scheduler_monitor="rollout/loss",
            max_step=max_step,
            resume_from=resume_from,
        )
        trainer()
        if resume_from is None:
            trainer.save_checkpoint(tmp_path / f"at_{max_step}")
        return rates, scheduler.state_dict()

    straight, state = trained(max_step=18)
    changes = [step - 1 for step in straight if step > 1 and straight[step] != straight[step - 1]]
    assert changes == [9, 12]
    assert (state["best"], state["num_bad_epochs"]) == (0.4, 0)  # reset by the last reduction
    assert state["last_epoch"] == 6
    trained(max_step=10)
    rates, resumed = trained(resume_from=tmp_path / "at_10", max_step=18)
    assert resumed == state
    assert rates == {step: rate for step, rate in straight.items() if step > 10}


def test_a_monitor_needs_a_plateau() -> None:
    """Another LR scheduler, or an interval as well, is refused."""
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    for scheduler, every, found in (
        (StepLR(optimizer, 1), None, "for ReduceLROnPlateau, found StepLR; omit it"),
        (ReduceLROnPlateau(optimizer), "epoch", "found also lr_scheduler_every='epoch'"),
    ):
        with pytest.raises(PipelineConfigError, match=found):
            make_trainer(
                optimizer=optimizer,
                lr_scheduler=scheduler,
                lr_scheduler_every=every,
                lr_scheduler_monitor="x",
                max_step=1,
            )


@pytest.mark.parametrize(("max_step", "warned"), [(10, False), (14, True)])
def test_a_longer_run_warns_of_its_lr_scheduler(
    max_step: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A resume past the end of OneCycleLR says where the learning rate stays, and what to do."""

    def trainer(limit: int, resume_from: Path | None = None) -> Any:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=5)
        return make_trainer(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            loader=make_loader(10),
            accumulate=2,
            max_step=limit,
            resume_from=resume_from,
        )

    first = trainer(4)
    first()
    first.save_checkpoint(tmp_path / "saved")
    trainer(max_step, tmp_path / "saved")
    message = (
        "OneCycleLR ends after 5 steps (total_steps, saved in the checkpoint), the run after 7: "
        "it is at step 2"
    )
    assert (message in caplog.text) is warned
    assert ("start a new run" in caplog.text) is warned
