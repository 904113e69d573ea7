"""Worker processes of the resume proof, started from multiprocessing's forkserver.

`describe_function` and `find_function` pass a `build` function to a worker, `execute_order` runs
in the worker, `run_ranks` starts workers and waits, and `RandomKill` decides when to kill one.
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


def describe_function(function: Callable[..., Any] | str) -> dict[str, Any]:
    """Return the location of a function of a module's top level, or of a partial of one.

    Raises:
        TypeError: another process cannot find the function, or receive the arguments.
    """
    if isinstance(function, str):
        source, _, name = function.rpartition(":")
        if not source or not name.isidentifier():
            raise TypeError(f"expected 'module:name' or 'file.py:name', got {function!r}")
        path = Path(source)
        if path.suffix == ".py":
            return {"file": str(path.resolve()), "module": path.stem, "name": name}
        return {"file": None, "module": source, "name": name}
    if isinstance(function, functools.partial):
        arguments = {"args": [*function.args], "kwargs": function.keywords}
        with suppress(TypeError, ValueError):
            if json.loads(json.dumps(arguments)) == arguments:
                return {**describe_function(function.func), **arguments}
        raise TypeError(
            f"another process can't receive {function!r:.120}: expected a partial of a plain "
            "function, with arguments that JSON can write; build other objects in the function"
        )
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None)
    if not inspect.isfunction(function) or not name.isidentifier() or file is None:
        raise TypeError(
            f"another process can't find {function!r:.120}: expected a function at the top level "
            "of a module in a file (not a lambda, a method or a nested function), or its name as "
            "'module:name'"
        )
    return {"file": str(Path(file).resolve()), "module": module, "name": name}


def find_function(described: Mapping[str, Any]) -> Callable[..., Any]:
    """Import a function located by `describe_function`.

    The module of a file need not be importable by name, as the test modules of pytest. A script is
    imported as ``__mp_main__``, as multiprocessing does: its ``__main__`` block does not run.

    Raises:
        ImportError: the module or the function does not exist.
    """
    name, file = described["module"].replace("__main__", "__mp_main__"), described["file"]
    module = ModuleType(name)
    try:
        module = importlib.import_module(name)
    except ImportError:
        if file is None:
            raise
    if file is not None and os.path.realpath(getattr(module, "__file__", None) or "") != file:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pickle looks up classes by module name
        spec.loader.exec_module(module)
    function = getattr(module, described["name"], None)
    if not callable(function):
        raise ImportError(f"{name} ({module.__file__}) has no function {described['name']!r}")
    if "args" in described:
        return functools.partial(function, *described["args"], **described["kwargs"])
    return function  # type: ignore[no-any-return]  # a callable


@dataclass(frozen=True, slots=True)
class RunOrder:
    """Part of a training that a worker process runs.

    Attributes:
        build: Location of the function that builds the trainer, from `describe_function`.
        run_folder: First argument of the function.
        record: File for the record of the run.
        resume_from: Second argument of the function: a checkpoint, ``"auto"`` or None.
        stop_after: Number of steps of the run after which to stop.
        seed: Seed of torch, NumPy and Python before the trainer is built.
        requires_saves: Refuse a trainer without a `SaveCheckpoint` hook.
        save_to: Path of a checkpoint to save after the trainer returned.
        rendezvous: File for the rendezvous of several ranks; must not exist.
    """

    build: dict[str, Any]
    run_folder: str
    record: str
    resume_from: str | None = None
    stop_after: int | None = None
    seed: int = 0
    requires_saves: bool = False
    save_to: str | None = None
    rank: int = 0
    world_size: int = 1
    rendezvous: str = ""
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
    for prefix in ("", "LOCAL_"):
        os.environ[f"{prefix}RANK"], os.environ[f"{prefix}WORLD_SIZE"] = str(rank), str(world_size)
    on_devices = torch.cuda.device_count() >= world_size
    # By a file: a free port may be taken before the first rank binds it.
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_devices else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
    )


@dataclass(frozen=True, slots=True)
class RecordedProcess:
    """Result of one worker.

    Attributes:
        record: Record of the run; None if the worker ended before the trainer was built.
        exit_code: Exit code; negative for a signal.
        output: Last lines of the output.
    """

    record: RunRecord | None
    exit_code: int
    output: str


def run_ranks(
    orders: Sequence[RunOrder], should_kill: Callable[[int], bool] | None = None
) -> list[RecordedProcess]:
    """Run all ranks of a job, one order for each, to their end; see `run_processes`."""
    records = [Path(order.record) for order in orders]
    logs = [record.with_suffix(".log") for record in records]
    timeout_s = max(order.timeout_s for order in orders) + 10
    codes = run_processes(execute_order, orders, logs, timeout_s, should_kill)
    found = []
    for record, code, log in zip(records, codes, logs, strict=True):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        output = "\n".join(lines[-_LOG_LINES:])
        found.append(RecordedProcess(read_record(record), code, output))
    return found


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

    multiprocessing's forkserver starts the processes: torch is imported once, and a process has no
    CUDA context, no threads and no random state of its parent. All processes share one hash seed,
    and so the order of sets.

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
    function, environment = (target.__module__, target.__qualname__), dict(os.environ)
    method = multiprocessing.get_start_method(allow_none=True)
    with _ONE_JOB_AT_A_TIME, ExitStack() as go_ahead:
        running: dict[int, BaseProcess] = {}
        senders: list[Connection] = []
        codes = [0] * len(orders)
        try:
            for index, (order, output) in enumerate(zip(orders, outputs, strict=True)):
                output.write_bytes(b"")  # for a process that is killed before it opens the file
                receiver, sender = context.Pipe(duplex=False)
                senders.append(go_ahead.enter_context(sender))
                arguments = (receiver, function, order, output, environment, method)
                process = context.Process(target=_run_target, args=arguments)
                with receiver:
                    process.start()
                running[index] = process
            for sender in senders:
                with suppress(BrokenPipeError):  # the process failed already
                    sender.send(True)
            deadline = time.monotonic() + timeout_s
            poll_s = 0.002 if should_kill else 0.1
            while running:
                wait([process.sentinel for process in running.values()], poll_s)
                is_late = time.monotonic() > deadline
                for index in [*running]:
                    if is_late or (should_kill is not None and should_kill(index)):
                        _kill(running[index])
                    if (code := running[index].exitcode) is not None:
                        codes[index] = code
                        _kill(running.pop(index))
        finally:  # of an interrupted call
            for remaining in running.values():
                _kill(remaining)
    return codes


def _run_target(
    go_ahead: Connection,
    function: tuple[str, str],
    order: Any,
    output: Path,
    environment: Mapping[str, str],
    start_method: str | None,
) -> None:
    os.setsid()
    # Of data loading workers, as in the caller: a forkserver would import torch for each of them.
    multiprocessing.set_start_method(start_method, force=True)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        go_ahead.recv()
    except EOFError:  # the caller was interrupted before it knew this process
        return
    module, name = function
    getattr(importlib.import_module(module), name)(order)  # here, so that an error is in the output


def _kill(process: BaseProcess) -> None:
    """Kill a process, if it is still running, and its process group."""
    process.kill()
    process.join()
    assert process.pid is not None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


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
