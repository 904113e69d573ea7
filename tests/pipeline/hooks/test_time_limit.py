"""Saving and stopping before a time limit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import PipelineConfigError, RunPreempted
from robo_orchard_lab.pipeline.hooks import TimeLimitConfig
from robo_orchard_lab.pipeline.hooks.time_limit import duration_s
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.testing import assert_no_device_sync, assert_weights_unchanged
from tiny import make_trainer


def age_s() -> float:
    """Return the age of this process in seconds."""
    return float(time.time() - psutil.Process().create_time())


class Saver(PipelineHooks):
    """Hook that records the steps of save requests, with slow steps."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[int] = []
        self.on_loop.before(self._open)
        self.on_step.before(lambda args: time.sleep(0.02))

    def _open(self, args: PipelineHookArgs) -> None:
        args.run.savers[self.name] = lambda requests: self.saved.append(args.global_step_id)


def stopped(config: TimeLimitConfig, **options: Any) -> tuple[Saver, int]:
    """Run until the limit stops the trainer; return the saves and the exit code."""
    saver = Saver()
    with pytest.raises(RunPreempted) as error:
        make_trainer([config, saver], **{"max_step": 10_000, **options})()
    assert isinstance(error.value.code, int)
    return saver, error.value.code


def test_run_stops_with_the_margin_left(tmp_path: Path) -> None:
    """The run is saved at the first commit point within the margin."""
    make_trainer(max_step=1)()  # first-time initialization
    end_at = time.time() + 10.6
    saver, code = stopped(TimeLimitConfig(limit=age_s() + 10.6, margin=10), run_folder=tmp_path)
    assert 9.0 < end_at - time.time() <= 10.0
    state = read_run_state(tmp_path)
    assert code == state.exit_code == 75
    assert state.state == "preempted"
    assert state.by == "TimeLimit"
    assert state.reason is not None
    assert state.reason.endswith("is near, with 10 s reserved for saving")
    assert saver.saved == [state.progress["global_step_id"]]
    assert 1 < saver.saved[0] < 100


def test_past_limit_stops_after_one_step() -> None:
    """A process that starts too late stops after one step."""
    saver, code = stopped(TimeLimitConfig(limit=1e-3, margin=0, exit_code=3))
    assert (saver.saved, code) == ([1], 3)


def test_run_without_exit_code_is_completed(tmp_path: Path) -> None:
    """The limit completes the training with exit_code=None."""
    config = TimeLimitConfig(limit=0.001, margin=0, exit_code=None, save_checkpoint=False)
    make_trainer(config, max_step=9, run_folder=tmp_path)()
    assert read_run_state(tmp_path).state == "completed"


def test_slurm_end_time_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is SLURM_JOB_END_TIME."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 12))
    begun_at = time.time()
    saver, _ = stopped(TimeLimitConfig(limit="slurm", margin="11 s"))
    assert time.time() - begun_at < 3
    assert saver.saved


@pytest.mark.parametrize(
    ("left", "steps"), [("0:01", 1), ("UNLIMITED", 2), ("1-02:00:00", 2), ("no", 0)]
)
def test_squeue_is_used_without_end_time(
    left: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the variable, squeue returns the time left; here by a substitute program."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$*" > "{tmp_path}/requests"\necho "{left}"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    trainer = make_trainer([TimeLimitConfig(limit="slurm", margin=30), Saver()], max_step=2)
    if steps == 0:
        with pytest.raises(PipelineConfigError, match="can't find the end of SLURM job 42"):
            trainer()
    elif steps == 1:
        with pytest.raises(RunPreempted):
            trainer()
    else:
        trainer()
    assert trainer.progress.global_step_id == steps
    assert (tmp_path / "requests").read_text() == "--noheader --format=%L --jobs=42\n"


def test_slurm_limit_outside_of_slurm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the alternative."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(PipelineConfigError, match=r"outside of a SLURM job .*such as '3h30min'"):
        make_trainer([TimeLimitConfig(limit="slurm"), Saver()], max_step=1)()


def test_missing_saver_is_refused_at_the_start() -> None:
    """The error comes before the first step."""
    with pytest.raises(PipelineConfigError, match=r"TimeLimit: .* register a SaveCheckpoint"):
        make_trainer(TimeLimitConfig(limit="1 h"), max_step=1)()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": "soon"}, "can't read 'soon' as a length of time"),
        ({"limit": True}, "expected seconds or a text"),
        ({"limit": "1 min"}, "got a margin of 120.0 s and a limit of 60.0 s"),
        ({"limit": float("inf")}, "finite"),
        ({"limit": "1h", "margin": -1}, ">= 0"),
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """Invalid times, and a margin as long as the limit, are refused."""
    with pytest.raises(ValueError, match=message):
        TimeLimitConfig(**fields)


def test_config_round_trips() -> None:
    """Times are stored in seconds and equal when read back."""
    for limit in ("slurm", "3h30min", 600):
        config = TimeLimitConfig(limit=limit)
        assert TimeLimitConfig.from_str(config.to_str()) == config


@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_all_time_formats_agree(days: int, hours: int, minutes: int, seconds: int) -> None:
    """Times can be written with units, as a clock, and in seconds."""
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert duration_s(f"{days}d{hours}h{minutes}min{seconds}s") == total
    assert duration_s(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == total
    assert duration_s(f"{days} days {hours} hours {minutes} minutes {seconds} sec") == total
    assert duration_s(str(total)) == duration_s(total) == total


@pytest.mark.parametrize("text", ["", " ", "h", "3h 5", "1:2:3:4", "5-", "1.2.3 s", "nan", "-5 s"])
def test_invalid_times_are_refused(text: str) -> None:
    """The error shows the format."""
    with pytest.raises(ValueError, match="length of time"):
        duration_s(text)


def test_hook_does_not_affect_training() -> None:
    """The hook changes no weights and reads no tensors."""
    hook = TimeLimitConfig(limit="100 d", save_checkpoint=False)
    assert_weights_unchanged(hook)
    assert_no_device_sync(hook)
