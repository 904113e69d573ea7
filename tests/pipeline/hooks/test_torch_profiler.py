"""Profiling a range of steps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import profile

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks.torch_profiler import TorchProfilerHookConfig
from robo_orchard_lab.testing import assert_state_round_trip, assert_weights_unchanged
from tiny import equal, make_model, make_trainer, weights


def config(folder: Path, **options: Any) -> TorchProfilerHookConfig:
    return TorchProfilerHookConfig(folder=str(folder), **options)


def traces(folder: Path) -> dict[str, list[str]]:
    """Return the event names of each trace by path."""
    return {
        str(path.relative_to(folder)): [
            event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]
        ]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def updates(events: list[str]) -> int:
    """Return the number of weight updates in a trace."""
    return sum(name.startswith("Optimizer.step#") for name in events)


@pytest.mark.parametrize("warmup", [0, 1, 3, 9])
def test_steps_are_recorded(warmup: int, tmp_path: Path) -> None:
    """The trace has the requested steps with their updates, with any warm-up."""
    make_trainer([config(tmp_path, start_step=4, steps=2, warmup_steps=warmup)], max_epoch=2)()
    found = traces(tmp_path)
    assert list(found) == ["rank0/steps4-5.pt.trace.json"]
    (events,) = found.values()
    assert updates(events) == 2
    assert sum(name == "aten::mse_loss" for name in events) == 2
    counted = min(warmup, 4)  # the profiler counts steps since its start
    marks = {name for name in events if name.startswith("ProfilerStep#")}
    assert marks == {f"ProfilerStep#{counted}", f"ProfilerStep#{counted + 1}"}


def test_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    """A range over the complete run records all steps."""
    make_trainer([config(tmp_path, start_step=0, steps=7)], max_epoch=1)()
    ((name, events),) = traces(tmp_path).items()
    assert name == "rank0/steps0-6.pt.trace.json"
    assert updates(events) == 7


@pytest.mark.parametrize("how", ["limit", "failure"])
def test_early_end_writes_the_recorded_steps(how: str, tmp_path: Path) -> None:
    """The profiler is closed at any end, with the recorded steps."""
    failing = PipelineHooks()

    @failing.on_step.after(when="at steps 5")
    def fail(args: PipelineHookArgs) -> None:
        if how == "failure":
            raise RuntimeError("planted")

    trainer = make_trainer([config(tmp_path, start_step=3, steps=9), failing], max_step=5)
    if how == "failure":
        with pytest.raises(RuntimeError, match="planted"):
            trainer()
    else:
        trainer()
    ((name, events),) = traces(tmp_path).items()
    assert name == "rank0/steps3-4.pt.trace.json"
    assert updates(events) == (1 if how == "failure" else 2)
    with profile():  # impossible with two at once
        pass


def test_end_during_warm_up_writes_nothing(tmp_path: Path) -> None:
    """Without a recorded step, no trace is written and the profiler is closed."""
    make_trainer([config(tmp_path, start_step=5, warmup_steps=3)], max_step=4)()
    assert traces(tmp_path) == {}
    with profile():
        pass


@pytest.mark.parametrize(("at", "files"), [(3, ["steps3-4"]), (5, []), (6, [])])
def test_resumed_run_records_the_rest(at: int, files: list[str], tmp_path: Path) -> None:
    """A run resumed within the range records the rest, after the range nothing."""
    half = make_trainer([config(tmp_path / "half", start_step=50)], max_step=at)
    half()
    half.save_checkpoint(tmp_path / "saved")
    make_trainer(
        [config(tmp_path / "rest", start_step=2, steps=3)],
        max_epoch=1,
        resume_from=tmp_path / "saved",
    )()
    found = traces(tmp_path / "rest")
    assert list(found) == [f"rank0/{name}.pt.trace.json" for name in files]
    assert [updates(events) for events in found.values()] == [2] * len(files)


def test_unwritable_folder_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The error is logged with its cause, and training continues."""
    (tmp_path / "taken").write_text("a file")
    model, plain = make_model(), make_model()
    with caplog.at_level(logging.ERROR):
        make_trainer([config(tmp_path / "taken", start_step=1, steps=1)], model=model, max_step=5)()
    assert caplog.text.count("TorchProfilerHook: writing") == 1
    assert caplog.text.count("steps1-1.pt.trace.json failed; the run continues") == 1
    assert "NotADirectoryError" in caplog.text
    make_trainer(model=plain, max_step=5)()
    assert equal(weights(model), weights(plain))


def test_running_profiler_is_not_disturbed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The hook logs an error and does nothing if a profiler runs already."""
    with caplog.at_level(logging.ERROR), profile() as outer:
        trainer = make_trainer([config(tmp_path, start_step=1, steps=1)], max_step=4)
        trainer()
    assert trainer.progress.global_step_id == 4
    assert caplog.text.count("TorchProfilerHook: profiling failed") == 1
    assert traces(tmp_path) == {}
    assert updates([event.key for event in outer.key_averages()]) >= 1


def test_profiling_does_not_change_training(tmp_path: Path) -> None:
    """Weights are bit-identical with and without the hook."""
    options = {"record_shapes": True, "profile_memory": True, "with_stack": True}
    assert_weights_unchanged(config(tmp_path, start_step=1, **options))
    assert list(traces(tmp_path)) == ["rank0/steps1-3.pt.trace.json"]
    assert_state_round_trip(config(tmp_path, start_step=2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start_step": -1}, "greater than or equal to 0"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"warmup_steps": -1}, "greater than or equal to 0"),
    ],
)
def test_invalid_configs_are_refused(fields: dict[str, int], message: str) -> None:
    """Invalid ranges are refused when the config is built."""
    with pytest.raises(ValueError, match=message):
        TorchProfilerHookConfig(folder="traces", **fields)  # type: ignore[arg-type]  # ints alone
