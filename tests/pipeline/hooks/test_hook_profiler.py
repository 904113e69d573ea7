"""Times of hooks, channels and stages, and their table, files, budgets and trace."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import gan
from chrome_trace import Slice, read_trace
from launching import SCRIPTS, launch
from robo_orchard_core.utils.hook import HookContext, RemovableHandle, origin_of
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hook_times import STAGES
from robo_orchard_lab.pipeline.hooks import (
    HookProfiler,
    HookProfilerConfig,
    MetricsLoggerConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
    TorchProfilerHookConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.hooks.hook_profiler import DeviceIdle
from robo_orchard_lab.pipeline.hooks.mixin import ChannelName
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
    run_hook,
)
from tiny import Batch, equal, loss_of, make_loader, make_model, make_trainer, weights

SCRIPT = SCRIPTS / "profile_on_ranks.py"
NAP_S = 0.003
"""Longer than anything else in a step of the tiny model on an idle machine."""
LOGGER = "robo_orchard_lab.pipeline.hooks.hook_profiler"
Profile = dict[str, Any]


slept: dict[str, list[float]] = defaultdict(list)
"""Duration of each nap by its place, in seconds: longer than NAP_S on a busy machine."""


@pytest.fixture(autouse=True)
def _no_naps_of_other_tests() -> None:
    slept.clear()


def nap(*_: object, place: str = "hooks", times: int = 1) -> None:
    began = time.perf_counter()
    time.sleep(NAP_S * times)
    slept[place].append(time.perf_counter() - began)


def napping(channel: ChannelName, role: str, **options: Any) -> PipelineHooks:
    """Return a hook that naps each time its channel is open."""
    hooks = PipelineHooks(f"naps {role} {channel}")
    getattr(getattr(hooks, channel), role)(**options)(partial(nap, place=hooks.name))
    return hooks


def profile(folder: Path, hooks: list[Any], **options: Any) -> Profile:
    """Train with a profiler and return its document."""
    options = {"max_step": 10, **options}
    make_trainer([*hooks, HookProfilerConfig(max_share=None)], run_folder=folder, **options)()
    return read(folder)


def read(folder: Path) -> Profile:
    document: Profile = json.loads((folder / "profile.json").read_text())
    assert sum(found["total_s"] for found in document["stages"].values()) == pytest.approx(
        document["seconds"], rel=1e-9
    )
    return document


def check_stages(document: Profile, naps: dict[str, str]) -> None:
    """Check that each stage has the time of its naps, without the first step.

    The first two naps before a batch belong to the start of the run and to the first step. All
    stages together take the time of the steps, so none has the time of another's naps.
    """
    for stage, place in naps.items():
        count = len(slept[place])
        assert count >= 7
        per_step = count // (document["steps"] + 1)
        assert document["stages"][stage]["total_s"] >= sum(slept[place][2 * per_step :])


def function(document: Profile, hook: str, channel: str = "on_step", phase: str = "") -> Any:
    """Return the only function of a hook on a channel."""
    (found,) = (
        each
        for each in document["hooks"]
        if each["hook"] == hook and each["channel"] == channel and phase in each["phase"]
    )
    return found


class Naps(torch.autograd.Function):
    """Identity that naps in its backward pass."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        nap(place="backward")
        return gradient


class NappingSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        nap(place="optimizer")
        return super().step(closure)


class NappingLoader:
    """Loader that naps before each batch and has no length."""

    def __iter__(self) -> Iterator[Any]:
        for batch in make_loader(5):
            nap(place="data_wait")
            yield batch


def forward(model: Any, batch: Batch) -> Any:
    nap(place="forward")
    outputs, loss = loss_of(model, batch)
    return outputs, Naps.apply(loss)  # type: ignore[no-untyped-call]  # torch's


