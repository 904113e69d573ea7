"""The exponential moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError, StateError
from robo_orchard_lab.pipeline.hooks.ema import EMA, EMAConfig
from robo_orchard_lab.pipeline.hooks.freeze import FreezeHookConfig
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights
from weights_on_ranks import train_on

FORMATS: tuple[Literal["json", "yaml", "toml"], ...] = ("json", "yaml", "toml")
STEPS = 14  # two epochs of seven batches


class Recorder(PipelineHooks):
    """Hook that records the weights after each committed update, and skips some updates."""

    def __init__(self, skip: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.seen: list[list[torch.Tensor]] = []

        @self.on_optimizer_step.before
        def maybe_skip(args: PipelineHookArgs) -> None:
            if args.global_step_id in skip:
                args.skip_reason = "not this one"

        @self.on_optimizer_step.after
        def note(args: PipelineHookArgs) -> None:
            if args.update_committed:
                self.seen.append([w.double() for w in weights(args.model)])


def shadows(ema: EMA) -> list[torch.Tensor]:
    return [tensor.double() for tensor in ema.state_dict()["shadows"].values()]


def closed_form(seen: list[list[torch.Tensor]], decays: list[float]) -> list[torch.Tensor]:
    """Return the average as a weighted sum, the initial weights first."""
    factors = [1.0, *(1.0 - decay for decay in decays)]
    for index, decay in enumerate(decays, start=1):
        factors[:index] = [factor * decay for factor in factors[:index]]
    return [
        torch.stack([f * w for f, w in zip(factors, tensors, strict=True)]).sum(0)
        for tensors in zip(*seen, strict=True)
    ]


def with_batch_norm() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2)
    )


def test_constant_decay_equals_weighted_sum() -> None:
    """After n updates, the average is the weighted sum of all earlier weights."""
    decay, followed = 0.9, Recorder()
    ema = EMAConfig(decay=decay, shadow_dtype="float64")()
    model = make_model()
    start = [w.double() for w in weights(model)]
    make_trainer([followed, ema], model=model, max_epoch=2)()
    terms = [decay**STEPS, *((1 - decay) * decay ** (STEPS - i) for i in range(1, STEPS + 1))]
    expected = [
        sum(term * w for term, w in zip(terms, tensors, strict=True))
        for tensors in zip(start, *followed.seen, strict=True)
    ]
    torch.testing.assert_close(shadows(ema), expected, rtol=1e-12, atol=0)


def test_warm_up_follows_formula() -> None:
    """Each decay is the clamped formula, with t counted from update_after_step."""
    followed = Recorder()
    ema = EMAConfig(
        update_after_step=2,
        inv_gamma=2.0,
        power=0.75,
        min_decay=0.1,
        max_decay=0.6,
        shadow_dtype="float64",
    )()
    model = make_model()
    start = [w.double() for w in weights(model)]
    make_trainer([followed, ema], model=model, max_epoch=2)()
    decays = [0.0, 0.0]
    decays += [min(0.6, max(0.1, 1 - (1 + t / 2.0) ** -0.75)) for t in range(STEPS - 2)]
    assert {0.1, 0.6} < set(decays)  # both bounds are reached
    expected = closed_form([start, *followed.seen], decays)
    torch.testing.assert_close(shadows(ema), expected, rtol=1e-12, atol=0)


def test_warm_up_of_power_one_is_the_mean() -> None:
    """The average with inv_gamma and power 1 is the mean of the weights."""
    followed = Recorder()
    ema = EMAConfig(power=1.0, max_decay=1.0, shadow_dtype="float64")()
    make_trainer([followed, ema], max_epoch=2)()
    expected = [torch.stack(tensors).mean(0) for tensors in zip(*followed.seen, strict=True)]
    torch.testing.assert_close(shadows(ema), expected, rtol=1e-12, atol=1e-15)


def test_skipped_updates_do_not_count() -> None:
    """The average and its decay count only committed updates."""
    followed = Recorder(skip=(0, 3, 4, 9))
    ema = EMAConfig(shadow_dtype="float64")()
    model = make_model()
    start = [w.double() for w in weights(model)]
    trainer = make_trainer([followed, ema], model=model, max_epoch=2)
    trainer()
    assert trainer.progress.skipped_optimizer_steps == 4
    decays = [1 - (1 + t) ** -0.75 for t in range(STEPS - 4)]
    expected = closed_form([start, *followed.seen], decays)
    torch.testing.assert_close(shadows(ema), expected, rtol=1e-12, atol=0)
    assert ema.state_dict()["updates"] == STEPS - 4


def test_average_equals_weights_before_start() -> None:
    """Until update_after_step, the average equals the weights, also after non-finite ones."""
    model = make_model()
    ema = EMAConfig(decay=0.9, update_after_step=7)()
    spoil = PipelineHooks("spoil")

    @spoil.on_optimizer_step.after(when="first")
    def spoil_the_average(args: PipelineHookArgs) -> None:
        model.get_parameter("0.bias").data[0] = float("nan")

    @spoil.on_step.before(when="at steps 2")
    def repair(args: PipelineHookArgs) -> None:
        assert ema.weights()["0.bias"].isnan().any()
        model.get_parameter("0.bias").data[0] = 0.0

    make_trainer([ema, spoil], model=model, max_epoch=1)()
    assert equal(list(ema.weights().values()), weights(model))


def test_average_of_constant_weights_is_exact() -> None:
    """Averaging does not change constant weights, even with a decay close to 1."""
    model = make_model()
    ema = EMAConfig(decay=0.9999)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    make_trainer([ema], model=model, optimizer=optimizer, max_epoch=3)()
    assert equal(list(ema.weights().values()), weights(model))


def test_buffers_are_copied_with_updates() -> None:
    """BatchNorm statistics are copied with an update, not with later batches."""
    model = with_batch_norm()
    ema = EMAConfig(decay=0.5)()
    statistics: dict[int, torch.Tensor] = {}
    watcher = PipelineHooks()

    @watcher.on_step.after
    def watch(args: PipelineHookArgs) -> None:
        statistics[args.global_step_id] = model.get_buffer("1.running_mean").clone()
        if args.global_step_id == 2:
            args.requests.stop("in the middle of a window")

    make_trainer([ema, watcher], model=model, accumulate=2, max_epoch=1)()
    found = ema.weights()
    assert torch.equal(found["1.running_mean"], statistics[1])
    assert not torch.equal(found["1.running_mean"], statistics[2])
    assert found["1.num_batches_tracked"] == 2
    assert model.state_dict()["1.num_batches_tracked"] == 3
    with ema.applied():
        assert model.state_dict()["1.num_batches_tracked"] == 2
    assert model.state_dict()["1.num_batches_tracked"] == 3


def test_replaced_buffers_are_tracked() -> None:
    """The new tensor is averaged and restored if a module replaces a buffer."""

    class Counting(torch.nn.Module):
        calls: torch.Tensor
        table: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("table", torch.ones(3), persistent=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return self.inner(inputs)  # type: ignore[no-any-return]

    model = Counting()
    ema = EMAConfig(decay=0.5)()
    make_trainer([ema], model=model, max_epoch=1)()
    assert ema.weights()["calls"] == 7
    assert list(ema.state_dict()["copies"]) == ["calls"]
    own = model.calls
    with ema.applied():
        model(torch.ones(1, 4))
    assert model.calls is own
    assert own == 7


RECIPE: dict[str, Any] = {
    "update_every": 3,
    "copy_first": True,
    "use_buffers": True,
    "copy_batch_norm": True,
}


@pytest.mark.parametrize("fields", [{}, RECIPE], ids=["default", "recipe"])
@pytest.mark.parametrize("at", [4, 5])
def test_resume_is_exact(at: int, fields: dict[str, Any], tmp_path: Path) -> None:
    """A resume, also within an accumulation window, restores the average bit for bit.

    At step 5 a window is open, so buffers differ from those of the last update.
    """

    starts: list[dict[str, torch.Tensor]] = []

    def run(max_step: int, resume_from: Path | None = None) -> tuple[HookBasedTrainer, EMA]:
        ema = EMAConfig(update_after_step=1, **fields)()
        torch.manual_seed(7)
        stop = PipelineHooks("stop")

        @stop.on_loop.before
        def note_the_start(args: PipelineHookArgs) -> None:
            starts.append(ema.weights())

        @stop.on_step.after
        def stop_there(args: PipelineHookArgs) -> None:
            if args.global_step_id + 1 == max_step:
                args.requests.stop("enough")

        model = with_batch_norm()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        trainer = make_trainer(
            [ema, stop],
            model=model,
            optimizer=optimizer,
            accumulate=2,
            max_epoch=2,
            resume_from=resume_from,
        )
        trainer()
        return trainer, ema

    _, uninterrupted = run(100)
    half, ended = run(at)
    half.save_checkpoint(tmp_path / "half")
    _, resumed = run(100, tmp_path / "half")
    assert equal(list(starts[-1].values()), list(ended.weights().values()))
    expected, found = uninterrupted.state_dict(), resumed.state_dict()
    assert found["updates"] == expected["updates"] == 8
    assert found["averagings"] == expected["averagings"] == (3 if fields else 7)
    for part in ("shadows", "copies"):
        assert list(found[part]) == list(expected[part])
        assert equal(list(found[part].values()), list(expected[part].values()))


def test_a_resumed_completed_run_has_its_average(tmp_path: Path) -> None:
    """The saved average can be applied, saved and evaluated, and training continues from it."""

    def run(max_epoch: int, resume_from: Path | None = None) -> tuple[HookBasedTrainer, EMA]:
        ema = EMAConfig(decay=0.9)()
        trainer = make_trainer([ema], max_epoch=max_epoch, resume_from=resume_from)
        trainer()
        trainer.save_checkpoint(tmp_path / f"{max_epoch}-{resume_from is not None}")
        return trainer, ema

    first, ended = run(1)
    resumed_trainer, resumed = run(1, tmp_path / "1-False")  # saves a checkpoint again
    own = weights(resumed_trainer.model)
    with resumed.applied():
        applied = weights(resumed_trainer.model)
    assert equal(applied, list(ended.weights().values()))
    assert equal(list(resumed.weights().values()), applied)
    assert equal(weights(resumed_trainer.model), own)
    loaders = {"val": make_loader()}
    evaluated = resumed_trainer.evaluate(loaders, weights="EMA")
    assert evaluated == first.evaluate(loaders, weights="EMA") != first.evaluate(loaders)
    _, uninterrupted = run(2)
    _, continued = run(2, tmp_path / "1-True")
    assert equal(list(continued.weights().values()), list(uninterrupted.weights().values()))


def test_applying_the_average_does_not_change_training() -> None:
    """Applying and reading the average after every step leaves training bit-identical."""
    ema = EMAConfig()()
    use = PipelineHooks("use")

    @use.on_step.after
    def apply(args: PipelineHookArgs) -> None:
        with args.run.weight_set("EMA").applied():
            watched[:2](torch.ones(2, 4))  # moves BatchNorm's statistics
        args.run.weight_set("EMA").weights()

    watched, plain = with_batch_norm(), with_batch_norm()
    for model, hooks in ((watched, [ema, use]), (plain, [])):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        make_trainer(hooks, model=model, optimizer=optimizer, max_epoch=1)()
    assert equal(list(watched.state_dict().values()), list(plain.state_dict().values()))
    assert not equal(list(ema.weights().values()), list(plain.state_dict().values()))


def trained(config: EMAConfig, model: torch.nn.Module, **options: Any) -> EMA:
    ema = config()
    make_trainer([ema], model=model, max_epoch=1, **options)()
    return ema


def test_weights_are_restored_after_an_error() -> None:
    """Weights and buffers are restored after any changes by the body."""
    model = with_batch_norm()
    ema = trained(EMAConfig(decay=0.5), model)
    with torch.no_grad():
        model.get_parameter("0.bias")[:2] = torch.tensor([float("nan"), -0.0])
    own = {name: value.clone() for name, value in model.state_dict().items()}
    average = ema.weights()

    def damage() -> None:
        with ema.applied():
            assert equal(list(model.state_dict().values()), list(average.values()))
            model(torch.randn(8, 4))
            for parameter in model.parameters():
                torch.nn.init.ones_(parameter)
            raise KeyError("from the body")

    with pytest.raises(KeyError, match="from the body"):
        damage()
    for name, value in model.state_dict().items():
        assert value.numpy().tobytes() == own[name].numpy().tobytes(), name
    assert equal(list(ema.weights().values()), list(average.values()))


def test_actions_on_the_applied_average_are_refused() -> None:
    """Applying again, saving a state and updating weights are refused while applied."""
    model = make_model()
    ema = trained(EMAConfig(decay=0.5), model)
    own = weights(model)
    with ema.applied():
        with pytest.raises(PipelineStateError, match="rules out applying it again"), ema.applied():
            pass
        with pytest.raises(PipelineStateError, match="rules out saving"):
            ema.state_dict()
    assert equal(weights(model), own)

    careless = PipelineHooks()
    scopes: list[AbstractContextManager[None]] = []  # an unreferenced context exits at once

    @careless.on_step.before
    def forget(args: PipelineHookArgs) -> None:
        scopes.append(args.run.weight_set("EMA").applied())
        scopes[-1].__enter__()

    with pytest.raises(PipelineStateError, match="rules out an update"):
        make_trainer([EMAConfig()(), careless], max_step=1)()


def test_two_averages_can_be_nested() -> None:
    """Two averages can be applied at once; the inner one is in the model."""
    model = make_model()
    fast, slow = EMAConfig(decay=0.1)(), EMAConfig(decay=0.9)()
    slow.name = "slow"
    make_trainer([fast, slow], model=model, max_epoch=1)()
    own, fastest = weights(model), list(fast.weights().values())
    slowest = list(slow.weights().values())
    assert not equal(fastest, slowest)
    with fast.applied():
        with slow.applied():
            assert equal(weights(model), slowest)
        assert equal(weights(model), fastest)
    assert equal(weights(model), own)


class Tied(torch.nn.Module):
    """A matrix under two names, a frozen one, and integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.fixed = torch.nn.Linear(4, 2).requires_grad_(False)
        self.seen = torch.nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen.add_(1)
        return self.fixed(self.second(self.first(inputs)))  # type: ignore[no-any-return]


