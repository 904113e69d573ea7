"""Worker processes start from multiprocessing's forkserver and leave nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # has no types
import pytest

import forked
from robo_orchard_lab.testing.resume_worker import run_processes


def run(
    output: Path,
    what: str,
    code: Any = None,
    timeout_s: float = 30.0,
    should_kill: Callable[[int], bool] | None = None,
) -> tuple[int, str]:
    """Run one process; return its exit code and its output."""
    order = {"what": what, "code": code}
    [exit_code] = run_processes(forked.do, [order], [output], timeout_s, should_kill)
    return exit_code, output.read_text()


def pid_of(text: str) -> int:
    return int(text.split()[1])


def test_a_process_has_the_directory_and_environment_of_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folder and environment are the caller's, not the forkserver's; each run is a new process."""
    _, before = run(tmp_path / "out", "tell")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORKED", "yes")
    monkeypatch.delenv("HOME", raising=False)
    code, text = run(tmp_path / "out", "tell")
    assert code == 0
    assert text.splitlines()[1] == f"{tmp_path} yes None"
    assert pid_of(text) != pid_of(before)


@pytest.mark.parametrize(("status", "code"), [(None, 0), (0, 0), (75, 75), ("no space", 1)])
def test_exit_codes_are_those_of_python(status: Any, code: int, tmp_path: Path) -> None:
    """The exit code is that of ``sys.exit``; 1 after an error, whose traceback is printed."""
    assert run(tmp_path / "out", "exit", code=status)[0] == code
    failed, text = run(tmp_path / "out", "fail")
    assert failed == 1
    assert text.endswith("ValueError: it is to fail\n")


def test_no_descendant_survives(tmp_path: Path) -> None:
    """Threads of a process are joined, and its child processes are killed."""
    code, text = run(tmp_path / "out", "start others")
    assert code == 0
    assert "from a thread" in text
    time.sleep(0.05)
    assert [p for p in psutil.process_iter(["cmdline", "ppid"]) if _sleeps(p)] == []


def _sleeps(process: Any) -> bool:
    is_sleep: bool = process.info["cmdline"] == ["sleep", "60"]
    return is_sleep and bool(process.status() != psutil.STATUS_ZOMBIE)


def test_a_process_is_killed_on_request_and_after_the_time_limit(tmp_path: Path) -> None:
    """A kill does not affect the next process."""
    started = time.monotonic()
    killed, _ = run(tmp_path / "out", "sleep", should_kill=lambda index: True)
    late, _ = run(tmp_path / "out", "sleep", timeout_s=0.05)
    assert killed == late == -signal.SIGKILL
    assert time.monotonic() - started < 20
    assert run(tmp_path / "out", "tell")[0] == 0


def test_an_interrupted_caller_leaves_no_process(tmp_path: Path) -> None:
    """An error of the caller kills the process; the next process starts as usual."""

    def interrupt(index: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", "sleep", should_kill=interrupt)
    time.sleep(0.05)
    text = (tmp_path / "out").read_text()
    assert not text or not psutil.pid_exists(pid_of(text))
    assert run(tmp_path / "out", "tell")[0] == 0


def test_an_interrupted_start_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the caller has not seen yet exits without calling its function."""
    from multiprocessing.context import ForkServerProcess

    start = ForkServerProcess.start

    def interrupted(process: ForkServerProcess) -> None:
        start(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(ForkServerProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", "sleep")
    time.sleep(0.5)
    assert (tmp_path / "out").read_text() == ""


def test_two_threads_take_turns(tmp_path: Path) -> None:
    """Each thread gets the exit code of its own process."""
    codes: dict[int, int] = {}

    def start(number: int) -> None:
        codes[number] = run(tmp_path / str(number), "exit", code=number)[0]

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {number: number for number in range(4)}


def test_a_function_that_no_process_finds_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process fails, and its output has the error."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "vanishing.py").write_text("def do(order):\n    pass\n")
    import vanishing  # type: ignore[import-not-found]  # written above

    os.remove(tmp_path / "vanishing.py")
    assert run_processes(vanishing.do, [None], [tmp_path / "out"], 30.0) == [1]
    assert "No module named 'vanishing'" in (tmp_path / "out").read_text()
