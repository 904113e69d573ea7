"""Processes that are forked from one that has imported everything."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # has no types
import pytest

import forked
from robo_orchard_lab.testing.resume.fork_server import ForkServer


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(forked.do)
    yield server
    server.close()
    assert server.has_ended


def run(server: ForkServer, output: Path, what: str, **options: Any) -> tuple[int, str]:
    order = {"what": what, "code": options.pop("code", None)}
    code = server.run(order, output, options.pop("timeout_s", 30.0), **options)
    return code, output.read_text()


def pid_of(told: str) -> int:
    return int(told.split()[1])


def test_a_process_has_the_folder_and_the_environment_of_its_caller(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the moment, not those of the server; each is a process of its own."""
    _, before = run(server, tmp_path / "out", "tell")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORKED", "yes")
    monkeypatch.delenv("HOME", raising=False)
    code, told = run(server, tmp_path / "out", "tell")
    assert code == 0
    assert told.splitlines()[1] == f"{tmp_path} yes None"
    assert pid_of(told) != pid_of(before)


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (75, 75), ("no space", 1)])
def test_exit_codes_are_those_of_python(
    given: Any, code: int, server: ForkServer, tmp_path: Path
) -> None:
    """As ``sys.exit`` gives them; an error is 1, with its traceback printed."""
    assert run(server, tmp_path / "out", "exit", code=given)[0] == code
    failed, told = run(server, tmp_path / "out", "fail")
    assert failed == 1
    assert told.endswith("ValueError: it is to fail\n")


def test_nothing_is_left_of_a_process(server: ForkServer, tmp_path: Path) -> None:
    """Its threads are waited for, and what it has started ends with it."""
    code, told = run(server, tmp_path / "out", "start others")
    assert code == 0
    assert "from a thread" in told
    time.sleep(0.05)
    sleeping = [p for p in psutil.process_iter(["cmdline", "ppid"]) if _sleeps(p)]
    assert sleeping == []


def _sleeps(process: Any) -> bool:
    mine: bool = process.info["cmdline"] == ["sleep", "60"]
    return mine and bool(process.status() != psutil.STATUS_ZOMBIE)


def test_a_process_is_killed_when_it_is_to_be(server: ForkServer, tmp_path: Path) -> None:
    """By a condition, or since it takes too long; the next one is not mistaken for it."""
    begun = time.monotonic()
    killed, _ = run(server, tmp_path / "out", "sleep", kill_when=lambda: time.monotonic() > begun)
    late, _ = run(server, tmp_path / "out", "sleep", timeout_s=0.05)
    assert killed == late == -signal.SIGKILL
    assert time.monotonic() - begun < 20
    assert run(server, tmp_path / "out", "tell")[0] == 0


def test_an_interrupted_caller_leaves_no_process(server: ForkServer, tmp_path: Path) -> None:
    """An error while it waits kills the process, and the next one begins as always."""

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(server, tmp_path / "out", "sleep", kill_when=interrupt)
    time.sleep(0.05)
    text = (tmp_path / "out").read_text()
    assert not text or not psutil.pid_exists(pid_of(text))
    assert run(server, tmp_path / "out", "tell")[0] == 0


def test_two_threads_take_turns(server: ForkServer, tmp_path: Path) -> None:
    """A server runs one process at a time."""
    told: dict[int, tuple[int, str]] = {}

    def tell(number: int) -> None:
        told[number] = run(server, tmp_path / str(number), "exit", code=number)

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: code for number, (code, _) in told.items()} == {n: n for n in range(4)}


def test_a_server_that_can_not_begin_is_told_of(tmp_path: Path) -> None:
    """What it printed is in the error."""
    server = ForkServer(forked.do, preload=["no_such_module"])
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        run(server, tmp_path / "out", "tell")
    server.close()