def test_tied_frozen_and_integer_parameters(tmp_path: Path) -> None:
    """Tied parameters are averaged once, frozen ones need no memory, integers are copied."""
    model = Tied()
    ema = trained(EMAConfig(decay=0.5, export_path=str(tmp_path / "ema.safetensors")), model)
    assert list(ema.state_dict()["shadows"]) == ["first.weight"]
    assert list(ema.state_dict()["copies"]) == ["seen"]
    found = ema.weights()
    assert list(found) == list(model.state_dict())
    assert torch.equal(found["first.weight"], found["second.weight"])
    assert torch.equal(found["fixed.weight"], model.fixed.weight)
    assert not torch.equal(found["first.weight"], model.first.weight)
    assert found["seen"].tolist() == [7, 7]
    fresh = Tied()
    fresh.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    assert equal(list(fresh.state_dict().values()), list(found.values()))


def test_thawed_parameter_is_averaged_from_first_update() -> None:
    """The average of a thawed parameter equals one kept from the start."""
    found = []
    for early in (True, False):  # EMA entered before or after the freezing hook
        model = make_model()
        start = [w.double() for w in weights(model)]
        followed, ema = Recorder(), EMAConfig(decay=0.7, shadow_dtype="float64")()
        freeze = FreezeHookConfig(patterns=["0.*"], until_step=4)()
        hooks: list[PipelineHooks] = [ema, freeze] if early else [freeze, ema]
        make_trainer([followed, *hooks], model=model, max_epoch=1)()
        expected = closed_form([start, *followed.seen], [0.7] * 7)
        averaged = ema.state_dict()["shadows"]
        assert sorted(averaged) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        by_name = dict(zip(model.state_dict(), expected, strict=True))
        for name, value in averaged.items():
            torch.testing.assert_close(value, by_name[name], rtol=1e-12, atol=1e-15)
        found.append(averaged)
    assert equal(list(found[0].values()), list(found[1].values()))


