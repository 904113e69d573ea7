"""Tests of ``run_hook`` and its result."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.trigger import EverySteps, Trigger
from robo_orchard_lab.testing import HookRun, run_hook


class Note(PipelineHooks):
    """Publishes how often it ran, and asks to stop when that is enough."""

    def __init__(self, cfg: NoteConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.count = 0
        self.register_hook("on_step", HookContext.from_callable(after=self._note), cfg.every)

    def _note(self, args: PipelineHookArgs) -> None:
        self.count += 1
        args.metrics.publish("notes", self.count)
        if self.count == self.cfg.enough:
            args.requests.stop(f"{self.count} notes", by=self.name)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class NoteConfig(PipelineHooksConfig[Note]):
    class_type: type[Note] = Note
    every: Trigger = EverySteps(2)
    enough: int = 100


def test_a_run_shows_events_metrics_and_requests() -> None:
    """Published and requested values have name, step and reason."""
    run = run_hook(NoteConfig(enough=2), steps=6)
    assert run.metrics == {"notes": {2: 1.0, 4: 2.0}}
    assert [str(request) for request in run.requests] == [
        "stop at step 4, requested by Note: 2 notes"
    ]
    (asked,) = run.requests
    assert (asked.kind, asked.by, asked.reason, asked.step) == ("stop", "Note", "2 notes", 4)
    assert run.progress.global_step_id == len(run.losses) == 4
    assert run.trace[:11] == [
        "before on_loop 0 0 0 0",
        "  before on_epoch 0 0 0 0",
        "    before on_step 0 0 0 0",
        "      before on_batch 0 0 0 0",
        "        before on_model_forward 0 0 0 0",
        "        after on_model_forward 0 0 0 0",
        "        before on_model_backward 0 0 0 0",
        "        after on_model_backward 0 0 0 0",
        "      after on_batch 0 0 0 0",
        "    after on_step 0 0 0 0",
        "    before on_optimizer_step 0 0 0 0",
    ]
    assert run.trace[-1] == "after on_loop 1 0 4 4"
    assert isinstance(run.hook, Note)
    assert run.hook.count == 2


@pytest.mark.parametrize(
    "source",
    [
        NoteConfig(),
        Note(NoteConfig()),
        lambda: NoteConfig(),
        lambda: Note(NoteConfig()),
        [NoteConfig()],
        (make for make in [lambda: Note(NoteConfig())]),
    ],
    ids=["config", "hook", "makes a config", "makes a hook", "list", "generator"],
)
def test_a_hook_source_may_have_any_form(source: Any) -> None:
    """A hook, its config, a function that returns either, or several of these."""
    assert run_hook(source, steps=4).metrics["notes"] == {2: 1.0, 4: 2.0}


def test_several_hooks_run_in_order() -> None:
    """The run has all hooks, and no single hook."""
    run = run_hook([NoteConfig(), GradientClippingHookConfig(max_norm=1.0)], steps=2)
    assert [hook.name for hook in run.hooks] == ["Note", "GradientClippingHook"]
    assert set(run.metrics) == {"notes", "grad_norm"}
    with pytest.raises(ValueError, match="the run had 2 hooks"):
        _ = run.hook


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([3], "expected a PipelineHooks.* got 3"),
        (lambda: 3, "expected a PipelineHooks.* got a function that returns 3"),
        ([HookContext.from_callable(print)], "expected a PipelineHooks"),
    ],
)
def test_other_objects_are_refused(source: Any, message: str) -> None:
    """The error shows the object."""
    with pytest.raises(TypeError, match=message):
        run_hook(source)


def test_an_unknown_setting_is_refused() -> None:
    """The error suggests the nearest name."""
    with pytest.raises(TypeError, match="no setting 'step'; did you mean 'steps'"):
        run_hook(NoteConfig(), step=3)  # type: ignore[call-arg]  # what is tested


def test_an_error_of_a_hook_propagates() -> None:
    """Its notes name the hook and the position in the run."""
    hooks = PipelineHooks("broken")

    @hooks.on_step.after(when="3 steps")
    def fail(args: PipelineHookArgs) -> None:
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted") as raised:
        run_hook(hooks)
    assert "'broken' (on_step, after)" in raised.value.__notes__[0]
    assert "at step 3 (" in raised.value.__notes__[-1]


def test_settings_are_applied() -> None:
    """Model, data, accumulation, optimizer, LR scheduler and limits are those of the settings."""
    rates: list[float] = []
    hooks = PipelineHooks()

    @hooks.on_optimizer_step.before
    def note(args: PipelineHookArgs) -> None:
        assert args.optimizer is not None
        rates.append(args.optimizer.param_groups[0]["lr"])

    model = torch.nn.Linear(3, 1)
    before = model.weight.clone()
    batch = torch.ones(2, 3), torch.zeros(2, 1)
    run = run_hook(
        hooks,
        epochs=2,
        accumulate=2,
        model=model,
        data=[batch] * 3,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )
    assert (run.progress.epoch_id, run.progress.global_step_id) == (2, 6)
    assert rates == [0.5, 0.25, 0.125, 0.0625]
    assert set(run.weights) == {"weight", "bias"}
    assert not torch.equal(run.weights["weight"], before)
    assert torch.equal(model.weight, before)
    assert len(run.weights_by_step) == 7
    assert torch.equal(run.weights_by_step[0]["weight"], before)
    assert torch.equal(run.weights_by_step[1]["weight"], before)  # a window of two
    assert run_hook([], optimizer_steps=3, accumulate=2).progress.optimizer_step_id == 3


def test_extra_hooks_run_after_the_tested_hooks() -> None:
    """They may publish for the tested hook, and are not part of the result."""
    received: list[float] = []

    class Waiting(PipelineHooks):
        def __init__(self) -> None:
            super().__init__()
            self.register_hook("on_loop", HookContext.from_callable(before=self._subscribe))

        def _subscribe(self, args: PipelineHookArgs) -> None:
            args.metrics.subscribe("notes", lambda value: received.append(value.value))

    run = run_hook(Waiting, steps=4, extra_hooks=[NoteConfig()])
    assert received == [1.0, 2.0]
    assert [hook.name for hook in run.hooks] == ["Waiting"]


@pytest.mark.parametrize(
    ("log_every", "notes"),
    [
        ("1 step", {2: 1.0, 4: 2.0, 6: 3.0}),
        ("4 steps", {4: 1.5, 6: 3.0}),
        (None, {6: 2.0}),
    ],
)
def test_log_every_sets_the_logging_points(log_every: str | None, notes: dict[int, float]) -> None:
    """Values are read at the logging points and at the end, reduced to a mean."""
    run = run_hook(NoteConfig(), log_every=log_every)
    assert run.metrics["notes"] == notes
    assert [record.partial for record in run.records][-1] == (log_every != "1 step")


def test_runs_with_equal_settings_are_equal() -> None:
    """Bit for bit, after any use of random numbers; another seed differs."""

    def summary(run: HookRun) -> tuple[Any, ...]:
        return run.losses, run.trace, [w.tolist() for w in run.weights.values()]

    first = run_hook([], epochs=2)
    torch.rand(3)
    assert summary(run_hook([], epochs=2)) == summary(first)
    assert summary(run_hook([], epochs=2, seed=1)) != summary(first)


def random_numbers() -> tuple[Any, ...]:
    return torch.rand(()).item(), np.random.rand(), random.random()


@pytest.mark.parametrize("fails", [False, True])
def test_the_state_of_the_process_is_restored(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """RNG states, Accelerate's state and the environment, also after an error."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = random_numbers()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    mine = Accelerator(cpu=True, gradient_accumulation_steps=7)
    shared = [dict(k._shared_state) for k in (PartialState, AcceleratorState, GradientState)]
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "error")
    environment = dict(os.environ)

    def make() -> PipelineHooks:
        os.environ["PLANTED"] = "1"
        if fails:
            raise KeyError("planted")
        return PipelineHooks()

    if fails:
        with pytest.raises(KeyError, match="planted"):
            run_hook(make)
    else:
        run_hook(make, accumulate=2)
    assert random_numbers() == expected
    assert dict(os.environ) == environment
    assert [
        dict(k._shared_state) for k in (PartialState, AcceleratorState, GradientState)
    ] == shared
    assert mine.gradient_accumulation_steps == 7
    for kind in (AcceleratorState, GradientState):
        kind._reset_state()
    PartialState._reset_state()


def test_the_pipeline_does_not_import_the_kit() -> None:
    """The kit does not import pytest either."""
    check = (
        "import sys; import robo_orchard_lab, robo_orchard_lab.pipeline.hooks; "
        "assert not any('testing' in name for name in sys.modules if name.startswith('robo')); "
        "import robo_orchard_lab.testing; assert 'pytest' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
