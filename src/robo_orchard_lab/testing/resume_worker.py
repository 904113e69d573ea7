"""Worker processes of the resume proof.

- `describe_function`, `find_function`: pass a `build` function to another process.
- `RunOrder`, `execute_order`: build a trainer in a worker, run it, record the run.
- `run_ranks`, `run_processes`: start workers from multiprocessing's forkserver and wait.
- `RandomKill`: decide when to kill a worker.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from robo_orchard_lab.pipeline.hooks.save_checkpoint import SaveCheckpoint
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.testing.fixtures import seed_all
from robo_orchard_lab.testing.run_record import RunRecord, RunRecorder, read_record

_LOG_LINES = 25

# --- functions by name -----------------------------------------------------------------------


def describe_function(function: Callable[..., Any] | str) -> dict[str, Any]:
    """Return the location of a function as plain values.

    Args:
        function: a function at the top level of a module or script; a ``functools.partial`` of
            such a function with JSON-serializable arguments; ``"module:name"``; or
            ``"path/to/file.py:name"``. The module may be unknown to ``import``, as the test
            modules of pytest are.

    Raises:
        TypeError: another process cannot find the function.
    """
    if isinstance(function, str):
        source, _, name = function.rpartition(":")
        if not source or not name.isidentifier():
            raise TypeError(f"expected 'module:name' or 'file.py:name', got {function!r}")
        if source.endswith(".py"):
            return {"file": str(Path(source).resolve()), "module": Path(source).stem, "name": name}
        return {"file": None, "module": source, "name": name}
    if isinstance(function, functools.partial):
        described = describe_function(function.func)
        arguments = {"args": list(function.args), "kwargs": dict(function.keywords)}
        try:
            is_plain = json.loads(json.dumps(arguments)) == arguments
        except (TypeError, ValueError):
            is_plain = False
        if not is_plain or "args" in described:
            raise TypeError(
                f"another process can't receive {function!r:.120}: expected a partial of a plain "
                "function, with arguments that JSON can write; build other objects in the function"
            )
        return {**described, **arguments}
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    if not inspect.isfunction(function) or not name.isidentifier():
        raise TypeError(
            f"another process can't find {function!r:.120}: expected a function at the top level "
            "of a module (not a lambda, a method or a nested function), or its name as "
            "'module:name'"
        )
    code_file = inspect.getsourcefile(inspect.unwrap(function))
    file = getattr(sys.modules.get(module), "__file__", None) or code_file
    if file is None or not Path(file).is_file():
        raise TypeError(
            f"another process can't find {name} of {module}: the module has no file; "
            "define the function in a file"
        )
    return {"file": str(Path(file).resolve()), "module": module, "name": name}


def find_function(described: Mapping[str, Any]) -> Callable[..., Any]:
    """Import a function located by `describe_function`.

    A script is imported as ``__mp_main__``, as multiprocessing does: code under
    ``if __name__ == "__main__"`` does not run.

    Raises:
        ImportError: the module or the function does not exist.
    """
    module = _import_module(described["module"], described["file"])
    function = getattr(module, described["name"], None)
    if not callable(function):
        raise ImportError(
            f"{module.__name__} ({module.__file__}) has no function {described['name']!r}"
        )
    if "args" in described:
        return functools.partial(function, *described["args"], **described["kwargs"])
    return function  # type: ignore[no-any-return]  # a callable


def _import_module(name: str, file: str | None) -> ModuleType:
    if file is None:
        return importlib.import_module(name)
    if name == "__main__":
        name = "__mp_main__"
    else:
        try:
            found = importlib.import_module(name)
        except ImportError:
            sys.modules.pop(name, None)
        else:
            if found.__file__ is not None and Path(found.__file__).resolve() == Path(file):
                return found
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle looks up classes by module name
    spec.loader.exec_module(module)
    return module


# --- worker ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunOrder:
    """Task of a worker: trainer, checkpoint, stop."""

    build: dict[str, Any]
    """Location of the function that builds the trainer, from `describe_function`."""
    run_folder: str
    record: str
    """File for the record of the run."""
    resume_from: str | None = None
    stop_after: int | None = None
    """Number of steps of the run after which to stop."""
    seed: int = 0
    """Seed of torch, NumPy and Python before the trainer is built."""
    requires_saves: bool = False
    """Refuse a trainer without a `SaveCheckpoint` hook."""
    save_to: str | None = None
    """Path of a checkpoint to save after the trainer returned."""
    rank: int = 0
    world_size: int = 1
    rendezvous: str = ""
    """File for the rendezvous of several ranks; must not exist."""
    timeout_s: float = 600.0


def execute_order(order: RunOrder) -> None:
    """Build a trainer, run it, and record the run in a file.

    A worker that exceeds ``timeout_s`` prints its stack and exits with code 1.

    Raises:
        TypeError: ``build`` returned no trainer, or a trainer that does not save.
    """
    faulthandler.dump_traceback_later(order.timeout_s, exit=True)
    build = find_function(order.build)
    resume_from: Any = order.resume_from
    if resume_from not in (None, "auto"):
        resume_from = Path(resume_from)
    join_job(order.rank, order.world_size, order.rendezvous)
    seed_all(order.seed)
    trainer = build(Path(order.run_folder), resume_from)
    if not isinstance(trainer, HookBasedTrainer):
        raise TypeError(
            f"build(run_folder, resume_from) must return a HookBasedTrainer, got {trainer!r:.80}"
        )
    if order.requires_saves and not any(
        isinstance(hook, SaveCheckpoint) for hook in trainer.hooks.all_hooks()
    ):
        raise TypeError(
            "a run that is to be killed must save: register a SaveCheckpoint in build, such as "
            "SaveCheckpointConfig(every='1 step')"
        )
    with RunRecorder(trainer, Path(order.record), order.stop_after) as recorder:
        done = trainer.progress.global_step_id
        is_at_stop = order.stop_after is not None and done >= order.stop_after
        if not is_at_stop or trainer.limits.reached(trainer.progress):
            trainer()
        recorder.write_end()
    if order.save_to is not None:
        trainer.save_checkpoint(order.save_to)
    if order.world_size > 1:
        trainer.accelerator.end_training()
    faulthandler.cancel_dump_traceback_later()


def join_job(rank: int, world_size: int, rendezvous: str) -> None:
    """Join the process group as one rank, as under torchrun; do nothing for a single rank."""
    if world_size == 1:
        return
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    on_devices = torch.cuda.device_count() >= world_size
    # By a file: a free port may be taken before the first rank binds it.
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_devices else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
    )


# --- launch ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordedProcess:
    """Result of one worker."""

    record: RunRecord | None
    """Record of the run; None if the worker ended before the trainer was built."""
    exit_code: int
    """Exit code; negative for a signal."""
    output: str
    """Last lines of the output."""


def run_ranks(
    orders: Sequence[RunOrder], should_kill: Callable[[int], bool] | None = None
) -> list[RecordedProcess]:
    """Run all ranks of a job to their end.

    Args:
        orders: one order for each rank.
        should_kill: returns True if a rank has to be killed (SIGKILL); polled every 2 ms.
    """
    records = [Path(order.record) for order in orders]
    logs = [record.with_suffix(".log") for record in records]
    timeout_s = max(order.timeout_s for order in orders) + 10
    codes = run_processes(execute_order, orders, logs, timeout_s, should_kill)
    return [
        RecordedProcess(read_record(record), code, _last_lines(log))
        for record, code, log in zip(records, codes, logs, strict=True)
    ]


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES:])


_Order = TypeVar("_Order")
_ONE_JOB_AT_A_TIME = threading.Lock()  # multiprocessing's list of children is not thread-safe


def run_processes(
    target: Callable[[_Order], Any],
    orders: Sequence[_Order],
    outputs: Sequence[Path],
    timeout_s: float,
    should_kill: Callable[[int], bool] | None = None,
) -> list[int]:
    """Run ``target(order)`` in a process for each order and return the exit codes.

    multiprocessing's forkserver starts the processes: torch is imported once, and a process
    has no CUDA context, no threads and no random state of its parent. All processes share one
    hash seed, and so the order of sets. A script that calls this function, directly or through
    `prove_resume`, needs ``if __name__ == "__main__":``, as multiprocessing requires.

    Each process gets the working directory and the environment of the caller, and leads its own
    process group: no descendant survives, even if the caller is interrupted.

    Args:
        target: a function at the top level of an importable module.
        orders: one picklable argument for each process.
        outputs: files for stdout and stderr of each process.
        timeout_s: seconds after which all remaining processes are killed.
        should_kill: returns True if the process with an index has to be killed (SIGKILL); polled
            every 2 ms.
    """
    context = multiprocessing.get_context("forkserver")
    # Accelerate imports torch._dynamo; torchmetrics, torchvision and pytest cost a second each.
    used = [name for name in ("torchmetrics", "torchvision", "pytest") if name in sys.modules]
    context.set_forkserver_preload(["torch._dynamo", __name__, *used])
    with _ONE_JOB_AT_A_TIME, ExitStack() as go_ahead:
        process: BaseProcess
        running: dict[int, BaseProcess] = {}
        senders: list[Connection] = []
        codes = [0] * len(orders)
        try:
            for index, (order, output) in enumerate(zip(orders, outputs, strict=True)):
                output.write_bytes(b"")  # for a process that is killed before it opens the file
                receiver, sender = context.Pipe(duplex=False)
                senders.append(go_ahead.enter_context(sender))
                arguments = (
                    receiver,
                    target.__module__,
                    target.__qualname__,
                    order,
                    output,
                    dict(os.environ),
                )
                process = context.Process(target=_run_target, args=arguments)
                with receiver:
                    process.start()
                running[index] = process
            for sender in senders:
                with suppress(BrokenPipeError):  # the process failed already
                    sender.send(True)
            deadline = time.monotonic() + timeout_s
            while running:
                wait(
                    [process.sentinel for process in running.values()],
                    0.002 if should_kill else 0.1,
                )
                is_late = time.monotonic() > deadline
                for index, process in [*running.items()]:
                    if is_late or (should_kill is not None and should_kill(index)):
                        process.kill()
                        process.join()
                    if process.exitcode is not None:
                        codes[index] = process.exitcode
                        _kill_group(running.pop(index))
        finally:  # of an interrupted call
            for process in running.values():
                process.kill()
                process.join()
                _kill_group(process)
    return codes


def _run_target(
    go_ahead: Connection,
    module: str,
    name: str,
    order: Any,
    output: Path,
    environment: Mapping[str, str],
) -> None:
    os.setsid()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        go_ahead.recv()
    except EOFError:  # the caller was interrupted before it knew this process
        return
    getattr(importlib.import_module(module), name)(order)  # here, so that an error is in the output


def _kill_group(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


# --- kills -----------------------------------------------------------------------------------

_KILL_SPREAD_S = 0.3
"""Longest time between the first kill of a rank and that of another rank."""


class RandomKill:
    """Decision to kill each rank of a job.

    One rank is killed at a random instant of a step or of the commit point after the step. The
    other ranks follow within a third of a second, as under a launcher that ends the job.

    Args:
        records: the record that each rank writes.
        step: number of steps that the run has after the chosen step.
        step_s: approximate duration of a step, in seconds.
    """

    def __init__(self, records: Sequence[Path], step: int, step_s: float) -> None:
        rng = random.Random()  # not Python's global generator
        self._victim = rng.randrange(len(records))
        self._record = records[self._victim]
        self._step = step
        self._delay_s = rng.uniform(0, 2 * step_s)
        self._spread_s = [rng.uniform(0, _KILL_SPREAD_S) for _ in records]
        self._read_bytes = 0
        self._due_at: float | None = None
        self._killed_at: float | None = None

    def __call__(self, rank: int) -> bool:
        """Return True if the rank has to be killed now."""
        now = time.monotonic()
        if rank != self._victim:
            return self._killed_at is not None and now > self._killed_at + self._spread_s[rank]
        step = self._newest_step()
        if self._due_at is None and step >= self._step - 1:
            self._due_at = now + self._delay_s
        # At the latest in the next step, however short a step is.
        if self._due_at is None or (now < self._due_at and step <= self._step):
            return False
        self._killed_at = now
        return True

    def _newest_step(self) -> int:
        """Return the step of the last line written since the last call, or -1."""
        if not self._record.exists():
            return -1
        with self._record.open("rb") as file:
            file.seek(self._read_bytes)
            lines = [line for line in file.read().splitlines(keepends=True) if line[-1:] == b"\n"]
        self._read_bytes += sum(map(len, lines))
        return int(lines[-1][1:].partition(b",")[0]) if lines else -1