def test_half_precision_is_averaged_in_float32() -> None:
    """Small bfloat16 updates add up in the shadow; weights have the model's dtype."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, 256.0)
    processor = SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(batch).sum()))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    ema = EMAConfig(decay=0.999)()
    make_trainer(
        [ema],
        model=model,
        loader=[torch.ones(1, 1, dtype=torch.bfloat16)],
        optimizer=optimizer,
        batch_processor=processor,
        max_step=100,
    )()
    assert model.weight == 56.0
    (shadow,) = ema.state_dict()["shadows"].values()
    assert shadow.dtype == torch.float32
    expected = 256.0
    for update in range(1, 101):
        expected = 0.999 * expected + 0.001 * (256.0 - 2 * update)
    torch.testing.assert_close(shadow.item(), expected, rtol=1e-6, atol=0)
    assert ema.weights()["weight"].dtype == torch.bfloat16
    with ema.applied():
        assert torch.equal(model.weight, shadow.bfloat16())


def test_complex_parameters_are_averaged() -> None:
    """Complex parameters are averaged as complex numbers with any shadow dtype."""
    model = torch.nn.Module()
    model.phase = torch.nn.Parameter(torch.tensor([0j, 0j]))
    processor = SimpleBatchProcessor.from_callable(
        lambda model, batch: (None, ((model.phase - (2 + 4j)).abs() ** 2).sum())
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    ema = EMAConfig(decay=0.5, shadow_dtype="float64")()
    make_trainer(
        [ema],
        model=model,
        loader=[torch.ones(1)],
        optimizer=optimizer,
        batch_processor=processor,
        max_step=1,
    )()
    torch.testing.assert_close(ema.weights()["phase"], model.phase.detach() / 2)


def test_names_are_of_the_plain_model() -> None:
    """Compiling the model or a submodule does not change the names."""
    names = list(make_model().state_dict())
    part = make_model()
    part.add_module("0", torch.compile(part.get_submodule("0"), backend="eager"))  # type: ignore[arg-type]  # is one
    for model in (torch.compile(make_model(), backend="eager"), part):
        ema = EMAConfig(decay=0.5)()
        make_trainer([ema], model=model, max_step=2)()  # type: ignore[arg-type]  # is one
        assert list(ema.weights()) == names
        assert list(ema.state_dict()["shadows"]) == names


@pytest.mark.parametrize("end", ["limit", "stop", "at the end of an epoch"])
def test_average_is_exported_at_the_end(end: str, tmp_path: Path) -> None:
    """At any regular end, the final average is written and loads into a plain model."""
    path = tmp_path / "weights" / "ema.safetensors"
    ema = EMAConfig(decay=0.5, export_path=str(path))()
    stopping = PipelineHooks("stopping")
    if end == "stop":

        @stopping.on_step.after(when="at steps 3")
        def stop(args: PipelineHookArgs) -> None:
            args.requests.stop("enough")
    elif end == "at the end of an epoch":

        @stopping.on_loop.before
        def offer(args: PipelineHookArgs) -> None:
            # Like early stopping, request in an evaluation, after every epoch hook.
            args.run.evaluations["stopping"] = lambda args: args.requests.stop("no better")

        @stopping.on_epoch.after
        def ask(args: PipelineHookArgs) -> None:
            args.requests.evaluate("the epoch is over")

    trainer = make_trainer([ema, stopping], max_epoch=2)
    trainer()
    steps = {"limit": 14, "stop": 3, "at the end of an epoch": 7}[end]
    assert trainer.progress.global_step_id == steps
    model = make_model()
    model.load_state_dict(load_file(path))
    assert equal(weights(model), list(ema.weights().values()))
    with safe_open(path, "pt") as file:
        assert file.metadata()["optimizer_step_id"] == str(steps)


def test_average_is_exported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run stopped at its limit writes one file."""
    stopping = PipelineHooks("stopping")

    @stopping.on_step.after(when="last")
    def stop(args: PipelineHookArgs) -> None:
        args.requests.stop("enough")

    with caplog.at_level("INFO"):
        make_trainer(
            [EMAConfig(export_path=str(tmp_path / "ema.safetensors"))(), stopping], max_epoch=1
        )()
    assert caplog.text.count("ema.safetensors: the run ends, requested by EMA") == 1


