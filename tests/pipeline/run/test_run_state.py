"""``run_state.json`` tells what became of a run, whatever became of it."""

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
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.run.durable import temporary_name
from robo_orchard_lab.pipeline.run.run_state import RunState, RunStateFile, read_run_state
from tiny import make_trainer


def at_step(step: int, do: Callable[[PipelineHookArgs], Any]) -> PipelineHooks:
    """A hook that does something in one step, counted from 1."""
    hooks = PipelineHooks("planted")

    @hooks.on_step.after(when=f"at steps {step}")
    def planted(args: PipelineHookArgs) -> None:
        do(args)

    return hooks


def test_a_run_is_running_then_completed(tmp_path: Path) -> None:
    """While it runs the file says so; in the end it has the last counters."""
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
    assert [file.name for file in folder.iterdir()] == ["run_state.json"]


def test_a_run_without_a_folder_keeps_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written where nobody has said where."""
    monkeypatch.chdir(tmp_path)
    make_trainer(max_step=3)()
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no run has been started in"):
        read_run_state(tmp_path)


def test_an_early_end_has_its_reason(tmp_path: Path) -> None:
    """A run that a hook has stopped is completed, and says who stopped it and why."""
    hook = at_step(2, lambda args: args.requests.stop("good enough", by="EarlyStopping"))
    make_trainer(hook, max_step=9, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert (state.state, state.reason, state.by) == ("completed", "good enough", "EarlyStopping")
    assert state.progress["global_step_id"] == 2


def test_an_interrupted_run_is_preempted(tmp_path: Path) -> None:
    """With an exit code for the process the run is to be started again."""
    hook = at_step(2, lambda args: args.requests.stop("SIGTERM", by="Preemption", exit_code=143))
    with pytest.raises(RunPreempted):
        make_trainer(hook, max_step=9, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert (state.state, state.reason, state.exit_code) == ("preempted", "SIGTERM", 143)


def test_a_preempted_run_tells_what_went_wrong(tmp_path: Path) -> None:
    """Such as its last save, without which it goes on from an older one."""

    def stop() -> None:
        with RunStateFile(tmp_path).around_run(Requests()):
            raise RunPreempted(143) from OSError("no space left")

    with pytest.raises(RunPreempted):
        stop()
    state = read_run_state(tmp_path)
    assert state.state == "preempted"
    assert state.error is not None
    assert (state.error.type, state.error.message) == ("OSError", "no space left")


def test_a_failure_is_told_with_what_and_where(tmp_path: Path) -> None:
    """The file names the error, the hook with its channel and line, and the line that raised."""

    def fail(args: PipelineHookArgs) -> None:
        raise ValueError("planted \udce9")  # a text that is not all of it valid Unicode

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
def test_an_exit_that_nobody_asked_for_is_a_failure(
    error: BaseException, code: int, tmp_path: Path
) -> None:
    """Ctrl-C and ``sys.exit`` in the middle of a step leave a run that failed, with their code."""

    def leave(args: PipelineHookArgs) -> None:
        raise error

    with pytest.raises(type(error)):
        make_trainer(at_step(2, leave), max_step=3, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert (state.state, state.exit_code) == ("failed", code)


def test_an_error_that_can_not_be_told_is_still_a_failure(tmp_path: Path) -> None:
    """Also of an error whose text raises."""

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


def test_a_killed_run_is_told_as_failed(tmp_path: Path) -> None:
    """The file of a process that lives says running; when it is killed, the reader finds it out."""
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
        # Until someone waits for it, it is a zombie, which runs no more either.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert read_run_state(tmp_path).state == "failed"
    state = read_run_state(tmp_path)
    assert state.state == "failed"
    assert state.error is not None
    assert state.error.type == "Killed"
    assert f"process {child.pid} on " in state.error.message
    make_trainer(max_step=3, run_folder=tmp_path)()
    assert read_run_state(tmp_path).state == "completed"


def test_the_file_of_a_run_that_is_running_is_left_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second run in its folder writes none, whether it ends or fails."""
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