class CommitNaps(PipelineHooks):
    """Hook with slow work of one kind at the commit point of each step."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__("slow")
        self.kind, self.file = kind, folder / "weights.safetensors"
        self.on_loop.before(self._begin)
        self.register_at_commit(self._ask, "1 step")

    def _begin(self, args: PipelineHookArgs) -> None:
        args.run.evaluations[self.name] = nap
        if self.kind == "logging":
            args.metrics.listen(nap)

    def _ask(self, args: PipelineHookArgs) -> None:
        if self.kind == "evaluation":
            args.requests.evaluate("it is time")
        elif self.kind == "saving":
            args.requests.write(nap, "it is time")
        else:
            args.requests.log("it is time")


# --- parts of a step -------------------------------------------------------------------------


def test_stages_have_their_time(tmp_path: Path) -> None:
    """Waiting, forward pass, backward pass, optimizer and hooks each have their own time."""
    model = make_model()
    document = profile(
        tmp_path,
        [napping("on_step", "before")],
        model=model,
        loader=NappingLoader(),
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        optimizer=NappingSGD(model.parameters(), lr=0.1),
    )
    places = {name: name for name in ("data_wait", "forward", "backward", "optimizer")}
    check_stages(document, {**places, "hooks": "naps before on_step"})
    assert document["stages"]["trainer"]["share"] < 0.5


@pytest.mark.parametrize("kind", ["evaluation", "logging", "saving"])
def test_commit_points_have_their_time(kind: str, tmp_path: Path) -> None:
    """Evaluations, logging points and saves are no wait for data."""
    check_stages(profile(tmp_path, [CommitNaps(kind, tmp_path)]), {kind: "hooks"})


def test_parts_add_up_to_the_measured_time(tmp_path: Path) -> None:
    """All parts together take the time of the steps by another clock, within 3 %."""
    began: list[float] = []
    ended: list[float] = []
    clock = PipelineHooks("clock")
    clock.on_step.before(lambda args: began.append(time.perf_counter()))
    last = PipelineHooks("last")
    last.on_loop.after(lambda args: ended.append(time.perf_counter()))
    closing = PipelineHooks("closing")
    closing.on_loop.after(lambda args: nap(times=60))  # no part of a step
    hooks: list[Any] = [
        closing,
        clock,
        MetricsLoggerConfig(every="3 steps", sinks=[]),
        ValidationHookConfig(every="4 steps")(dataloaders={"val": make_loader(2)}),
        SaveCheckpointConfig(every="20 steps"),
        napping("on_step", "after", when="5 steps"),
        last,
    ]
    document = profile(tmp_path, hooks, max_step=40)
    assert document["steps"] == 39
    assert document["seconds"] == pytest.approx(ended[0] - began[1], rel=0.03)
    assert document["first_step_s"] == pytest.approx(began[1] - began[0], rel=0.1)
    assert list(document["stages"]) == list(STAGES)
    assert sum(found["share"] for found in document["stages"].values()) == pytest.approx(1.0)


def test_step_without_backward(tmp_path: Path) -> None:
    """A run without a backward pass has no time of a backward pass and of an optimizer."""
    processor = SimpleBatchProcessor.from_callable(loss_of, need_backward=False)
    stages = profile(tmp_path, [], batch_processor=processor)["stages"]
    assert stages["backward"]["total_s"] == stages["optimizer"]["total_s"] == 0.0
    assert stages["forward"]["total_s"] > 0


# --- hooks and channels ----------------------------------------------------------------------


def test_hook_has_time_with_and_without_nested_channels(tmp_path: Path) -> None:
    """OptimizerHook's total includes the hooks of on_optimizer_step, and its own time does not."""
    document = profile(tmp_path, [napping("on_optimizer_step", "before")])
    found = function(document, "OptimizerHook")
    name = "naps before on_optimizer_step"
    in_naps = sum(slept[name][1:])
    assert found["total_s"] >= in_naps
    assert found["self_s"] <= found["total_s"] - in_naps
    inner = function(document, name, "on_optimizer_step")
    assert in_naps <= inner["self_s"] == inner["total_s"]
    channels = {each["channel"]: each for each in document["channels"]}
    assert channels["on_optimizer_step"]["calls"] == 10
    all_naps = sum(slept[name])
    assert channels["on_optimizer_step"]["total_s"] >= all_naps
    forward = document["stages"]["forward"]["total_s"]  # without the first step
    assert channels["on_model_forward"]["self_s"] >= forward > 0
    assert channels["on_optimizer_step"]["self_s"] <= (
        channels["on_optimizer_step"]["total_s"] - all_naps
    )


