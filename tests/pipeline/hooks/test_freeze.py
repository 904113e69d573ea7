"""The hook that freezes parameters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks.freeze import FreezeHookConfig
from robo_orchard_lab.pipeline.hooks.gradient_clipping import GradientClippingHookConfig
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.testing import assert_no_device_sync, assert_state_round_trip
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights
from weights_on_ranks import train_on


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, whose momentum and weight decay change parameters with zero gradients."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)


def run(
    config: FreezeHookConfig, model: torch.nn.Module | None = None, **options: Any
) -> HookBasedTrainer:
    model = make_model() if model is None else model
    hooks = [GradientClippingHookConfig(max_norm=0.1), config, *options.pop("hooks", [])]
    trainer = make_trainer(hooks, model=model, optimizer=adamw(model), **options)
    trainer()
    return trainer


def train_by_hand(thaw_at: int, steps: int) -> torch.nn.Module:
    """Train in a plain loop that freezes the first layer for a number of steps."""
    model = make_model()
    optimizer = adamw(model)
    batches = [*make_loader(), *make_loader()][:steps]
    for step, batch in enumerate(batches):
        for parameter in model.get_submodule("0").parameters():
            parameter.requires_grad_(step >= thaw_at)
        loss_of(model, (batch[0], batch[1]))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("until", "thaw_at"),
    [
        ({"until_step": 5}, 5),
        ({"until_optimizer_step": 4}, 4),
        ({"until_epoch": 1}, 7),
        ({"until_step": 9, "until_epoch": 1}, 7),
        ({}, 100),
    ],
)
def test_frozen_parameters_train_after_the_thaw(until: dict[str, Any], thaw_at: int) -> None:
    """Weights are bit for bit those of a plain loop that sets requires_grad."""
    trainer = run(FreezeHookConfig(patterns=["0.*"], **until), max_epoch=2)
    assert equal(weights(trainer.model), weights(train_by_hand(thaw_at, 14)))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    first = weights(trainer.model)[0]
    assert torch.equal(first, weights(make_model())[0]) == (thaw_at == 100)


@pytest.mark.parametrize("at", [2, 3, 4, 5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resume_is_exact(at: int, accumulate: int, tmp_path: Path) -> None:
    """A run saved before, at or after the thaw resumes exactly.

    At step 5, a window of three batches has gradients of thawed parameters.
    """
    config = FreezeHookConfig(patterns=["0.*"], until_step=4)
    stop = PipelineHooks()

    @stop.on_step.after(when=f"at steps {at}")
    def stop_there(args: PipelineHookArgs) -> None:
        args.requests.stop("enough")

    uninterrupted = run(config, max_epoch=2, accumulate=accumulate)
    half = run(config, max_epoch=2, accumulate=accumulate, hooks=[stop])
    half.save_checkpoint(tmp_path / "half")
    resumed = run(
        config,
        make_model(seed=9),
        max_epoch=2,
        accumulate=accumulate,
        resume_from=tmp_path / "half",
    )
    assert equal(weights(resumed.model), weights(uninterrupted.model))


def test_previously_frozen_parameters_stay_frozen() -> None:
    """The hook does not thaw parameters frozen before the run."""
    model = make_model()
    model.get_parameter("0.bias").requires_grad_(False)
    before = weights(model)
    run(FreezeHookConfig(patterns=["0.*"], until_step=2), model, max_epoch=1)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert trainable == {"0.weight": True, "0.bias": False, "2.weight": True, "2.bias": True}
    assert [torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)] == [
        False,
        True,
        False,
        False,
    ]


def test_error_restores_parameters_and_modes() -> None:
    """After an error, no parameter is frozen and no module is in evaluation mode."""
    model = make_model()
    failing = PipelineHooks()

    @failing.on_step.after
    def fail(args: PipelineHookArgs) -> None:
        assert not model.get_parameter("0.weight").requires_grad
        assert not model.get_submodule("0").training
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        run(FreezeHookConfig(patterns=["0.*"], eval_mode=True), model, hooks=[failing], max_step=3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


class Backbone(torch.nn.Module):
    """Modules with statistics, with dropout, and with both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(
            torch.nn.Linear(4, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.BatchNorm1d(8, affine=False),
            torch.nn.Dropout(0.5),
        )
        self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(inputs))  # type: ignore[no-any-return]


def test_frozen_modules_stay_in_evaluation_mode() -> None:
    """A frozen module with eval_mode keeps its statistics until the thaw."""
    model = Backbone()
    model.backbone[3].eval()  # the thaw must keep evaluation mode
    watcher = PipelineHooks()
    modes: list[list[bool]] = []
    statistics: list[torch.Tensor] = []

    @watcher.on_batch.before
    def careless(args: PipelineHookArgs) -> None:
        modes.append([module.training for module in model.backbone.modules()])
        statistics.append(model.get_buffer("backbone.2.running_mean").clone())

    @watcher.on_step.after
    def put_everything_in_training_mode(args: PipelineHookArgs) -> None:
        if args.global_step_id == 1:
            args.model.train()

    config = FreezeHookConfig(patterns=["backbone.*"], until_step=4, eval_mode=True)
    run(config, model, hooks=[watcher], max_step=6)
    assert modes[:4] == [[False] * 5] * 4
    assert modes[4:] == [[True, True, True, True, False]] * 2
    assert all(torch.equal(statistics[0], found) for found in statistics[1:5])
    assert not torch.equal(statistics[0], statistics[5])
    assert model.get_buffer("head.0.num_batches_tracked") == 6


