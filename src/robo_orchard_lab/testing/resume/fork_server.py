"""Processes that start at once, since what they import is imported already."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

_BOOT = (
    "import sys; sys.path[:] = {sys_path!r}; import importlib; "
    "[importlib.import_module(name) for name in {preload!r}]; "
    "from robo_orchard_lab.testing.resume.fork_server import serve; "
    "serve(importlib.import_module({module!r}).{function})"
)


class ForkServer:
    """Runs a function in one process after the other, each forked from one that did nothing but
    import it: seconds of imports are spent once.

    Such a process has no CUDA context, no threads and no random state of another's making. The
    server ends with the process that made it.

    Args:
        function: at the top of a module; called with the order, a mapping of plain values.
        preload: modules to import beside that of the function.
    """

    def __init__(
        self, function: Callable[[dict[str, Any]], Any], preload: Sequence[str] = ()
    ) -> None:
        boot = _BOOT.format(
            sys_path=sys.path,
            preload=[*preload],
            module=function.__module__,
            function=function.__qualname__,
        )
        self._log = TemporaryFile()  # noqa: SIM115 - open as long as the server
        self._one_at_a_time = threading.Lock()
        self._server = subprocess.Popen(
            [sys.executable, "-c", boot],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # a Ctrl-C is for the caller alone, who ends it
        )
        atexit.register(self.close)

    def run(
        self,
        order: Mapping[str, Any],
        output: Path,
        timeout_s: float,
        kill_when: Callable[[], bool] | None = None,
    ) -> int:
        """Run one process to its end, and give its exit code; minus the signal that ended it.

        It has the working directory and the environment variables of now, and leads a process
        group of its own, of which nothing is left afterwards.

        Args:
            order: what the function is called with.
            output: the file that takes what it prints.
            timeout_s: after so many seconds it is killed.
            kill_when: asked every two milliseconds whether to kill it (SIGKILL).

        Raises:
            RuntimeError: the server has failed.
        """
        request = {
            "order": dict(order),
            "output": str(output),
            "folder": os.getcwd(),
            "environment": dict(os.environ),
        }
        with self._one_at_a_time:
            output.write_bytes(b"")  # one that is killed at once makes no file
            pid = self._begin(request)
            try:
                self._wait(timeout_s, kill_when)
            finally:  # also when this is interrupted, so that the next process is not mistaken
                if not self._can_read(0):
                    os.kill(pid, signal.SIGKILL)  # not reaped yet, so that it is this one
                code = self._read()
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # what it has started
        return code

    @property
    def has_ended(self) -> bool:
        """Whether the server has failed, or was closed."""
        return self._server.poll() is not None

    def _begin(self, request: dict[str, Any]) -> int:
        """Have a process forked, and give its id."""
        assert self._server.stdin is not None
        with suppress(BrokenPipeError):  # told when there is nothing to read
            self._server.stdin.write(json.dumps(request).encode() + b"\n")
            self._server.stdin.flush()
        return self._read()

    def _wait(self, timeout_s: float, kill_when: Callable[[], bool] | None) -> None:
        """Until the process has ended, or is to be killed."""
        ends_at = time.monotonic() + timeout_s
        while not self._can_read(0.002 if kill_when else 0.1):
            if time.monotonic() > ends_at or (kill_when is not None and kill_when()):
                break

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.kill()  # it keeps nothing; to take its modules apart would take a second
        self._server.wait()
        with suppress(BrokenPipeError):
            self._server.stdin.close()
        self._server.stdout.close()
        self._log.close()
        atexit.unregister(self.close)

    def _can_read(self, seconds: float) -> bool:
        assert self._server.stdout is not None
        return bool(select.select([self._server.stdout], [], [], seconds)[0])

    def _read(self) -> int:
        """The next number that the server tells: a process's id, or its exit code."""
        # Unbuffered, so that what select says is true.
        told = b""
        while not told.endswith(b"\n"):
            assert self._server.stdout is not None
            byte = os.read(self._server.stdout.fileno(), 1)
            if not byte:
                self._log.seek(0)
                told_of_it = self._log.read().decode(errors="replace")
                raise RuntimeError(f"the server of processes has failed: {told_of_it}")
            told += byte
        return int(told)


def serve(function: Callable[[dict[str, Any]], Any]) -> None:
    """Fork for each order that comes in, and call the function there."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of idle threads of BLAS
            pid = os.fork()
        if pid == 0:
            os._exit(_run(function, **request))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(
    function: Callable[[dict[str, Any]], Any],
    order: dict[str, Any],
    output: str,
    folder: str,
    environment: dict[str, str],
) -> int:
    """Be the process that was forked, and give its exit code.

    What is done at the exit of an interpreter is done here, but for taking its modules apart,
    which takes a second.
    """
    code = 1
    try:
        os.setsid()
        for target, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            descriptor = os.open(path, flags, 0o644)
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.dup2(1, 2)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        function(order)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
