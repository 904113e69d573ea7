"""Contents of ``run_state.json`` for every outcome of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launching import HELPERS
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, TrainerProgress
from robo_orchard_lab.pipeline.errors import RunPreempted, StateError
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.run.durable import temporary_name
from robo_orchard_lab.pipeline.run.run_state import RunState, RunStateFile, read_run_state
from tiny import make_trainer


def at_step(step: int, do: Callable[[PipelineHookArgs], Any]) -> PipelineHooks:
    """Return a hook that calls a function in one step, counted from 1."""
    hooks = PipelineHooks("planted")

    @hooks.on_step.after(when=f"at steps {step}")
    def planted(args: PipelineHookArgs) -> None:
        do(args)

    return hooks


def test_a_run_is_running_then_completed(tmp_path: Path) -> None:
    """The state is running during the run; at the end, the file has the last counters."""
    folder = tmp_path / "new" / "run"
    seen: list[RunState] = []
    make_trainer(
        at_step(2, lambda args: seen.append(read_run_state(folder))), max_step=3, run_folder=folder
    )()
    (running,), ended = seen, read_run_state(folder)
    assert (running.state, running.process.pid, running.exit_code) == ("running", os.getpid(), None)
    assert (ended.state, ended.exit_code, ended.reason) == ("completed", 0, None)
    assert ended.progress["global_step_id"] == ended.progress["optimizer_step_id"] == 3
    assert running.started_at == ended.started_at <= ended.updated_at
    names = ["events.jsonl", "plan.json", "run_state.json"]
    assert sorted(file.name for file in folder.iterdir()) == names


def test_a_run_without_a_folder_keeps_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a run folder, no file is written."""
    monkeypatch.chdir(tmp_path)
    make_trainer(max_step=3)()
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no run has been started in"):
        read_run_state(tmp_path)


def test_an_early_end_has_its_reason(tmp_path: Path) -> None:
    """A run stopped by a hook is completed, with the reason and the hook."""
    hook = at_step(2, lambda args: args.requests.stop("good enough", by="EarlyStopping"))
    make_trainer(hook, max_step=9, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert (state.state, state.reason, state.by) == ("completed", "good enough", "EarlyStopping")
    assert state.progress["global_step_id"] == 2


def test_an_interrupted_run_is_preempted(tmp_path: Path) -> None:
    """A preempted run records the exit code for a restart."""
    hook = at_step(2, lambda args: args.requests.stop("SIGTERM", by="Preemption", exit_code=143))
    with pytest.raises(RunPreempted):
        make_trainer(hook, max_step=9, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert (state.state, state.reason, state.exit_code) == ("preempted", "SIGTERM", 143)


def test_a_preempted_run_records_its_error(tmp_path: Path) -> None:
    """A preempted run records an error such as of its last save."""

    def stop() -> None:
        with RunStateFile(tmp_path).around_run(Requests()):
            raise RunPreempted(143) from OSError("no space left")

    with pytest.raises(RunPreempted):
        stop()
    state = read_run_state(tmp_path)
    assert state.state == "preempted"
    assert state.error is not None
    assert (state.error.type, state.error.message) == ("OSError", "no space left")


def test_a_failure_records_the_error_and_its_location(tmp_path: Path) -> None:
    """The file names the error, the hook with channel and line, and the raising line."""

    def fail(args: PipelineHookArgs) -> None:
        raise ValueError("planted \udce9")  # not entirely valid Unicode

    with pytest.raises(ValueError, match="planted"):
        make_trainer(at_step(2, fail), max_step=3, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert state.state == "failed"
    assert state.error is not None
    assert (state.error.type, state.error.message) == ("ValueError", "planted ?")
    assert state.error.hook is not None
    assert state.error.hook.startswith("'planted' (on_step, after): function ")
    assert f"{Path(__file__).name}:" in state.error.hook
    line = fail.__code__.co_firstlineno + 1
    assert state.error.location == f"{__file__}:{line}"
    assert state.progress["global_step_id"] == 1  # the second step is not done


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(7), 7), (SystemExit("no"), 1)]
)
def test_an_unrequested_exit_is_a_failure(error: BaseException, code: int, tmp_path: Path) -> None:
    """Ctrl-C and ``sys.exit`` within a step leave a failed run with their exit code."""

    def leave(args: PipelineHookArgs) -> None:
        raise error

    with pytest.raises(type(error)):
        make_trainer(at_step(2, leave), max_step=3, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert (state.state, state.exit_code) == ("failed", code)


def test_an_error_without_text_is_a_failure(tmp_path: Path) -> None:
    """An error whose ``__str__`` raises is recorded as a failure."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def fail(args: PipelineHookArgs) -> None:
        raise MuteError

    with pytest.raises(MuteError):
        make_trainer(at_step(1, fail), max_step=3, run_folder=tmp_path)()
    error = read_run_state(tmp_path).error
    assert error is not None
    assert error.message == "<no text: RuntimeError>"


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from robo_orchard_lab.pipeline import PipelineHooks
from tiny import make_trainer

hooks = PipelineHooks("waits")

@hooks.on_step.after(when="at steps 2")
def wait(args):
    print("waiting", flush=True)
    time.sleep(60)

make_trainer(hooks, max_step=3, run_folder=sys.argv[1])()
"""


def test_a_killed_run_is_read_as_failed(tmp_path: Path) -> None:
    """A living process's state is running; after a kill, the reader returns failed."""
    here = str(HELPERS)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), here], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "waiting\n"
            assert read_run_state(tmp_path).state == "running"
        finally:
            child.send_signal(signal.SIGKILL)
        # Until waited for, the child is a zombie, which counts as ended.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert read_run_state(tmp_path).state == "failed"
    state = read_run_state(tmp_path)
    assert state.state == "failed"
    assert state.error is not None
    assert state.error.type == "Killed"
    assert f"process {child.pid} on " in state.error.message
    make_trainer(max_step=3, run_folder=tmp_path)()
    assert read_run_state(tmp_path).state == "completed"