def test_failed_run_exports_nothing(tmp_path: Path) -> None:
    """After an error, no file is written and the average is unregistered."""
    path = tmp_path / "ema.safetensors"
    failing = PipelineHooks("failing")
    runs = []

    @failing.on_step.after(when="at steps 2")
    def fail(args: PipelineHookArgs) -> None:
        runs.append(args.run)
        assert args.run.weight_set("EMA") is ema
        raise RuntimeError("planted")

    ema = EMAConfig(export_path=str(path))()
    with pytest.raises(RuntimeError, match="planted"):
        make_trainer([ema, failing], max_epoch=1)()
    assert not path.exists()
    with pytest.raises(PipelineConfigError, match="no hook named 'EMA' keeps weights"):
        runs[0].weight_set("EMA")


def test_average_needs_a_run() -> None:
    """Before the first run, using the average is an error, and its state is empty."""
    ema = EMAConfig()()
    with pytest.raises(PipelineStateError, match="EMA has no average yet: register the hook"):
        ema.weights()
    assert ema.state_dict() == {"version": 1, "updates": 0}
    other = EMAConfig()()
    other.load_state_dict(trained(EMAConfig(), make_model()).state_dict())
    assert other.state_dict()["updates"] == 7
    assert len(other.state_dict()["shadows"]) == 4
    other.load_state_dict(ema.state_dict())
    make_trainer([other], max_step=1)()
    assert other.state_dict()["updates"] == 1


