"""A failure on one rank ends all ranks within seconds and is reported first and last."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fails_on_ranks import FAILS_AT
from launching import SCRIPTS, command, environment, launch, without_greetings
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES
from robo_orchard_lab.pipeline.run.run_state import RunState, read_run_state

KILLED = -9
LONGEST_S = 10.0
IN_CHANNELS = [f"{role} {channel}" for channel in CHANNEL_NAMES for role in ("before", "after")]


class Ended(NamedTuple):
    """End of both ranks of a pair."""

    codes: list[int]
    seconds: float
    """Time since the failure; infinite if no failure time was recorded."""
    orphans: list[int]
    outputs: list[str]
    folder: Path

    @property
    def state(self) -> RunState:
        return read_run_state(self.folder)


def run_pairs(folder: Path, *cases: str) -> list[Ended]:
    """Run a pair of ranks for each case: a position and, after a ``+``, options."""
    launch(SCRIPTS / "pairs.py", folder, *cases, processes=1, timeout_s=30 + 100 * len(cases))
    return [
        Ended(**json.loads((folder / f"{case}.json").read_text()), folder=folder / case)
        for case in cases
    ]


def check_ended(ended: Ended, error: str, hook: str | None = None) -> None:
    """Check that both ranks ended without orphans and report rank 1's error."""
    output = "\n".join(ended.outputs)
    assert ended.codes[1] != 0, output
    assert ended.seconds < LONGEST_S, output
    assert not ended.orphans, output
    first = without_greetings(ended.outputs[1].lstrip()).splitlines()[0]
    assert first.startswith(f"rank 1 failed first: {error}"), output
    if hook is not None:
        assert f"raised in hook {hook}" in first, output
    store = CheckpointStore(ended.folder / "checkpoints")
    assert all(found.problem is None for found in store.verify()), output


def check_place(ended: Ended, place: str) -> None:
    role, _, channel = place.partition(" ")
    check_ended(ended, "ValueError: planted", f"'Planted' ({channel}, {role})")
    assert ended.codes[0] != 0
    state = ended.state
    assert state.state == "failed"
    assert state.error is not None
    assert (state.error.rank, state.error.type) == (1, "ValueError")
    assert state.error.hook is not None
    assert state.error.hook.startswith(f"'Planted' ({channel}, {role})")


def check_last_word(ended: Ended) -> None:
    """Check that rank 0, if not terminated before, reports the first failure."""
    output = ended.outputs[0]
    if output.strip() and ended.codes[0] == 1:
        words = ("RankFailed: rank 1 failed first: ", "exiting: rank 1 failed first: ")
        assert any(word in output for word in words), output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Run all pairs of the quick tests together."""
    cases = [
        "nowhere",
        "before on_step",
        "after on_model_backward+preemption",
        "after on_loop",
        "killed+preemption",
        "resume",
        "save",
        "stalled",
    ]
    return dict(zip(cases, run_pairs(tmp_path_factory.mktemp("pairs"), *cases), strict=True))


def test_a_plain_script_ends_well(pairs: dict[str, Ended]) -> None:
    """A plain script exits with 0, without cleanup after its training.

    The first rank reports the fresh start, and warns that no hook writes the metrics of its hooks.
    """
    ended = pairs["nowhere"]
    assert ended.codes == [0, 0], ended.outputs
    first, second = map(without_greetings, ended.outputs)
    assert second == "ended\n"
    start, warning, last = first.splitlines()
    assert start.endswith("starting a fresh run")
    assert warning.startswith("no hook writes the metrics that LossTracker, ValidationHook")
    assert last == "ended"


@pytest.mark.parametrize(
    "case", ["before on_step", "after on_model_backward+preemption", "after on_loop"]
)
def test_an_error_on_one_rank_ends_all(case: str, pairs: dict[str, Ended]) -> None:
    """An error in a hook ends both ranks, and the state file names the hook.

    The case includes an error in the last hook, when the other rank is done.
    """
    check_place(pairs[case], case.partition("+")[0])
    check_last_word(pairs[case])


@pytest.mark.parametrize(
    ("place", "function"), [("save", "state_dict"), ("resume", "load_state_dict")]
)
def test_an_error_in_a_hook_state_ends_all(
    place: str, function: str, pairs: dict[str, Ended]
) -> None:
    """An error while a hook is saved or resumed ends both ranks and is in the state file."""
    ended = pairs[place]
    check_ended(ended, "ValueError: planted", f"'Planted' ({function})")
    if ended.codes[0] == 1:
        assert "rank 1 failed first: ValueError: planted" in ended.outputs[0].splitlines()[-1]
    assert "rank 0 failed first" not in "".join(ended.outputs)
    state = ended.state
    assert state.state == "failed"
    assert state.error is not None
    assert (state.error.rank, state.error.hook) == (1, f"'Planted' ({function})")


def test_a_killed_rank_ends_all(pairs: dict[str, Ended]) -> None:
    """A rank not ended at once by the launcher's signal reports that the other rank died."""
    ended = pairs["killed+preemption"]
    assert ended.codes[1] == KILLED
    assert ended.codes[0] == 1, ended.outputs[0]
    assert ended.seconds < LONGEST_S
    assert not ended.orphans
    assert "rank 1 failed first: Killed: process" in ended.outputs[0].strip().splitlines()[-1]
    state = ended.state
    assert state.state == "failed"
    assert state.error is not None
    assert (state.error.rank, state.error.type) == (1, "Killed")