def test_the_file_of_a_running_run_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second run in the same folder writes no state, whether the run ends or fails."""
    here = str(HELPERS)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), here], stdout=subprocess.PIPE, text=True
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "waiting\n"
            state = read_run_state(tmp_path)
            make_trainer(max_step=3, run_folder=tmp_path)()
            assert f"process {child.pid} on " in caplog.text
            with pytest.raises(ValueError, match="planted"):
                make_trainer(at_step(2, _raise), max_step=3, run_folder=tmp_path)()
            assert read_run_state(tmp_path) == state
        finally:
            child.kill()


def _raise(*args: Any) -> None:
    raise ValueError("planted")


def test_a_rank_does_not_overwrite_another_runs_state(tmp_path: Path) -> None:
    """A file started before this process belongs to another run."""
    with RunStateFile(tmp_path).around_run(Requests()):
        file = tmp_path / "run_state.json"
        document = json.loads(file.read_text())
        document["started_at"] = "2001-01-01T00:00:00Z"
        file.write_text(json.dumps(document))
        other = RunStateFile(tmp_path, rank=1, processes=2)
        with pytest.raises(ValueError, match="planted"), other.around_run(Requests()):
            _raise()
        assert read_run_state(tmp_path).state == "running"


@pytest.mark.parametrize(
    ("change", "state"),
    [({"host": "elsewhere"}, "running"), ({"started_at": 0.0}, "failed"), ({}, "running")],
)
def test_a_process_is_identified_by_more_than_its_id(
    change: dict[str, Any], state: str, tmp_path: Path
) -> None:
    """A reused process id is another process; a process of another machine counts as running."""
    with RunStateFile(tmp_path).around_run(Requests()):
        file = tmp_path / "run_state.json"
        document = json.loads(file.read_text())
        document["process"] |= change
        file.write_text(json.dumps(document))
        assert read_run_state(tmp_path).state == state


def test_the_last_checkpoint_is_recorded(tmp_path: Path) -> None:
    """The checkpoint's path is relative to the run folder if possible, also after a restart."""
    file = RunStateFile(tmp_path)
    with file.around_run(Requests()):
        file.saved(tmp_path / "checkpoints" / "step_00000002", 2)
        state = read_run_state(tmp_path)
        assert state.checkpoint is not None
        assert (state.state, state.checkpoint.step) == ("running", 2)
        assert state.checkpoint.path == "checkpoints/step_00000002"
    with RunStateFile(tmp_path).around_run(Requests()):
        assert read_run_state(tmp_path).checkpoint == state.checkpoint
    with file.around_run(Requests()):
        file.saved("/elsewhere/step_00000004", 4)
    checkpoint = read_run_state(tmp_path).checkpoint
    assert checkpoint is not None
    assert checkpoint.path == "/elsewhere/step_00000004"


def test_a_run_resumed_at_its_end_is_completed(tmp_path: Path) -> None:
    """A run resumed at its end rewrites an outdated state file once."""
    progress = TrainerProgress(global_step_id=3)
    with pytest.raises(ValueError, match="killed"), RunStateFile(tmp_path).around_run(Requests()):
        raise ValueError("killed after the last checkpoint")
    RunStateFile(tmp_path, progress).nothing_left()
    state = read_run_state(tmp_path)
    assert (state.state, state.progress["global_step_id"]) == ("completed", 3)
    RunStateFile(tmp_path, progress).nothing_left()
    assert read_run_state(tmp_path) == state


def test_a_trainer_called_after_its_end_keeps_the_file(tmp_path: Path) -> None:
    """A second call does nothing, and a preempted run stays preempted."""
    hook = at_step(2, lambda args: args.requests.stop("SIGTERM", exit_code=143))
    trainer = make_trainer(hook, max_step=9, run_folder=tmp_path)
    with pytest.raises(RunPreempted):
        trainer()
    state = read_run_state(tmp_path)
    trainer()
    assert read_run_state(tmp_path) == state


