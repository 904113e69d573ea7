"""A process of its own that runs a trainer, and writes down what it does."""

from __future__ import annotations

import faulthandler
import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from robo_orchard_lab.pipeline.hooks.save_checkpoint import SaveCheckpoint
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.testing.fixtures import seed_all
from robo_orchard_lab.testing.resume.fork_server import ForkServer
from robo_orchard_lab.testing.resume.run_record import RunRecord, RunRecorder, read_record

# --- build source ----------------------------------------------------------------------------
# A function that another process can find again.


def describe_function(function: Callable[..., Any] | str) -> dict[str, Any]:
    """Where a function is to be found, as plain values.

    It is a function at the top of a module, also of a script (``__main__``) or of a module that no
    import finds, as pytest loads them; a ``functools.partial`` of one, with arguments that JSON can
    write; ``"module:name"``; or ``"path/to/file.py:name"``.

    Raises:
        TypeError: another process can't find it; the message says why.
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
        given = {"args": list(function.args), "kwargs": dict(function.keywords)}
        try:
            same = json.loads(json.dumps(given)) == given
        except (TypeError, ValueError):
            same = False
        if not same or "args" in described:
            raise TypeError(
                f"another process can't be given {function!r:.120}: a partial must be of a plain "
                "function, with arguments that JSON can write; name other things in the function"
            )
        return {**described, **given}
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    if not inspect.isfunction(function) or not name.isidentifier():
        raise TypeError(
            f"another process can't find {function!r:.120}: give a function that is defined at the "
            "top of a module (not a lambda, a method or a function in a function), or its name as "
            "'module:name'"
        )
    code_file = inspect.getsourcefile(inspect.unwrap(function))
    file = getattr(sys.modules.get(module), "__file__", None) or code_file
    if file is None or not Path(file).is_file():
        raise TypeError(
            f"another process can't find {name} of {module}: there is no file of it; "
            "define it in a file"
        )
    return {"file": str(Path(file).resolve()), "module": module, "name": name}


def find_function(described: dict[str, Any]) -> Callable[..., Any]:
    """The function that was described.

    A script is loaded by another name than ``__main__``, as multiprocessing does, so that what is
    guarded by that name does not run.

    Raises:
        ImportError: there is no such function here.
    """
    module = _module_of(described["module"], described["file"])
    function = getattr(module, described["name"], None)
    if not callable(function):
        raise ImportError(
            f"{module.__name__} ({module.__file__}) has no function {described['name']!r}"
        )
    if "args" in described:
        return functools.partial(function, *described["args"], **described["kwargs"])
    return function  # type: ignore[no-any-return]  # it is callable


def _module_of(name: str, file: str | None) -> ModuleType:
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
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where classes in it are looked up by their module
    spec.loader.exec_module(module)
    return module


_LINES_TOLD = 25


@dataclass(frozen=True, slots=True)
class RunOrder:
    """What a process is to do."""

    build: dict[str, Any]
    """The function that makes the trainer, as :func:`describe_function` gives it."""
    run_folder: str
    record: str
    """The file to write down what it does in."""
    resume_from: str | None = None
    stop_after: int | None = None
    """How many steps of the run are done when it is to stop."""
    seed: int = 0
    """Of torch, NumPy and Python, ahead of making the trainer."""
    saves: bool = False
    """Whether the trainer has to have a hook that saves."""
    save_to: str | None = None
    """Where to save a checkpoint when the trainer has returned."""
    rank: int = 0
    ranks: int = 1
    meeting: str = ""
    """The file by which several ranks find each other; must not exist."""
    timeout_s: float = 600.0
    sys_path: list[str] = field(default_factory=lambda: [*sys.path])


@dataclass(frozen=True, slots=True)
class RecordedProcess:
    """What came of a process."""

    record: RunRecord | None
    """What it has done; None where it did not get so far as to make the trainer."""
    exit_code: int
    """Minus the number of the signal that ended it, if one did."""
    output: str
    """The end of what it has printed."""
    seconds: float


def run_recorded(
    order: RunOrder, kind: str = "", kill_when: Callable[[], bool] | None = None
) -> RecordedProcess:
    """Run a process, and wait for it.

    When it takes longer than ``timeout_s`` it prints where it is, and ends.

    Args:
        order: what it is to do.
        kind: processes of one kind are forked from one, and so have hashes, and with them the
            order of sets, alike.
        kill_when: asked every two milliseconds whether to kill it (SIGKILL).
    """
    server = _server_of(f"{kind}{order.rank}")
    record = Path(order.record)
    log = record.with_suffix(".log")
    began_at = time.monotonic()
    exit_code = server.run(asdict(order), log, order.timeout_s + 10, kill_when)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return RecordedProcess(
        read_record(record),
        exit_code,
        "\n".join(lines[-_LINES_TOLD:]),
        time.monotonic() - began_at,
    )


def run_ranks(
    orders: Sequence[RunOrder], kind: str = "", kill_when: Callable[[int], bool] | None = None
) -> list[RecordedProcess]:
    """Run all ranks of a job, as :func:`run_recorded`, and wait for them.

    Where this is interrupted, as by a Ctrl-C, or fails for one of them, all are killed.

    Args:
        orders: of the ranks.
        kind: of the job.
        kill_when: asked for each rank whether to kill it.
    """

    interrupted = threading.Event()

    def is_to_be_killed(rank: int) -> bool:
        return interrupted.is_set() or (kill_when is not None and kill_when(rank))

    def run(order: RunOrder) -> RecordedProcess:
        return run_recorded(order, kind, partial(is_to_be_killed, order.rank))

    with ThreadPoolExecutor(len(orders)) as threads:
        try:
            return [*threads.map(run, orders)]
        except BaseException:
            interrupted.set()
            raise


_SERVERS: dict[str, ForkServer] = {}


def _server_of(kind: str) -> ForkServer:
    server = _SERVERS.get(kind)
    if server is None or server.has_ended:
        # Accelerate imports the first of these; the others take a second where they are used.
        used = [name for name in ("torchmetrics", "torchvision") if name in sys.modules]
        server = _SERVERS[kind] = ForkServer(run_order, ["torch._dynamo", *used])
    return server


def run_order(order: dict[str, Any]) -> None:
    """What the process does."""
    sys.path[:] = order["sys_path"]
    faulthandler.dump_traceback_later(order["timeout_s"], exit=True)
    build = find_function(order["build"])
    resume_from = order["resume_from"]
    run_folder = Path(order["run_folder"])
    if resume_from is not None and resume_from != "auto":
        resume_from = Path(resume_from)
    join_job(order["rank"], order["ranks"], order["meeting"])
    seed_all(order["seed"])
    trainer = build(run_folder, resume_from)
    if not isinstance(trainer, HookBasedTrainer):
        raise TypeError(
            f"build(run_folder, resume_from) must return a HookBasedTrainer, got {trainer!r:.80}"
        )
    if order["saves"] and not any(isinstance(h, SaveCheckpoint) for h in trainer.hooks.all_hooks()):
        raise TypeError(
            "a run that is to be killed must save: have build register a SaveCheckpoint, such as "
            "SaveCheckpointConfig(every='1 step')"
        )
    stop_after = order["stop_after"]
    with RunRecorder(trainer, Path(order["record"]), stop_after) as recorder:
        done = trainer.progress.global_step_id
        if stop_after is None or done < stop_after or trainer.limits.reached(trainer.progress):
            trainer()
        recorder.write_end()
    if order["save_to"] is not None:
        trainer.save_checkpoint(order["save_to"])
    if order["ranks"] > 1:
        trainer.accelerator.end_training()
    faulthandler.cancel_dump_traceback_later()


def join_job(rank: int, ranks: int, meeting: str) -> None:
    """Be one of several ranks, as torchrun would have it; nothing where there is one."""
    if ranks == 1:
        return
    of_job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in of_job.items()})
    on_devices = torch.cuda.device_count() >= ranks
    # By a file, since a port that is free now may not be when the first rank comes to it.
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_devices else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=ranks,
    )