def test_a_rank_does_not_tell_its_failure_for_another_run(tmp_path: Path) -> None:
    """One that began before this process was there is not its own."""
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
    ("change", "told"),
    [({"host": "elsewhere"}, "running"), ({"started_at": 0.0}, "failed"), ({}, "running")],
)
def test_a_process_is_known_by_more_than_its_number(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """A number that was given anew is another process; another machine's can't be looked at."""
    with RunStateFile(tmp_path).around_run(Requests()):
        file = tmp_path / "run_state.json"
        document = json.loads(file.read_text())
        document["process"] |= change
        file.write_text(json.dumps(document))
        assert read_run_state(tmp_path).state == told


def test_the_last_checkpoint_is_told(tmp_path: Path) -> None:
    """By its path from the run's folder where it is in there, also after a start anew."""
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
    """Where nothing is left to do, a file that was left saying otherwise is put right, once."""
    progress = TrainerProgress(global_step_id=3)
    with pytest.raises(ValueError, match="killed"), RunStateFile(tmp_path).around_run(Requests()):
        raise ValueError("killed after the last checkpoint")
    RunStateFile(tmp_path, progress).nothing_left()
    state = read_run_state(tmp_path)
    assert (state.state, state.progress["global_step_id"]) == ("completed", 3)
    RunStateFile(tmp_path, progress).nothing_left()
    assert read_run_state(tmp_path) == state


def test_a_trainer_called_after_its_end_leaves_the_file(tmp_path: Path) -> None:
    """Nothing is done, so nothing is told anew; a preempted run stays one."""
    hook = at_step(2, lambda args: args.requests.stop("SIGTERM", exit_code=143))
    trainer = make_trainer(hook, max_step=9, run_folder=tmp_path)
    with pytest.raises(RunPreempted):
        trainer()
    state = read_run_state(tmp_path)
    trainer()
    assert read_run_state(tmp_path) == state


def test_a_file_that_can_not_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says that the file is not true."""
    folder = tmp_path / "folder"
    folder.touch()  # which is no folder
    make_trainer(max_step=3, run_folder=folder)()
    assert "run_state.json, which is now out of date" in caplog.text


def test_another_rank_tells_its_failure(tmp_path: Path) -> None:
    """The rank that failed first is named; what follows of it on the first rank changes nothing."""
    first = RunStateFile(tmp_path, rank=0, processes=2)
    second = RunStateFile(tmp_path, rank=1, processes=2)

    def fail_on_second() -> None:
        with second.around_run(Requests()):
            second.saved(tmp_path / "step_00000001", 1)  # which the first rank writes
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
    """Where the folder does not have the first rank's file, a failing rank leaves none."""
    with (
        pytest.raises(ValueError, match="planted"),
        RunStateFile(tmp_path, rank=1, processes=2).around_run(Requests()),
    ):
        raise ValueError("planted")
    assert not list(tmp_path.iterdir())


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    """While it is replaced again and again, each reading finds a whole one; no leftovers stay."""
    (tmp_path / temporary_name("run_state.json")).touch()  # of a run that was killed while it wrote
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
    assert [left.name for left in tmp_path.iterdir()] == ["run_state.json"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version: "),
        (lambda text: text.replace('"running"', '"asleep"'), "state: "),
        (lambda text: "", "Invalid JSON"),
    ],
    ids=["cut", "version", "state", "empty"],
)
def test_a_damaged_file_is_refused(damage: Callable[[str], str], told: str, tmp_path: Path) -> None:
    """The error names the file and what is wrong with it; the next run replaces it."""
    file = tmp_path / "run_state.json"
    with RunStateFile(tmp_path).around_run(Requests()):
        text = file.read_text()
    file.write_text(damage(text))
    with pytest.raises(StateError, match=rf"run_state\.json can't be read.*{told}"):
        read_run_state(tmp_path)
    with RunStateFile(tmp_path).around_run(Requests()):
        assert read_run_state(tmp_path).state == "running"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes by name")
@pytest.mark.parametrize("kind", ["pipe", "link", "device", "large"])
def test_what_is_no_file_of_a_state_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    """A stranger's run has nobody wait for a pipe, or read without an end."""
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