def test_average_restarts_for_another_model() -> None:
    """A hook in two trainers averages the second model from its own start."""
    ema = EMAConfig(decay=0.5)()
    make_trainer([ema], max_epoch=1)()
    second = make_model(seed=3)
    make_trainer([ema], model=second, max_epoch=1)()
    alone = EMAConfig(decay=0.5)()
    make_trainer([alone], model=make_model(seed=3), max_epoch=1)()
    assert equal(shadows(ema), shadows(alone))
    assert ema.state_dict()["updates"] == 7


def test_average_continues_for_the_same_model() -> None:
    """Two trainers of one model average like one longer trainer."""
    ema, model = EMAConfig(decay=0.5)(), make_model()
    make_trainer([ema], model=model, max_epoch=1)()
    make_trainer([ema], model=model, max_epoch=1)()
    alone = EMAConfig(decay=0.5)()
    make_trainer([alone], max_epoch=2)()
    assert ema.state_dict()["updates"] == 14
    assert equal(shadows(ema), shadows(alone))


def test_state_can_be_loaded_during_a_run() -> None:
    """A state loaded during a run takes effect at once."""
    ema = EMAConfig(decay=0.5)()
    kept: dict[str, Any] = {}
    back = PipelineHooks("back")

    def copied(state: dict[str, Any]) -> dict[str, Any]:
        return {
            **state,
            "shadows": {name: value.clone() for name, value in state["shadows"].items()},
        }

    @back.on_step.before
    def set_back(args: PipelineHookArgs) -> None:
        if args.global_step_id == 2:
            kept.update(copied(ema.state_dict()))
        if args.global_step_id == 5:
            ema.load_state_dict(kept)
            assert equal(list(ema.state_dict()["shadows"].values()), list(kept["shadows"].values()))
            assert ema.state_dict()["updates"] == 2
        if args.global_step_id == 6:
            ema.load_state_dict({"version": 1, "updates": 0})
            assert ema.state_dict()["shadows"] == {}

    make_trainer([back, ema], max_epoch=1)()
    assert kept
    assert ema.state_dict()["updates"] == 1


