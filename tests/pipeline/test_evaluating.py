"""`args.evaluating`: samples and rollouts in a hook."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from evaluate_on_ranks import Classify, buffers_of, make_evaluation_loader, make_normalised
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError
from robo_orchard_lab.pipeline.hooks import EMAConfig
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from tiny import equal, make_trainer, weights


class Rollouts(PipelineHooks):
    """Hook that draws from all RNGs and uses a model that counts its passes."""

    def __init__(self, weights: str | None = None, fails: bool = False) -> None:
        super().__init__()
        self.seen: list[Any] = []

        @self.on_step.after
        def roll_out(args: PipelineHookArgs) -> None:
            with args.evaluating(weights=weights) as model:
                assert not model.training
                assert not torch.is_grad_enabled()
                model.passes += 1
                noise = torch.rand(3, 4) + random.random() + float(np.random.rand())
                self.seen.append(model(noise))
                if fails:
                    raise RuntimeError("the simulator failed")


def train(*hooks: Any, steps: int = 4) -> Any:
    model = make_normalised()
    model.register_buffer("passes", torch.zeros(()))
    trainer = make_trainer(
        hooks,
        model=model,
        loader=make_evaluation_loader(40, shuffle=True),
        batch_processor=Classify(),
        accumulate=2,
        max_step=steps,
    )
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    return trainer


def state_of(trainer: Any) -> list[torch.Tensor]:
    drawn = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])
    return [*weights(trainer.model), *buffers_of(trainer.model), drawn]


def test_rollouts_do_not_change_training() -> None:
    """Weights, buffers and RNGs are those of a training without rollouts, within a window too."""
    plain, rollouts = train(), Rollouts()
    plain()
    expected = state_of(plain)
    trainer = train(EMAConfig(decay=0.5), rollouts, Rollouts2())
    trainer()
    assert equal(state_of(trainer), expected)
    assert all(module.training for module in trainer.model.modules())
    assert len(rollouts.seen) == 4


class Rollouts2(Rollouts):
    """Rollouts with averaged weights."""

    def __init__(self) -> None:
        super().__init__("EMA")


def test_weights_of_a_hook_are_used() -> None:
    """The model has the named weights within the body, and its own afterwards."""
    found: list[Any] = []
    look = PipelineHooks("look")

    @look.on_loop.after
    def compare(args: PipelineHookArgs) -> None:
        own = weights(args.model)
        with args.evaluating(weights="EMA") as model:
            averaged = weights(model)
        kept = args.run.weight_set("EMA").weights()
        names = [name for name, _ in args.model.named_parameters()]
        found.append([equal(averaged, [kept[name] for name in names]), equal(averaged, own)])
        found.append(equal(weights(args.model), own))

    train(EMAConfig(decay=0.5), look)()
    assert found == [[True, False], True]


def test_state_is_restored_after_an_error() -> None:
    """A failing rollout leaves the weights, modes, buffers and RNGs of training."""
    failing = PipelineHooks("failing")

    @failing.on_step.after
    def fail(args: PipelineHookArgs) -> None:
        raise RuntimeError("the simulator failed")

    trainer, plain = train(EMAConfig(decay=0.5), Rollouts("EMA", fails=True)), train(failing)
    states = []
    for each in (plain, trainer):
        torch.manual_seed(9)
        random.seed(9)
        np.random.seed(9)
        with pytest.raises(RuntimeError, match="the simulator failed"):
            each()
        states.append(state_of(each))
    assert equal(*states)
    assert all(module.training for module in trainer.model.modules())
    assert torch.is_grad_enabled()


def test_unknown_weights_are_refused() -> None:
    """The error lists the hooks that keep weights."""
    with pytest.raises(PipelineConfigError, match="'EMB' keeps weights; did you mean 'EMA'"):
        train(EMAConfig(), Rollouts("EMB"))()


def test_standalone_run_evaluates() -> None:
    """A run without a trainer has the context too; a frozen module keeps its mode."""
    model = make_normalised()
    model[1].eval()  # type: ignore[index]  # a Sequential
    run = PipelineRun.standalone(model=model)
    with run.evaluating() as evaluated, PipelineHookArgs(run).evaluating():
        assert evaluated is model
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model] == [True, False, True, True]


def test_precision_is_that_of_a_batch_processor() -> None:
    """Methods of the model run in mixed precision as in a batch processor."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    run = PipelineRun.standalone(accelerator=accelerator, model=torch.nn.Linear(2, 2))
    with run.evaluating() as model:
        assert torch.nn.functional.linear(torch.ones(1, 2), model.weight).dtype is torch.bfloat16


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_model_is_used_without_its_communication() -> None:
    """The body gets the module's methods and attributes; DDP's forward is not called."""
    plain = make_normalised()
    ddp = DistributedDataParallel(plain)
    called: list[Any] = []
    ddp.register_forward_pre_hook(lambda module, args: called.append(args))
    with PipelineRun.standalone(model=ddp).evaluating() as model:
        assert model[0] is plain[0]  # type: ignore[index]  # a Sequential
        assert not model(torch.ones(2, 4)).requires_grad
    assert called == []
    assert plain.training


@pytest.mark.usefixtures("process_group")
def test_sharded_model_is_evaluated_on_all_ranks() -> None:
    """A sharded model is resharded afterwards, and refused on one rank alone."""
    model = make_normalised()
    expected = make_normalised().eval()(torch.ones(2, 4))
    fully_shard(model)
    run = PipelineRun.standalone(model=model)
    with run.evaluating() as evaluated:
        torch.testing.assert_close(evaluated(torch.ones(2, 4)), expected.detach())
    assert all(hasattr(parameter, "to_local") for parameter in model.parameters())
    with (
        pytest.raises(PipelineStateError, match=r"enter on all ranks, without rank_local"),
        run.evaluating(rank_local=True),
    ):
        pass