@pytest.mark.parametrize("channel", CHANNEL_NAMES)
@pytest.mark.parametrize("role", ["before", "after"])
def test_every_function_is_measured(channel: ChannelName, role: str, tmp_path: Path) -> None:
    """Each function of a hook has its calls and its time, on each channel."""
    hooks: list[Any] = [
        napping(channel, role),
        ValidationHookConfig(every="1 epoch")(dataloaders={"val": make_loader(1)}),
    ]
    document = profile(tmp_path, hooks, loader=make_loader(3), max_step=6)
    found = function(document, f"naps {role} {channel}", channel)
    calls = {"on_loop": 1, "on_epoch": 2, "on_evaluation": 2}.get(channel, 6)
    assert (found["phase"], found["calls"]) == (role, calls)
    first, *others = slept[f"naps {role} {channel}"]
    assert found["first_s"] >= first
    assert found["self_s"] >= sum(others)
    assert found["self_s"] == found["total_s"]


def test_first_call_is_apart(tmp_path: Path) -> None:
    """A slow first call does not count in the time of the other calls."""
    slow = PipelineHooks("slow at first")
    slow.on_step.before(lambda args: nap(times=40) if args.global_step_id == 0 else None)
    slow.on_step.after(when="at steps 7")(lambda args: None)
    found = function(profile(tmp_path, [slow]), "slow at first", phase="before")
    assert found["first_s"] >= slept["hooks"][0]
    assert found["calls"] == 10
    assert found["self_s"] < found["first_s"]


def test_triggered_hook(tmp_path: Path) -> None:
    """A hook with a trigger has the time of its due calls, and a call in each step."""
    found = profile(tmp_path, [napping("on_step", "after", when="5 steps")])["hooks"]
    (found,) = (each for each in found if each["hook"].startswith("naps"))
    assert found["calls"] == 10
    assert found["self_s"] >= sum(slept[found["hook"]])
    assert len(slept[found["hook"]]) == 2


def test_positions_are_those_of_the_plan(tmp_path: Path) -> None:
    """Each function has the channel, position and hook that plan.json has."""
    hooks: list[Any] = [StatsMonitorConfig(), napping("on_step", "after"), SaveCheckpointConfig()]
    document = profile(tmp_path, hooks)
    plan = json.loads((tmp_path / "plan.json").read_text())["hooks"]
    planned = {(each["channel"], each["position"]): each["hook"] for each in plan}
    for each in document["hooks"]:
        assert planned[each["channel"], each["position"]] == each["hook"]
    functions = sum(each[p] is not None for each in plan for p in ("before", "after"))
    assert len(document["hooks"]) == functions


def test_accumulation(tmp_path: Path) -> None:
    """With a window of two batches, on_optimizer_step is open in every other step."""
    hooks: list[Any] = [napping("on_optimizer_step", "after")]
    document = profile(tmp_path, hooks, accumulate=2, loader=make_loader(10))
    channels = {each["channel"]: each["calls"] for each in document["channels"]}
    assert (channels["on_step"], channels["on_optimizer_step"]) == (10, 5)
    assert document["stages"]["hooks"]["total_s"] >= sum(slept["naps after on_optimizer_step"])


@pytest.mark.parametrize("processor", [gan.GAN, gan.JointGAN])
def test_several_optimizers(processor: type[SimpleBatchProcessor], tmp_path: Path) -> None:
    """Named steps open forward, backward and optimizer channels several times in a step."""
    model = gan.make_model()
    optimizer = {name: NappingSGD(model[name].parameters(), lr=0.1) for name in ("d", "g")}
    document = profile(
        tmp_path,
        [napping("on_model_backward", "before")],
        model=model,
        loader=gan.make_batches(),
        batch_processor=processor(),
        optimizer=optimizer,
        max_step=7,
    )
    check_stages(document, {"optimizer": "optimizer", "hooks": "naps before on_model_backward"})
    channels = {each["channel"]: each["calls"] for each in document["channels"]}
    assert channels["on_optimizer_step"] == channels["on_model_backward"] == 14


def test_hooks_change_during_the_run(tmp_path: Path) -> None:
    """A hook added and removed between two steps has the time of the steps between."""
    late = napping("on_step", "before")
    changes = PipelineHooks("changes")
    handles: list[RemovableHandle] = []

    @changes.on_epoch.before
    def change(args: PipelineHookArgs) -> None:
        if args.epoch_id == 1:
            handles.append(trainer.hooks.register_pipeline_hooks(late))
        elif args.epoch_id == 2:
            handles[0].remove()

    profiler = HookProfilerConfig(max_share=None)()
    loader = make_loader(5)
    trainer = make_trainer([changes, profiler], loader=loader, max_epoch=3, run_folder=tmp_path)
    trainer()
    found = function(read(tmp_path), late.name)
    assert found["calls"] == 5
    assert found["self_s"] >= sum(slept[late.name][1:])