def test_mismatched_states_are_refused() -> None:
    """States of another version or model are refused with the difference."""
    ema = EMAConfig()()
    with pytest.raises(StateError, match="state of EMA of version 1, found version 2"):
        ema.load_state_dict({"version": 2})
    made = trained(EMAConfig(), with_batch_norm())
    ema.load_state_dict(made.state_dict())
    wrong = (
        "another model: unexpected: 1.weight; .*unexpected: 3.weight.*unexpected: 1.running_mean"
    )
    with pytest.raises(StateError, match=wrong):
        make_trainer([ema], max_step=1)()
    ema.load_state_dict(trained(EMAConfig(), make_model()).state_dict())
    wide = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
    with pytest.raises(StateError, match=r"0.weight: saved as \(8, 4\), here \(9, 4\)"):
        make_trainer([ema], model=wide, max_step=1)()
    ema.load_state_dict(trained(EMAConfig(), make_model()).state_dict())
    with pytest.raises(StateError, match=r"missing: 1\.running_mean"):
        make_trainer([ema], model=with_batch_norm(), max_step=1)()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay": 1.0}, "less than 1"),
        ({"decay": -0.1}, "greater than or equal to 0"),
        ({"power": 0.0}, "greater than 0"),
        ({"inv_gamma": float("inf")}, "finite"),
        ({"update_after_step": -1}, "greater than or equal to 0"),
        ({"min_decay": 0.9, "max_decay": 0.5}, "min_decay must be <= max_decay, got 0.9 and 0.5"),
        ({"decay": 0.9, "power": 0.6}, "decay=0.9 replaces the warm-up, got also power"),
        ({"shadow_dtype": "int8"}, "'float16', 'bfloat16', 'float32' or 'float64'"),
    ],
)
def test_invalid_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    """Fields out of range, and fields without an effect, are refused."""
    with pytest.raises(ValueError, match=message):
        EMAConfig(**fields)


