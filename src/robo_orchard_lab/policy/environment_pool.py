"""Environments in worker processes, with time limits: `EnvironmentPool`."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from robo_orchard_lab.policy.environment_worker import EnvironmentSpec, Steps, main

_START_TIMEOUT_S = 300.0
_CLOSE_TIMEOUT_S = 5.0
_GRACE_S = 5.0  # beyond the worker's own time limit
_EXTRAS = {"metaworld": "metaworld", "mujoco": "metaworld", "gymnasium": "robotics"}


class RolloutError(RuntimeError):
    """Failed episode: an error, hang or death of its environment, or an error of the policy.

    Args:
        seed: seed of the episode; None before the first reset.
        step: number of completed environment steps; for a process that ended, of those before its
            last chunk of actions; None before the first reset.
    """

    def __init__(self, problem: str, seed: int | None = None, step: int | None = None) -> None:
        where = [f"seed {seed}"] if seed is not None else []
        where += [f"step {step}"] if step is not None else []
        super().__init__(f"{', '.join(where)}: {problem}" if where else problem)
        self.problem, self.seed, self.step = problem, seed, step


class _Worker:
    """Process of one environment."""

    def __init__(self, factory: Callable[[], Any], step_timeout_s: float) -> None:
        # A new interpreter has no locks of threads and no CUDA context. multiprocessing's would
        # import the main module again, and start a second training from an unguarded script.
        self.connection, theirs = multiprocessing.Pipe()
        paths = [path or os.getcwd() for path in sys.path]
        arguments = f"{theirs.fileno()}, {os.getpid()}"
        code = f"import sys; sys.path[:] = {paths!r}; from {main.__module__} import main"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code}; main({arguments})"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C in a terminal does not reach the process
        )
        theirs.close()  # the end of the process is then the end of the connection
        try:
            self.connection.send((step_timeout_s, factory))
        except OSError:
            pass  # the end of the process is its reply
        except Exception as error:  # of any object in the factory's arguments
            self.kill()
            raise RolloutError(_not_importable(factory, error)) from error
        self.seed: int | None = None
        self.step = 0

    def await_exit(self, end: float) -> Any:
        """Return the exit of the process, which keeps its id for `kill`; None after a time."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (found := os.waitid(os.P_PID, self.process.pid, options)) is None:
            if time.monotonic() > end:
                return None
            time.sleep(0.01)
        return found

    def end_text(self) -> str:
        """Return the reason of the end of the process, which has closed its connection."""
        found = self.await_exit(time.monotonic() + _CLOSE_TIMEOUT_S)
        if found is None:
            return "the environment closed the connection of its process"
        if found.si_code == os.CLD_EXITED:
            return f"the process of the environment ended with exit code {found.si_status}"
        if found.si_status == signal.SIGALRM:
            return (
                "the environment exceeded the time limit of a step, step_timeout_s; standard error "
                "has its stack"
            )
        name = signal.Signals(found.si_status).name
        return f"the process of the environment was ended by {name}"

    def kill(self) -> None:
        """End the process, and the child processes of the environment."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class EnvironmentPool:
    """Environments in worker processes; a context manager that ends all processes.

    Workers start with the first use of their slot. A worker that failed is replaced at the next
    reset of its slot. If this process is killed, the workers end within a second.

    Args:
        factory: function without arguments that returns the environment; a worker imports it by
            name, so it is no lambda.
        size: number of environments.
        step_timeout_s: limit of the wall-clock time of a reset, a step and a rendering.

    Raises:
        RolloutError: the factory is a function of the running script.
    """

    def __init__(
        self, factory: Callable[[], Any], size: int, *, step_timeout_s: float = 60.0
    ) -> None:
        if size < 1:
            raise ValueError(f"expected at least 1 environment, found {size}")
        if not step_timeout_s > 0:
            raise ValueError(f"expected step_timeout_s > 0, found {step_timeout_s}")
        if getattr(getattr(factory, "func", factory), "__module__", None) == "__main__":
            raise RolloutError(_not_importable(factory, "workers do not import a running script"))
        self._factory = factory
        self._step_timeout_s = step_timeout_s
        self._workers: list[_Worker | None] = [None] * size
        self._spec: EnvironmentSpec | None = None  # of the first environment
        atexit.register(self.kill)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
        else:
            self.kill()

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def processes(self) -> list[int]:
        """Ids of the running worker processes."""
        return [worker.process.pid for worker in self._workers if worker is not None]

    def spec(self) -> EnvironmentSpec:
        """Return the properties of the environment; the first call may start a worker.

        Raises:
            RolloutError: the environment can't be created.
        """
        if self._spec is None and (error := self._start([0])[0]) is not None:
            raise error
        assert self._spec is not None
        return self._spec

    def reset(self, seeds: Mapping[int, int]) -> dict[int, Any]:
        """Reset environments, given seeds by slot; return an observation or error by slot.

        Raises:
            RolloutError: no environment could be created yet.
        """
        found = self._start([slot for slot in seeds if self._workers[slot] is None])
        if self._spec is None:
            raise next(error for error in found.values() if error is not None)
        for slot, error in found.items():
            if error is not None:
                error.seed = seeds[slot]
        failed = {slot: error for slot, error in found.items() if error is not None}
        for slot, seed in seeds.items():
            if (worker := self._workers[slot]) is not None:
                worker.seed, worker.step = seed, 0
        return failed | self._ask(
            {slot: ("reset", seeds[slot]) for slot in seeds if slot not in failed}
        )

    def step(
        self, actions: Mapping[int, Any], frames_at: Mapping[int, Sequence[int]] | None = None
    ) -> dict[int, Steps | RolloutError]:
        """Execute actions of shape (steps, ...) by slot, at most to the end of the episode.

        Args:
            actions: by slot.
            frames_at: by slot, indices of actions after which to render; also renders the end of
                the episode.
        """
        at = frames_at or {}
        return self._ask({slot: ("step", each, at.get(slot)) for slot, each in actions.items()})

    def render(self, slot: int) -> Any:
        """Return a frame of an environment, or an error."""
        return self._ask({slot: ("render",)})[slot]

    def close(self) -> None:
        """Close the environments and end their processes."""
        for worker in filter(None, self._workers):
            with suppress(OSError):
                worker.connection.send(("close",))
        end = time.monotonic() + _CLOSE_TIMEOUT_S
        for worker in filter(None, self._workers):
            worker.await_exit(end)
        self.kill()

    def kill(self) -> None:
        """End all processes at once."""
        for slot, worker in enumerate(self._workers):
            if worker is not None:
                self._workers[slot] = None
                worker.kill()
        atexit.unregister(self.kill)

    def _start(self, slots: Sequence[int]) -> dict[int, RolloutError | None]:
        """Start workers at the same time; return an error or None by slot."""
        for slot in slots:
            self._workers[slot] = _Worker(self._factory, self._step_timeout_s)
        atexit.register(self.kill)
        found: dict[int, RolloutError | None] = {}
        for slot, reply in self._receive(slots, _START_TIMEOUT_S).items():
            if isinstance(reply, RolloutError):
                found[slot] = RolloutError(f"the environment can't be created: {reply.problem}")
                _add_notes(found[slot], reply)
                self._drop(slot)
            else:
                self._spec, found[slot] = reply, None
        return found

    def _ask(self, requests: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        for slot, request in requests.items():
            worker = self._workers[slot]
            assert worker is not None
            with suppress(OSError):  # the end of the process is the reply
                worker.connection.send(request)
        steps = max((len(r[1]) if r[0] == "step" else 1 for r in requests.values()), default=1)
        found = self._receive([*requests], self._step_timeout_s * steps + _GRACE_S)
        for slot, reply in found.items():
            worker = self._workers[slot]
            if isinstance(reply, RolloutError):
                self._drop(slot)
            elif isinstance(reply, Steps) and worker is not None:
                worker.step += reply.count
        return found

    def _receive(self, slots: Sequence[int], timeout_s: float) -> dict[int, Any]:
        """Return the reply of each worker, or an error, within a time limit."""
        pending: dict[Connection, int] = {}
        for slot in slots:
            worker = self._workers[slot]
            assert worker is not None
            pending[worker.connection] = slot
        found: dict[int, Any] = {}
        end = time.monotonic() + timeout_s
        while pending:
            ready = wait([*pending], max(0.0, end - time.monotonic()))
            for connection in ready:
                assert isinstance(connection, Connection)
                slot = pending.pop(connection)
                found[slot] = self._reply(slot, connection)
            if not ready:
                for slot in pending.values():
                    problem = f"the environment did not answer within {timeout_s:g} s"
                    found[slot] = self._error(slot, problem)
                break
        return {slot: found[slot] for slot in slots}

    def _reply(self, slot: int, connection: Connection) -> Any:
        worker = self._workers[slot]
        assert worker is not None
        try:
            kind, *values = connection.recv()
        except (EOFError, OSError):
            return self._error(slot, worker.end_text())
        if kind != "error":
            return values[0]
        steps, text = values
        message, _, trace = text.partition("\n")
        worker.step += steps
        error = self._error(slot, _with_remedy(message))
        error.add_note(f"in the worker process:\n{trace}")
        return error

    def _error(self, slot: int, problem: str) -> RolloutError:
        worker = self._workers[slot]
        assert worker is not None
        return RolloutError(problem, worker.seed, None if worker.seed is None else worker.step)

    def _drop(self, slot: int) -> None:
        if (worker := self._workers[slot]) is not None:
            self._workers[slot] = None
            worker.kill()


def _not_importable(factory: Any, problem: object) -> str:
    return (
        f"expected a function that a worker process can import, found {factory!r:.100}: {problem}; "
        "define it at the top level of a module of its own"
    )


def _with_remedy(message: str) -> str:
    """Add the pip command for a missing package of an extra."""
    for package, extra in _EXTRAS.items():
        if message.startswith("ModuleNotFoundError") and f"'{package}" in message:
            return f"{message}; pip install 'robo-orchard-hooks[{extra}]'"
    return message


def _add_notes(error: BaseException | None, source: BaseException) -> None:
    for note in getattr(source, "__notes__", ()):
        if error is not None:
            error.add_note(note)
