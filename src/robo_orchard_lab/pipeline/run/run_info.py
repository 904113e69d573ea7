"""Provenance of a run: configuration, command, package versions and git state."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from robo_orchard_core.utils.config import Config, ConfigSaveError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun

MAX_DIFF_BYTES = 4 << 20
MAX_NAMES = 200
TIMEOUT_S = 5.0

# A hostile repository's settings must not run programs: no file monitor, no hook, no filter (see
# `_without_filters`), no fetch of missing objects.
_OPTIONS = tuple(
    part
    for setting in (
        "core.fsmonitor=false",
        f"core.hooksPath={os.devnull}",
        "color.ui=false",
        "core.quotePath=false",
    )
    for part in ("-c", setting)
)
_ENVIRONMENT = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "",  # for a git without the option above
}
_OF_REPOSITORY = (b"local", b"worktree")
_POLL_S = (0.0005, 0.005)  # first and longest; most commands end after 2 ms


@dataclass(frozen=True, slots=True)
class GitState:
    """State of a git repository."""

    commit: str | None
    """Commit; None before the first commit."""
    branch: str | None
    """Branch; None with a detached HEAD, and in a brief state."""
    changed: tuple[str, ...]
    """Changed files in the format of ``git status``; at most `MAX_NAMES`."""
    diff: bytes | None
    """Changes of tracked files, for ``git apply``; None without changes, and in a brief state."""
    left_out: str | None = None
    """Omitted information and its reason, or None."""


def git_state(
    folder: str | os.PathLike[str], timeout_s: float = TIMEOUT_S, *, is_brief: bool = False
) -> GitState | None:
    """Return the state of the repository that contains a folder.

    None without git, without a repository, or after the time limit of all git commands together.
    A brief state has neither branch nor diff.
    """
    git = _Git(Path(folder), time.monotonic() + timeout_s)
    top = git.line("rev-parse", "--show-toplevel")
    if top is None:
        return None
    commit = git.line("rev-parse", "--verify", "--quiet", "HEAD")
    branch = None if is_brief else git.line("symbolic-ref", "--short", "--quiet", "HEAD")
    git = _Git(Path(top), git.ends_at)  # the whole repository, wherever the run starts
    left_out = []
    filters = _without_filters(git)
    # Submodules have their own settings; only their commits are recorded.
    submodules = "--ignore-submodules=dirty"
    diff: bytes | None = b""
    if commit is not None and not is_brief:
        ours = ("--no-ext-diff", "--no-textconv", submodules)
        diff = None if filters is None else git(*filters, "diff", "--binary", *ours, "HEAD")
    if diff is None:
        left_out.append(f"the diff, which failed, timed out, or exceeds {MAX_DIFF_BYTES} bytes")
    status = None
    if filters is not None:
        status = git(*filters, "status", "--porcelain", "-z", "--no-renames", submodules)
    if status is None:
        left_out.append("the names of changed files, since git status failed or timed out")
    names = [entry.decode("utf-8", "replace") for entry in (status or b"").split(b"\0") if entry]
    if len(names) > MAX_NAMES:
        left_out.append(f"the names of {len(names) - MAX_NAMES} changed files")
    return GitState(
        commit, branch, tuple(names[:MAX_NAMES]), diff or None, "; ".join(left_out) or None
    )


def _without_filters(git: _Git) -> list[str] | None:
    """Return git options that disable the repository's filter programs; None if impossible."""
    settings = git("config", "--show-scope", "-z", "--name-only", "--list")
    if settings is None:
        return None
    parts = settings.split(b"\0")
    names = {
        setting.decode("utf-8", "surrogateescape").rpartition(".")[0]
        for scope, setting in zip(parts[::2], parts[1::2], strict=False)
        if scope in _OF_REPOSITORY and setting.startswith(b"filter.")
    }
    if any("=" in name for name in names):  # no option can express the name
        return None
    off = ("clean=", "smudge=", "process=", "required=false")
    return [part for name in sorted(names) for way in off for part in ("-c", f"{name}.{way}")]