def test_config_round_trips() -> None:
    """A config is equal when read back, also with a constant decay."""
    for config in (EMAConfig(decay=0.99, export_path="ema.safetensors"), EMAConfig(power=0.6)):
        for format_ in FORMATS:
            assert EMAConfig.from_str(config.to_str(format_), format_) == config


def test_hook_contract() -> None:
    """The hook restores its state, reads no tensors and changes no weights."""
    config = EMAConfig(update_after_step=1)
    assert_state_round_trip(config, model=with_batch_norm, accumulate=3)
    assert_no_device_sync(config, model=with_batch_norm)
    assert_weights_unchanged(config, model=with_batch_norm)
    assert_state_round_trip(EMAConfig(**RECIPE), model=with_batch_norm, accumulate=2)


def test_averages_are_equal_on_all_ranks(tmp_path: Path) -> None:
    """Two processes have the average of one process; the main process writes."""
    (alone,) = train_on(1, tmp_path / "one", "ema")
    ranks = train_on(2, tmp_path / "two", "ema")
    assert torch.equal(ranks[0]["ema"], ranks[1]["ema"])
    torch.testing.assert_close(ranks[0]["ema"], alone["ema"], rtol=1e-9, atol=1e-12)
    written = load_file(tmp_path / "two" / "ema.safetensors")
    flat = torch.cat([written[name].flatten() for name in make_model().state_dict()])
    assert torch.equal(flat, ranks[0]["ema"])
    assert not torch.equal(flat, ranks[0]["weights"])


def test_decays_match_the_reference() -> None:
    """Documented decays of the warm-up are reproduced."""
    assert EMAConfig(power=2 / 3).decay_of(31_600) == pytest.approx(0.999, abs=1e-6)
    assert EMAConfig(power=0.75).decay_of(215_400) == pytest.approx(0.9999, abs=1e-7)
    assert EMAConfig(power=0.75).decay_of(10**7) == 0.9999


class Original(PipelineHooks):
    """Average of an original recipe, updated next to the hook's, and all their differences."""

    def __init__(self, ema: EMA, average: torch.nn.Module, update: Callable[..., None]) -> None:
        super().__init__()
        self.copied: list[bool] = []
        """True for each update whose average is the model, bit for bit."""

        @self.on_optimizer_step.after
        def compare(args: PipelineHookArgs) -> None:
            update(args)
            expected = {name: value.clone() for name, value in average.state_dict().items()}
            found = ema.weights()
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
            own = args.model.state_dict()
            self.copied.append(all(torch.equal(found[name], own[name]) for name in own))


class Doubles(torch.nn.Sequential):
    """Model in float64, with a constant table of indices that must not change."""

    def __init__(self) -> None:
        super().__init__(*with_batch_norm())
        self.register_buffer("table", torch.tensor([49, 7, 1]))
        self.register_buffer("scale", torch.tensor(3.0))
        self.double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.double()).float()  # type: ignore[no-any-return, no-untyped-call]


def from_file(fields: str) -> EMA:
    """Build the hook of an entry of an experiment file."""
    return EMAConfig.from_str(
        f"class_type: robo_orchard_lab.pipeline.hooks.ema:EMA\n{fields}", "yaml"
    )()