def test_partly_trained_modules_stay_in_training_mode() -> None:
    """A module with a trainable parameter stays in training mode, with its submodules."""
    model = Backbone()
    model.get_parameter("backbone.1.bias").requires_grad_(False)  # frozen without a pattern
    watcher = PipelineHooks()

    @watcher.on_batch.before
    def check(args: PipelineHookArgs) -> None:
        off = {name for name, module in model.named_modules() if not module.training}
        assert off == {"backbone.1"}

    patterns = ["backbone.1.weight", "head.1.bias"]
    run(FreezeHookConfig(patterns=patterns, eval_mode=True), model, hooks=[watcher], max_step=2)
    assert all(module.training for module in model.modules())


def test_tied_parameter_matches_by_any_name() -> None:
    """A tied parameter matches by each name; names of compiled modules are plain."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)), torch.nn.Linear(4, 2))
    model.get_submodule("2").weight = model.get_parameter("1.weight")
    model.add_module("0", torch.compile(model.get_submodule("0"), backend="eager"))  # type: ignore[arg-type]  # is one
    before = weights(model)
    run(FreezeHookConfig(patterns=["2.weight", "0.bias"]), model, max_step=2)
    same = [torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, frozen in zip(names, same, strict=True) if frozen] == [
        "0._orig_mod.bias",
        "1.weight",
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["0.*", "2.waight"], r"FreezeHook.patterns: '2.waight' .* did you mean '2.weight'"),
        (["0"], r"'0' matches no parameter; that is a module; did you mean '0\.\*'"),
        (["encoder.*"], "no parameter; the parameters are 0.weight, 0.bias, 2.weight, 2.bias"),
    ],
)
def test_unmatched_pattern_is_refused(patterns: list[str], message: str) -> None:
    """The error comes before the first step, with a suggestion or the list of names."""
    with pytest.raises(PipelineConfigError, match=message):
        run(FreezeHookConfig(patterns=patterns), max_step=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patterns": []}, "at least 1 item"),
        ({"patterns": ["*"], "until_step": 0}, "greater than or equal to 1"),
        ({"patterns": ["*"], "until_epoch": -1}, "greater than or equal to 1"),
        ({}, "patterns"),
    ],
)
def test_invalid_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    """Missing patterns and invalid limits are refused."""
    with pytest.raises(ValueError, match=message):
        FreezeHookConfig(**fields)


def test_freezing_everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A pattern that matches all parameters logs a warning first."""
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RuntimeError, match="does not require grad"),
    ):
        run(FreezeHookConfig(patterns=["*"]), max_step=1)
    assert "FreezeHook froze all parameters of the model" in caplog.text


def test_parameters_freeze_again_after_rollback() -> None:
    """Parameters are frozen again if the counters go back before the thaw."""
    model = make_model()
    frozen: list[bool] = []
    back = PipelineHooks()

    @back.on_step.after
    def set_back(args: PipelineHookArgs) -> None:
        frozen.append(not model.get_parameter("0.weight").requires_grad)
        if len(frozen) == 4:
            args.progress.global_step_id = 0

    run(FreezeHookConfig(patterns=["0.*"], until_step=3), model, hooks=[back], max_step=5)
    assert frozen == [True, True, True, False, True, True, False, False]


def test_hook_contract() -> None:
    """The hook restores its state and reads no tensors."""
    config = FreezeHookConfig(patterns=["0.*"], until_step=3, eval_mode=True)
    assert_state_round_trip(config, accumulate=2)
    assert_no_device_sync(config)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Two processes freeze, clip and thaw like one, with weight decay."""
    (alone,) = train_on(1, tmp_path / "one", "freeze")
    ranks = train_on(2, tmp_path / "two", "freeze")
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], alone["weights"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ranks[0]["ema"], alone["ema"], rtol=1e-9, atol=1e-12)
    assert all(rank["trainable"].all() for rank in (alone, *ranks))


def test_deepspeed_is_refused() -> None:
    """Freezing is refused with DeepSpeed, which has gradients of its own."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    run = PipelineRun.standalone(accelerator=accelerator, model=make_model())
    hook = FreezeHookConfig(patterns=["*"])()
    with (
        pytest.raises(PipelineConfigError, match="FreezeHook can't keep DEEPSPEED from updating"),
        hook.begin("on_loop", PipelineHookArgs(run)),
    ):
        pass