def test_a_stalled_run_writes_its_stacks(pairs: dict[str, Ended]) -> None:
    """Every rank writes its threads' stacks, and the run's state is failed."""
    ended = pairs["stalled"]
    # The launcher terminates the second rank after the end of the first.
    assert 1 in ended.codes, ended.outputs
    assert {1, -signal.SIGTERM} >= set(ended.codes), ended.outputs
    assert ended.seconds < LONGEST_S
    assert not ended.orphans
    first, second = (
        (ended.folder / "stalled" / f"rank{rank:05}.txt").read_text() for rank in range(2)
    )
    assert "in go_wrong" in second
    assert "in go_wrong" not in first
    assert "in _backward" in first or "in settle" in first or "in _forward" in first, first
    state = ended.state
    assert state.state == "failed"
    assert state.error is not None
    assert state.error.type == "Stalled"
    assert f"no progress for 2 s at step {FAILS_AT + 1}" in state.error.message


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "+preemption"])
def test_errors_in_every_channel(options: str, tmp_path: Path) -> None:
    """An error in any channel, before or after, ends both ranks."""
    cases = [place + options for place in IN_CHANNELS]
    for place, ended in zip(IN_CHANNELS, run_pairs(tmp_path, *cases), strict=True):
        check_place(ended, place)
        check_last_word(ended)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "+preemption"])
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("forward", "ValueError: planted"),
        ("loader", "ValueError: Caught ValueError in DataLoader worker"),
        ("evaluation", "ValueError: planted"),
        ("constructor", "PipelineConfigError: max_step must be"),
    ],
)
def test_errors_elsewhere(place: str, error: str, options: str, tmp_path: Path) -> None:
    """An error in the model, the data, an evaluation or the constructor ends both ranks."""
    (ended,) = run_pairs(tmp_path, place + options)
    check_ended(ended, error)
    assert ended.codes[0] != 0
    check_last_word(ended)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "+preemption"])
def test_an_error_ends_hooks_that_wait_in_a_collective(options: str, tmp_path: Path) -> None:
    """A collective in an ``after`` does not keep a failed rank alive."""
    (ended,) = run_pairs(tmp_path, f"step+waits{options}")
    check_ended(ended, "ValueError: planted", "'Planted' (on_step, before)")
    assert ended.codes[0] != 0


AT_EXIT = """
import atexit, time
from robo_orchard_lab.pipeline.distributed import shutdown

def flush(seconds):
    time.sleep(seconds)
    print(f"flushed {seconds}", flush=True)

shutdown._FINALIZE_S, shutdown.MAX_EXIT_S = 1.0, 4.0  # of 3 and 10
atexit.register(flush, 60.0)
atexit.register(flush, 2.0)
shutdown.destroy_group_at_exit()
raise ValueError("planted")
"""


def test_atexit_functions_have_time() -> None:
    """Functions at exit may outlast the interpreter's shutdown, up to a reported limit."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == "flushed 2.0\n"
    assert "ValueError: planted" in done.stderr.partition("Timeout (0:00:01)!")[0]
    assert "in flush" in done.stderr


@pytest.mark.slow
def test_torchrun_reports_the_first_error(tmp_path: Path) -> None:
    """torchrun names rank 1 as the root cause, however late the rank exits.

    Registered exit functions of the rank are run.
    """
    script = command(SCRIPTS / "fails_on_ranks.py", tmp_path / "run", "step", "late")
    done = subprocess.run(
        script, env=environment(), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 1
    assert "flushed" in done.stdout
    assert "rank 1 failed first: ValueError: planted" in done.stderr
    assert done.stderr.rindex("rank      : 1") > done.stderr.index("Root Cause")