@pytest.mark.parametrize("lr_warmup_epochs", [0, 1])
def test_torchvision_recipe_has_the_numbers_of_the_original(lr_warmup_epochs: int) -> None:
    """Averages, also of buffers, are those of torchvision's references/classification."""
    every, epochs, batch_size, model_ema_decay = 3, 3, 4, 0.95
    # utils.py and train.py of github.com/pytorch/vision, references/classification, v0.23.0
    adjust = 1 * batch_size * every / epochs
    alpha = min(1.0, (1.0 - model_ema_decay) * adjust)
    decay = 1.0 - alpha

    def ema_avg(avg_model_param: Any, model_param: Any, num_averaged: Any) -> Any:
        return decay * avg_model_param + (1 - decay) * model_param

    model = Doubles()
    average = AveragedModel(model, torch.device("cpu"), ema_avg, use_buffers=True)

    def train_one_epoch(args: PipelineHookArgs) -> None:
        if args.step_id % every == 0:
            average.update_parameters(model)
            for name, buffer in average.module.named_buffers():
                if not buffer.is_floating_point():  # copied here, truncated there
                    buffer.copy_(model.get_buffer(name))
            if args.epoch_id < lr_warmup_epochs:
                average.n_averaged.fill_(0)

    ema = from_file(
        f"decay: {decay!r}\nupdate_every: {every}\nuse_buffers: true\ncopy_first: true\n"
        f"update_after_step: {7 * lr_warmup_epochs}\n",
    )
    original = Original(ema, average.module, train_one_epoch)
    make_trainer([original, ema], model=model, max_epoch=epochs)()
    copies = [update for update, copied in enumerate(original.copied) if copied]
    assert copies == ([0, 3, 6, 7] if lr_warmup_epochs else [0])


@pytest.mark.parametrize("min_value", [0.0, 0.4])
def test_diffusion_policy_recipe_has_the_numbers_of_the_original(min_value: float) -> None:
    """Averages are those of EMAModel in diffusion_policy; running statistics are copied."""
    after, inv_gamma, power, max_value = 2, 1.0, 0.75, 0.8
    model = Doubles()
    average = copy.deepcopy(model)

    # diffusion_policy/model/diffusion/ema_model.py of github.com/real-stanford/diffusion_policy
    def get_decay(optimization_step: int) -> float:
        step = max(0, optimization_step - after - 1)
        value = 1 - (1 + step / inv_gamma) ** -power
        return 0.0 if step <= 0 else max(min_value, min(value, max_value))

    @torch.no_grad()
    def step(args: PipelineHookArgs) -> None:
        decay = get_decay(args.optimizer_step_id - 1)
        for module, ema_module in zip(model.modules(), average.modules(), strict=True):
            pairs = zip(module.parameters(False), ema_module.parameters(False), strict=True)
            for param, ema_param in pairs:
                if isinstance(module, torch.nn.BatchNorm1d) or not param.requires_grad:
                    ema_param.copy_(param)
                else:
                    ema_param.mul_(decay).add_(param, alpha=1 - decay)
        for name, buffer in average.named_buffers():
            buffer.copy_(model.get_buffer(name))

    ema = from_file(
        f"update_after_step: {after + 1}\ncopy_first: true\ncopy_batch_norm: true\n"
        f"power: {power}\nmin_decay: {min_value}\nmax_decay: {max_value}\n",
    )
    original = Original(ema, average, step)
    make_trainer([original, ema], model=model, max_epoch=2)()
    assert original.copied == [True] * 4 + [False] * 10


def test_first_averaging_is_copied_wherever_it_falls() -> None:
    """With copy_first, the first averaging after update_after_step copies, not an earlier one."""
    recorder = Recorder()
    ema = EMAConfig(decay=0.5, update_after_step=2, update_every=4, copy_first=True)()
    make_trainer([recorder, ema], max_epoch=1)()
    assert equal(shadows(ema), recorder.seen[4])


def test_average_without_updates_is_the_model() -> None:
    """Without updates, the average is the model itself."""
    model = make_model()
    ema = EMAConfig()()
    HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        make_loader(),
        SimpleBatchProcessor.from_callable(loss_of, need_backward=False),
        hooks=[ema],
        max_epoch=1,
    )()
    assert equal(list(ema.weights().values()), weights(model))
