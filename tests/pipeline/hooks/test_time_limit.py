"""A run is saved and stopped before its time is up."""

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
    """How long this process has been running."""
    return float(time.time() - psutil.Process().create_time())


class Saver(PipelineHooks):
    """Saves when asked to, by writing down the step; each step takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[int] = []
        self.on_loop.before(self._open)
        self.on_step.before(lambda args: time.sleep(0.02))

    def _open(self, args: PipelineHookArgs) -> None:
        args.run.savers[self.name] = lambda asked: self.saved.append(args.global_step_id)


def stopped(config: TimeLimitConfig, **options: Any) -> tuple[Saver, int]:
    """Run until the limit stops it: what saved, and the exit code."""
    saver = Saver()
    with pytest.raises(RunPreempted) as error:
        make_trainer([config, saver], **{"max_step": 10_000, **options})()
    assert isinstance(error.value.code, int)
    return saver, error.value.code


def test_a_run_stops_with_the_margin_left(tmp_path: Path) -> None:
    """It is saved at the first commit point at which no more than the margin is left."""
    make_trainer(max_step=1)()  # whatever takes long for the first time
    end_at = time.time() + 10.6
    saver, code = stopped(TimeLimitConfig(limit=age_s() + 10.6, margin=10), run_folder=tmp_path)
    assert 9.0 < end_at - time.time() <= 10.0
    state = read_run_state(tmp_path)
    assert code == state.exit_code == 75
    assert state.state == "preempted"
    assert state.by == "TimeLimit"
    assert state.reason is not None
    assert state.reason.endswith("is near, with 10 s kept for saving")
    assert saver.saved == [state.progress["global_step_id"]]
    assert 1 < saver.saved[0] < 100


def test_a_limit_that_is_past_stops_after_one_step() -> None:
    """A process that is started too late does not hang about."""
    saver, code = stopped(TimeLimitConfig(limit=1e-3, margin=0, exit_code=3))
    assert (saver.saved, code) == ([1], 3)


def test_without_an_exit_code_the_run_is_over(tmp_path: Path) -> None:
    """A time limit can also be the end of the training."""
    config = TimeLimitConfig(limit=0.001, margin=0, exit_code=None, save_checkpoint=False)
    make_trainer(config, max_step=9, run_folder=tmp_path)()
    assert read_run_state(tmp_path).state == "completed"


def test_slurm_says_when_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time that it gives its jobs."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 12))
    begun_at = time.time()
    saver, _ = stopped(TimeLimitConfig(limit="slurm", margin="11 s"))
    assert time.time() - begun_at < 3
    assert saver.saved


@pytest.mark.parametrize(
    ("told", "steps"), [("0:01", 1), ("UNLIMITED", 2), ("1-02:00:00", 2), ("no", 0)]
)
def test_an_older_slurm_is_asked(
    told: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the end in the environment, squeue says what is left; a program stands in for it."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$*" > "{tmp_path}/asked"\necho "{told}"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    trainer = make_trainer([TimeLimitConfig(limit="slurm", margin=30), Saver()], max_step=2)
    if steps == 0:
        with pytest.raises(PipelineConfigError, match=r"can't find out when SLURM job 42 ends"):
            trainer()
    elif steps == 1:
        with pytest.raises(RunPreempted):
            trainer()
    else:
        trainer()
    assert trainer.progress.global_step_id == steps
    assert (tmp_path / "asked").read_text() == "--noheader --format=%L --jobs=42\n"


def test_slurm_outside_of_slurm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to give instead."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(PipelineConfigError, match=r"outside of a SLURM job .*such as '3h30min'"):
        make_trainer([TimeLimitConfig(limit="slurm"), Saver()], max_step=1)()


def test_a_hook_that_saves_is_asked_for_ahead() -> None:
    """That nobody saves is told before the first step."""
    with pytest.raises(PipelineConfigError, match=r"TimeLimit: .* register a SaveCheckpoint"):
        make_trainer(TimeLimitConfig(limit="1 h"), max_step=1)()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"limit": "soon"}, "can't read 'soon' as a length of time"),
        ({"limit": True}, "expected seconds or a text"),
        ({"limit": "1 min"}, "no time beside a margin of 120.0 s"),
        ({"limit": float("inf")}, "finite"),
        ({"limit": "1h", "margin": -1}, ">= 0"),
    ],
)
def test_fields_are_checked_ahead(fields: dict[str, Any], told: str) -> None:
    """What is no time, or leaves none, is refused when configured."""
    with pytest.raises(ValueError, match=told):
        TimeLimitConfig(**fields)


def test_a_config_survives_its_file() -> None:
    """Times are held as seconds, and are the same when read back."""
    for limit in ("slurm", "3h30min", 600):
        config = TimeLimitConfig(limit=limit)
        assert TimeLimitConfig.from_str(config.to_str()) == config


@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_all_ways_to_write_a_time_agree(days: int, hours: int, minutes: int, seconds: int) -> None:
    """With units, as a clock, and in seconds."""
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert duration_s(f"{days}d{hours}h{minutes}min{seconds}s") == total
    assert duration_s(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == total
    assert duration_s(f"{days} days {hours} hours {minutes} minutes {seconds} sec") == total
    assert duration_s(str(total)) == duration_s(total) == total


@pytest.mark.parametrize("text", ["", " ", "h", "3h 5", "1:2:3:4", "5-", "1.2.3 s", "nan", "-5 s"])
def test_other_texts_are_refused(text: str) -> None:
    """The error shows how to write it."""
    with pytest.raises(ValueError, match="length of time"):
        duration_s(text)


def test_it_watches_without_a_trace() -> None:
    """It changes no weights and reads nothing from the device."""
    hook = TimeLimitConfig(limit="100 d", save_checkpoint=False)
    assert_weights_unchanged(hook)
    assert_no_device_sync(hook)