def test_an_unwritable_file_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log warns that the file is out of date."""
    folder = tmp_path / "folder"
    folder.touch()  # not a folder
    make_trainer(max_step=3, run_folder=folder)()
    assert "run_state.json, which is now out of date" in caplog.text


def test_another_rank_records_its_failure(tmp_path: Path) -> None:
    """The first failed rank is recorded, and resulting errors on rank 0 change nothing."""
    first = RunStateFile(tmp_path, rank=0, processes=2)
    second = RunStateFile(tmp_path, rank=1, processes=2)

    def fail_on_second() -> None:
        with second.around_run(Requests()):
            second.saved(tmp_path / "step_00000001", 1)  # recorded by rank 0
            assert read_run_state(tmp_path).checkpoint is None
            raise ValueError("planted")

    def run_both() -> None:
        with first.around_run(Requests()):
            with pytest.raises(ValueError, match="planted"):
                fail_on_second()
            raise ConnectionError("the other rank is gone")

    with pytest.raises(ConnectionError):
        run_both()
    state = read_run_state(tmp_path)
    assert state.state == "failed"
    assert state.error is not None
    assert (state.error.type, state.error.rank) == ("ValueError", 1)
    with first.around_run(Requests()):
        pass
    assert read_run_state(tmp_path).state == "completed"


def test_a_rank_on_another_machine_writes_no_file_of_its_own(tmp_path: Path) -> None:
    """Without rank 0's file in the folder, a failing rank writes none."""
    with (
        pytest.raises(ValueError, match="planted"),
        RunStateFile(tmp_path, rank=1, processes=2).around_run(Requests()),
    ):
        raise ValueError("planted")
    assert not list(tmp_path.iterdir())


def test_readers_never_see_a_partial_file(tmp_path: Path) -> None:
    """While the file is replaced repeatedly, each read is complete, and no leftovers stay."""
    (tmp_path / temporary_name("run_state.json")).touch()  # of a run killed while writing
    file = RunStateFile(tmp_path)
    over = threading.Event()
    steps: list[int] = []

    def read() -> None:
        while not over.is_set():
            checkpoint = read_run_state(tmp_path).checkpoint
            steps.append(checkpoint.step if checkpoint else 0)

    with file.around_run(Requests()):
        reader = threading.Thread(target=read)
        reader.start()
        for step in range(1, 100):
            file.saved(tmp_path / "checkpoint", step)
        over.set()
        reader.join()
    assert steps == sorted(steps)
    assert sorted(left.name for left in tmp_path.iterdir()) == ["events.jsonl", "run_state.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version: "),
        (lambda text: text.replace('"running"', '"asleep"'), "state: "),
        (lambda text: "", "Invalid JSON"),
    ],
    ids=["cut", "version", "state", "empty"],
)
def test_a_damaged_file_is_refused(
    damage: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    """The error names the file and the damage; the next run replaces the file."""
    file = tmp_path / "run_state.json"
    with RunStateFile(tmp_path).around_run(Requests()):
        text = file.read_text()
    file.write_text(damage(text))
    with pytest.raises(StateError, match=rf"run_state\.json can't be read.*{message}"):
        read_run_state(tmp_path)
    with RunStateFile(tmp_path).around_run(Requests()):
        assert read_run_state(tmp_path).state == "running"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b"completed", b"complete\xff"),
        lambda data: data.replace(b":", b"\0", 1),
        lambda data: data[:-20],
        lambda data: b"",
        lambda data: b'{"state": 5}',
    ],
    ids=["byte", "zero", "cut", "empty", "type"],
)
def test_a_damaged_file_stops_no_resume(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is moved with a warning, and the run resumes to its end."""
    save = SaveCheckpointConfig(every="2 steps")
    make_trainer(save, run_folder=tmp_path, max_step=2)()
    file = tmp_path / "run_state.json"
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(StateError, match="can't be read"):
        read_run_state(tmp_path)
    trainer = make_trainer(save, run_folder=tmp_path, max_step=3, resume_from="auto")
    trainer()
    assert (tmp_path / "run_state.json.unreadable-1").read_bytes() == damaged
    assert "moves the file to" in caplog.text
    state = read_run_state(tmp_path)
    assert (state.state, state.progress["global_step_id"]) == ("completed", 3)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes by name")
@pytest.mark.parametrize("kind", ["pipe", "link", "device", "large"])
def test_an_irregular_state_file_is_refused(kind: str, tmp_path: Path) -> None:
    """A pipe, link, device or large file is refused without blocking."""
    path = tmp_path / "run_state.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.write_bytes(b" " * (1 << 21))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "other.json")
        (tmp_path / "other.json").write_text("{}")
    with pytest.raises(StateError, match=r"regular|is a link|is larger"):
        read_run_state(tmp_path)