class _Git:
    """Calls of git in a folder, up to a point in time."""

    def __init__(self, folder: Path, ends_at: float) -> None:
        self._folder = folder
        self.ends_at = ends_at

    def line(self, *arguments: str) -> str | None:
        """Return the first line of the output, or None."""
        printed = self(*arguments)
        return (printed or b"").decode("utf-8", "surrogateescape").rstrip("\n") or None

    def __call__(self, *arguments: str) -> bytes | None:
        """Return the output; None after an error, the time limit, or too much output."""
        with TemporaryFile() as printed:
            try:
                process = subprocess.Popen(
                    ["git", "-C", str(self._folder), *_OPTIONS, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=printed,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **_ENVIRONMENT},
                    start_new_session=True,
                )
            except OSError:
                return None
            wait_s, longest_s = _POLL_S
            try:
                while (code := process.poll()) is None and time.monotonic() < self.ends_at:
                    if os.fstat(printed.fileno()).st_size > MAX_DIFF_BYTES:
                        break
                    time.sleep(wait_s)
                    wait_s = min(2 * wait_s, longest_s)
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # with its child processes
                process.wait()
            size = os.fstat(printed.fileno()).st_size
            if code != 0 or size > MAX_DIFF_BYTES:
                return None
            printed.seek(0)
            return printed.read()


_PACKAGES = ("robo-orchard-hooks", "accelerate", "numpy", "safetensors")


def describe_run(run: PipelineRun, hooks: PipelineHooks) -> dict[str, Any]:
    """Describe configuration, command, versions and git state, as JSON-compatible values."""
    accelerator = run.accelerator
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    return {
        "configuration": {
            "limits": asdict(run.limits),
            "processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "dataloader": _kind(run.dataloader),
            "data_order": None if run.data is None else asdict(run.data.order),
            "batch_processor": _kind(run.batch_processor),
            "model": _kind(plain_model(run)),
            "optimizer": of_each(run.optimizers, _optimizer),
            "lr_scheduler": of_each(run.lr_schedulers, _kind),
            "lr_settings": run.lr_settings,
            "hooks": {hook.name: hook_configuration(hook) for hook in hooks.named_hooks()},
        },
        "command": shlex.join(sys.orig_argv),
        "versions": versions(),
        "git": _git_state(script.resolve().parent if script.is_file() else Path.cwd()),
    }


def of_each(by_name: Mapping[str, Any], describe: Callable[[Any], Any]) -> Any:
    """Describe optimizers or LR schedulers by name, as metadata and checkpoints have them.

    >>> of_each({"g": 1.0, "d": 2.0}, str), of_each({"": 1.0}, str), of_each({}, str)
    ({'g': '1.0', 'd': '2.0'}, '1.0', None)
    """
    described = {name: describe(value) for name, value in by_name.items()}
    return described.get("") if "" in described or not described else described


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups = [
        {name: value for name, value in group.items() if isinstance(value, bool | int | str)}
        | {name: repr(value) for name, value in group.items() if isinstance(value, float | tuple)}
        for group in optimizer.param_groups
    ]
    inner = getattr(optimizer, "optimizer", optimizer)
    return {"class": _kind(inner), "param_groups": groups}


def hook_configuration(hook: PipelineHooks) -> Any:
    """Return a hook's configuration as plain values, or its class."""
    configuration = getattr(hook, "cfg", None)
    if isinstance(configuration, Config):
        try:
            return configuration.to_dict()
        except ConfigSaveError:  # for example a class defined in a function
            return repr(configuration)
    return _kind(hook)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python, torch and other packages that affect results."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # with its build
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            continue
    return found


@cache
def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of a folder, and True if files may differ; None without git."""
    state = git_state(folder, is_brief=True)
    if state is None or state.commit is None:
        return None
    differs = any(not name.startswith("??") for name in state.changed)
    return {"commit": state.commit, "changed": differs or state.left_out is not None}