@pytest.mark.parametrize("when", ["added", "removed"])
def test_profiler_itself_changes_during_the_run(when: str, tmp_path: Path) -> None:
    """A profiler added or removed in the middle of a run measures the other steps, and no more."""
    profiler = HookProfilerConfig(max_share=None)()
    changes = PipelineHooks("changes")
    metrics: list[str] = []

    @changes.on_step.before(when="at steps 6")
    def change(args: PipelineHookArgs) -> None:
        if when == "added":
            trainer.hooks.register_pipeline_hooks(profiler)
        else:
            handle.remove()

    trainer = make_trainer(
        [changes, MetricsLoggerConfig(every="4 steps", sinks=[])], max_step=12, run_folder=tmp_path
    )
    trainer.hooks.on_loop.after(lambda args: metrics.extend(args.metrics.names()))
    if when == "removed":
        handle = trainer.hooks.register_pipeline_hooks(profiler)
    trainer()
    assert "perf/stages/forward" in metrics
    assert (tmp_path / "profile.json").exists() is (when == "removed")
    channel = trainer.hooks.get_channel("on_step")
    assert len(channel) == (4 if when == "added" else 3)


def test_registered_again_each_step(tmp_path: Path) -> None:
    """A function registered again in each step is one function with all calls."""
    hooks = PipelineHooks("again")
    handles: list[RemovableHandle] = []

    @hooks.on_step.after
    def register(args: PipelineHookArgs) -> None:
        for handle in handles:
            handle.remove()
        context = HookContext[PipelineHookArgs].from_callable(before=nap)
        handles[:] = [hooks.register_hook("on_batch", context)]

    document = profile(tmp_path, [hooks])
    assert function(document, "again", "on_batch")["calls"] == 9


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", CHANNEL_NAMES[:-1])
@pytest.mark.parametrize("role", ["before", "after"])
def test_failed_hook(
    channel: ChannelName, role: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in a hook has the notes that it has without a profiler; the files are written."""

    def fail(args: PipelineHookArgs) -> None:
        if channel == "on_loop" or args.progress.steps_done >= 6:
            raise KeyError("on purpose")

    def noted(order: list[str], text: str, args: PipelineHookArgs) -> None:
        order.append(f"{text} {args.exception!r}")

    found = {}
    for name, more in (("off", []), ("on", [HookProfilerConfig()])):
        order: list[str] = []
        failing = PipelineHooks("failing")
        getattr(getattr(failing, channel), role)(fail)
        outer, inner = PipelineHooks("outer"), PipelineHooks("inner")
        for hooks in (outer, inner):
            for each in CHANNEL_NAMES:
                for kind in ("before", "after"):
                    note = partial(noted, order, f"{hooks.name} {kind} {each}")
                    getattr(getattr(hooks, each), kind)(note)
        trainer = make_trainer(
            [outer, failing, inner, *more], max_epoch=2, run_folder=tmp_path / name
        )
        with pytest.raises(KeyError, match="on purpose") as caught:
            trainer()
        found[name] = origin_of(caught.value), caught.value.__notes__, order
    assert found["on"] == found["off"]
    document = read(tmp_path / "on")
    assert document["steps"] >= (4 if channel != "on_loop" else 0) or role == "after"


def test_failed_body(tmp_path: Path) -> None:
    """An error in the forward pass ends all open channels, and the files have all steps."""

    def fail(model: Any, batch: Batch) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise ValueError("on purpose")
        return loss_of(model, batch)

    calls: list[int] = []
    processor = SimpleBatchProcessor.from_callable(fail)
    trainer = make_trainer(
        [HookProfilerConfig(trace_start_step=0)],
        batch_processor=processor,
        max_epoch=9,
        run_folder=tmp_path,
    )
    with pytest.raises(ValueError, match="on purpose"):
        trainer()
    assert read(tmp_path)["steps"] == 7
    (loop,) = read_trace(tmp_path / "trace.json")["rank 0"]
    assert sum(path.endswith("/on_model_forward") for path in loop.paths()) == 8


def test_files_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run whose profile can't be written is complete, and says so once."""
    (tmp_path / "profile.json").mkdir()
    (tmp_path / "profile.json" / "file").touch()
    trainer = make_trainer([HookProfilerConfig()], max_step=4, run_folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer()
    assert trainer.progress.global_step_id == 4
    assert sum("profile.json" in record.getMessage() for record in caplog.records) >= 1


def test_rollback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The steps before and after a rollback are measured, and the table is logged once."""
    again = PipelineHooks("again")
    asked: list[int] = []

    @again.on_step.after(when="at steps 7")
    def ask(args: PipelineHookArgs) -> None:
        if not asked:
            asked.append(1)
            args.requests.rollback("on purpose")

    hooks: list[Any] = [
        again,
        SaveCheckpointConfig(every="5 steps"),
        HookProfilerConfig(max_share=None),
    ]
    with caplog.at_level(logging.INFO, LOGGER):
        make_trainer(hooks, max_step=10, run_folder=tmp_path)()
    assert sum(record.name == LOGGER for record in caplog.records) == 1
    document = read(tmp_path)
    assert document["steps"] == 11
    assert function(document, "again")["calls"] == 12


# --- board and budget ------------------------------------------------------------------------


def test_medians_are_published() -> None:
    """The board has the median seconds of each hook and stage in a step."""
    hooks: list[Any] = [HookProfilerConfig(max_share=None), napping("on_batch", "before")]
    metrics = run_hook(hooks, steps=9, log_every="3 steps").metrics
    assert set(metrics["perf/hooks/naps before on_batch"]) == {3, 6, 9}
    for seconds in metrics["perf/hooks/naps before on_batch"].values():
        assert NAP_S <= seconds <= max(slept["naps before on_batch"]) * 2
    stages = {name for name in metrics if name.startswith("perf/stages/")}
    assert stages <= {f"perf/stages/{stage}" for stage in STAGES}
    assert all(metrics["perf/stages/forward"].values())


def budget_warnings(budget: Any, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    hooks: list[Any] = [
        HookProfilerConfig(max_share=budget),
        napping("on_step", "before"),
        napping("on_batch", "after"),
        MetricsLoggerConfig(every="10 steps", sinks=[]),
    ]
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(hooks, max_step=60, **options)()
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_budget_of_all_hooks(caplog: pytest.LogCaptureFixture) -> None:
    """Each hook beyond the budget gets one warning with its share and time."""
    found = budget_warnings(0.1, caplog)
    assert len(found) == 2
    for text in found:
        assert text.startswith("HookProfiler.max_share: hook 'naps ")
        assert re.search(r"takes \d\d\.\d% of a step \(\d[\d.]*ms of \d[\d.]*ms, mean", text)
        assert "more than its budget of 10.0%" in text


def test_budget_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """A budget by name is for that hook only; an unknown name is reported with a suggestion."""
    budget = {"naps before on_step": 0.9, "naps after on_batch": 0.1, "naps before on_step2": 0.1}
    of_hook, unknown = sorted(budget_warnings(budget, caplog))
    assert "hook 'naps after on_batch' takes" in of_hook
    assert "no hook 'naps before on_step2' has run; did you mean" in unknown


def test_no_budget(caplog: pytest.LogCaptureFixture) -> None:
    """No hook gets a warning without a budget."""
    assert budget_warnings(None, caplog) == []


@pytest.mark.parametrize("share", [-0.1, {"EMA": -1.0}, float("nan")])
def test_invalid_budget_is_refused(share: Any) -> None:
    """A share is a number from 0."""
    with pytest.raises(ValueError, match="max_share"):
        HookProfilerConfig(max_share=share)


def test_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the end a table has the stages, and the hooks with the most expensive one first."""
    hooks: list[Any] = [napping("on_step", "before"), HookProfilerConfig(max_share=None)]
    with caplog.at_level(logging.INFO, LOGGER):
        make_trainer(hooks, max_step=10)()
    (record,) = (record for record in caplog.records if record.name == LOGGER)
    lines = record.getMessage().splitlines()
    assert lines[0].startswith("HookProfiler: 9 steps of ")
    assert [line.split()[0] for line in lines[1:11]] == ["stage", *STAGES]
    assert lines[11].split() == ["hook", "function", "calls", "first", "self", "total", "share"]
    assert lines[12].startswith("naps before on_step  on_step.before     10  ")
    assert all(len(line) <= 80 for line in lines)


def test_table_without_steps(caplog: pytest.LogCaptureFixture) -> None:
    """A run of one step has nothing to measure, and says so."""
    with caplog.at_level(logging.INFO, LOGGER):
        make_trainer([HookProfilerConfig()], max_step=1)()
    assert "no step after the first one to measure" in caplog.text


# --- trace -----------------------------------------------------------------------------------


def test_a_trace_nests_channels_hooks_and_stages(tmp_path: Path) -> None:
    """The trace has the configured steps, with hooks and stages within their channels."""
    hooks: list[Any] = [
        napping("on_optimizer_step", "before"),
        HookProfilerConfig(trace_start_step=4, trace_steps=3),
        ValidationHookConfig(every="6 steps")(dataloaders={"val": make_loader(1)}),
        SaveCheckpointConfig(every="6 steps"),
    ]
    make_trainer(hooks, loader=make_loader(6), max_step=12, run_folder=tmp_path)()
    trace = read_trace(tmp_path / "trace.json")
    assert list(trace) == ["rank 0"]
    (loop,) = trace["rank 0"]
    epochs = [each for each in loop.inside if each.name == "on_epoch"]
    steps = [step for epoch in epochs for step in epoch.inside if step.name == "on_step"]
    assert [step.args["step"] for step in steps] == [5, 6, 7]
    assert len(epochs) == 2
    commit = [each.name for each in loop.inside]
    assert commit == ["on_epoch", "on_evaluation", "logging", "saving", "on_epoch"]
    assert "on_epoch/data_wait" in epochs[0].paths()
    update = "OptimizerHook/on_optimizer_step"
    for step in steps:
        paths = step.paths()
        assert "on_step/on_batch/on_model_forward/forward" in paths
        assert "on_step/on_batch/on_model_backward/backward" in paths
        assert f"on_step/{update}/optimizer" in paths
        assert f"on_step/{update}/naps before on_optimizer_step" in paths
        (found,) = (each for each in all_of(step) if each.name.startswith("naps"))
        assert found.args["channel"] == "on_optimizer_step"
        assert found.args["phase"] == "before"
        assert found.end - found.start >= NAP_S * 1e6


def all_of(outer: Slice) -> Iterator[Slice]:
    yield outer
    for each in outer.inside:
        yield from all_of(each)


def test_trace_of_a_short_run(tmp_path: Path) -> None:
    """A run that ends within the window has the trace of its steps; one before has no trace."""
    make_trainer(
        [HookProfilerConfig(trace_start_step=2)], max_step=4, run_folder=tmp_path / "within"
    )()
    (loop,) = read_trace(tmp_path / "within" / "trace.json")["rank 0"]
    assert sum(path.endswith("on_epoch/on_step") for path in loop.paths()) == 2
    make_trainer([HookProfilerConfig()], max_step=4, run_folder=tmp_path / "before")()
    assert not (tmp_path / "before" / "trace.json").exists()


def test_together_with_torch_profiler(tmp_path: Path) -> None:
    """The trace of torch.profiler has a range for each channel and function of a hook."""
    hooks: list[Any] = [
        napping("on_batch", "before"),
        HookProfilerConfig(trace_start_step=2, trace_steps=3),
        TorchProfilerHookConfig(folder=str(tmp_path / "torch"), start_step=3, steps=2),
    ]
    trainer = make_trainer(hooks, max_step=7, run_folder=tmp_path)
    trainer()
    (file,) = (tmp_path / "torch").rglob("*.json")
    events = json.loads(file.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name in ("on_step", "on_batch", "on_model_backward", "on_optimizer_step"):
        assert names.count(name) == 2
    assert names.count("naps before on_batch on_batch.before") == 2
    assert names.count("OptimizerHook on_step.after") == 2
    (loop,) = read_trace(tmp_path / "trace.json")["rank 0"]
    assert sum(path.endswith("on_epoch/on_step") for path in loop.paths()) == 3
    document = read(tmp_path)
    assert function(document, "naps before on_batch", "on_batch")["calls"] == 7


# --- ranks, devices and effects --------------------------------------------------------------


def test_two_ranks(tmp_path: Path) -> None:
    """The files have both ranks; one collective is at the end, and none in a step."""
    launch(SCRIPT, tmp_path, "well")
    document = read(tmp_path / "on")
    assert [each["rank"] for each in document["ranks"]] == [0, 1]
    naps = [function(each, "slow")["self_s"] for each in document["ranks"]]
    assert naps[1] >= 9 * 0.004 > naps[0]
    trace = read_trace(tmp_path / "on" / "trace.json")
    assert list(trace) == ["rank 0", "rank 1"]
    for slices in trace.values():
        (loop,) = slices
        steps = [each for each in all_of(loop) if each.name == "on_step"]
        assert [each.args["step"] for each in steps] == [3, 4, 5]
    (first,), (second,) = trace.values()
    assert abs(first.start - second.start) < 1e6  # of one clock, in microseconds
    for rank in (0, 1):
        on, off = ((tmp_path / f"collectives.{name}.{rank}").read_text() for name in ("on", "off"))
        assert int(on) == int(off) + 1
    assert not list((tmp_path / "on").glob("*.rank*"))


def test_failed_rank(tmp_path: Path) -> None:
    """After an error, a rank writes its own files."""
    launch(SCRIPT, tmp_path, "fails", fails=True)
    document = json.loads((tmp_path / "on" / "profile.rank1.json").read_text())
    assert (document["rank"], document["steps"], len(document["ranks"])) == (1, 7, 1)
    assert list(read_trace(tmp_path / "on" / "trace.rank1.json")) == ["rank 1"]


class PassedEvent:
    """Stand-in for an event of a device: passed at once, at the time in seconds of a counter."""

    now = 0.0
    passed = True

    def record(self) -> None:
        PassedEvent.now += 0.25
        self.at = PassedEvent.now

    def query(self) -> bool:
        return PassedEvent.passed

    def elapsed_time(self, end: PassedEvent) -> float:
        return (end.at - self.at) * 1e3


def test_device_idle() -> None:
    """The time between two steps is read when the device has passed it, without commit points."""
    idle, args = DeviceIdle(PassedEvent), PipelineHookArgs()
    PassedEvent.passed = False
    for _ in range(100):  # more than the events that wait
        idle.begin_step(args)
        idle.end_step(args)
    assert idle.read() == []
    PassedEvent.passed = True
    assert idle.read() == [0.25] * 64
    for _ in range(3):
        idle.begin_step(args)
        idle.end_step(args)
        idle.drop(args)
    idle.begin_step(args)
    assert len(idle.read()) == 64


def test_hook_does_not_affect_training() -> None:
    """The hook reads no tensors, and changes neither weights nor a resumed run."""
    cfg = HookProfilerConfig(max_share=None)
    assert_no_device_sync(cfg, log_every="3 steps")
    assert_weights_unchanged(cfg, accumulate=2)
    assert_state_round_trip(cfg, steps=6, log_every="2 steps")


def test_nothing_is_left_without_the_profiler() -> None:
    """The channels of a trainer run the hooks' own functions before a profiler and after it."""
    hooks = PipelineHooks("plain")
    hooks.on_step.before(nap)
    trainer = make_trainer(hooks, max_step=1)
    run: list[Any] = []

    def note(entries: Any) -> Any:  # innermost, so that it sees what the others made
        run[:] = [entry.before for entry in entries]
        return entries

    def functions() -> list[Any]:
        last = PipelineHooks("last")
        last.get_channel("on_step").wrap(note)
        handle = trainer.hooks.register_pipeline_hooks(last)
        trainer.hooks.get_channel("on_step").entries()
        handle.remove()
        return [*run]

    assert functions() == [None, nap]
    handle = trainer.hooks.register_pipeline_hooks(HookProfilerConfig()())
    assert nap not in functions()
    handle.remove()
    assert functions() == [None, nap]


def test_same_weights_with_every_channel_wrapped() -> None:
    """A profiled run of several optimizers has the weights of one without a profiler."""
    found = []
    for hooks in ([], [HookProfilerConfig()]):
        model = make_model()
        make_trainer(hooks, model=model, max_step=9)()
        found.append(weights(model))
    assert equal(*found)


def test_profiler_can_be_created_in_code() -> None:
    """A hook object works as its configuration does."""
    assert isinstance(HookProfiler(HookProfilerConfig(trace_steps=0)), PipelineHooks)
