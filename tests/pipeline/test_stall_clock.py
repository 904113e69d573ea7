"""When a run counts as stalled, and what is then written; whole runs: ``test_failed_ranks.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.peers import StallClock
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.signs_of_life import sign_of_life


def test_only_looks_without_progress_count() -> None:
    """A step, or a sign of life, begins the time anew."""
    progress = TrainerProgress()
    clock = StallClock(2.0, progress)
    clock.start()
    assert not clock.look(1.5)
    progress.finish_step()
    assert not clock.look(1.5)
    assert not clock.look(1.5)
    sign_of_life()
    assert not clock.look(1.5)
    assert not clock.look(1.5)
    assert clock.look(0.5)
    clock.start()
    assert not clock.look(1.5)


def test_stacks_are_written_to_the_folder_of_the_run(tmp_path: Path) -> None:
    """Of every thread, under the number of the rank, with the place in the run."""
    clock = StallClock(2.0, TrainerProgress(), tmp_path, rank=3)
    clock.write_stacks()
    told = (tmp_path / "stalled" / "rank00003.txt").read_text()
    assert told.startswith("rank 3, process ")
    assert "test_stacks_are_written_to_the_folder_of_the_run" in told
    assert clock.reason().startswith("no progress for 2 s at epoch 0")
    assert str(tmp_path / "stalled") in clock.reason()


def test_stacks_without_a_place_go_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the run has no folder, or none can be made."""
    (tmp_path / "stalled").write_text("a file is in the way")
    for folder in (None, tmp_path):
        StallClock(2.0, TrainerProgress(), folder).write_stacks()
        assert "test_stacks_without_a_place_go_to_stderr" in capfd.readouterr().err
    assert "standard error" in StallClock(2.0, TrainerProgress()).reason()


@pytest.mark.parametrize("timeout_s", [0, -1.0, "1 min"])
def test_only_a_time_is_taken(timeout_s: object) -> None:
    """In seconds, more than none."""
    with pytest.raises(PipelineConfigError, match="stall_timeout_s must be > 0 seconds"):
        StallClock(timeout_s, TrainerProgress())  # type: ignore[arg-type]  # that is the point
