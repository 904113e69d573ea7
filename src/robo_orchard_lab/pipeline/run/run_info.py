"""Which run a checkpoint is of, for people who find it later."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from robo_orchard_core.utils.config import Config, ConfigSaveError
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import plain_model

# --- git state -------------------------------------------------------------------------------
# Which code a run was started from, as far as git tells.


MAX_DIFF_BYTES = 4 << 20
MAX_NAMES = 200
TIMEOUT_S = 5.0

# Nothing that a repository's settings name is run for it: no program that watches its files, no
# hook, no filter (see `_without_filters`), nothing to fetch with what isn't there.
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
    "GIT_ALLOW_PROTOCOL": "",  # for a git that doesn't know the one above
}
_OF_REPOSITORY = (b"local", b"worktree")
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class GitState:
    """A repository as it stood."""

    commit: str | None
    """None where nothing was committed yet."""
    branch: str | None
    """None where none is checked out."""
    changed: tuple[str, ...]
    """Files that differ from the commit, as ``git status`` tells them; at most `MAX_NAMES`."""
    diff: bytes | None
    """The changes to the commit's files, for ``git apply``; None where there are none."""
    left_out: str | None = None
    """What is not in here, and why; None where nothing is left out."""


def git_state(folder: str | os.PathLike[str], timeout_s: float = TIMEOUT_S) -> GitState | None:
    """The state of the repository that a folder lies in.

    Args:
        folder: any folder.
        timeout_s: how long all of it may take, in seconds.

    Returns:
        None where there is no git, no repository, or no answer in time.
    """
    git = _Git(Path(folder), time.monotonic() + timeout_s)
    top = git.line("rev-parse", "--show-toplevel")
    if top is None:
        return None
    commit = git.line("rev-parse", "--verify", "--quiet", "HEAD")
    branch = git.line("symbolic-ref", "--short", "--quiet", "HEAD")
    git = _Git(Path(top), git.ends_at)  # of all of it, wherever in it the run is started
    left_out = []
    filters = _without_filters(git)
    # Submodules have settings of their own; of these, the commit is told.
    submodules = "--ignore-submodules=dirty"
    diff: bytes | None = b""
    if commit is not None:
        ours = ("--no-ext-diff", "--no-textconv", submodules)
        diff = None if filters is None else git(*filters, "diff", "--binary", *ours, "HEAD")
    if diff is None:
        left_out.append(
            f"the diff, which can't be made, took too long or has more than {MAX_DIFF_BYTES} bytes"
        )
    status = None
    if filters is not None:
        status = git(*filters, "status", "--porcelain", "-z", "--no-renames", submodules)
    if status is None:
        left_out.append("the names of changed files, which can't be told, or took too long")
    names = [entry.decode("utf-8", "replace") for entry in (status or b"").split(b"\0") if entry]
    if len(names) > MAX_NAMES:
        left_out.append(f"the names of {len(names) - MAX_NAMES} changed files")
    return GitState(
        commit, branch, tuple(names[:MAX_NAMES]), diff or None, "; ".join(left_out) or None
    )


def _without_filters(git: _Git) -> list[str] | None:
    """Options by which no program of the repository's own settings gets to see its files.

    Returns:
        None where that can't be said.
    """
    settings = git("config", "--show-scope", "-z", "--name-only", "--list")
    if settings is None:
        return None
    parts = settings.split(b"\0")
    names = {
        setting.decode("utf-8", "surrogateescape").rpartition(".")[0]
        for scope, setting in zip(parts[::2], parts[1::2], strict=False)
        if scope in _OF_REPOSITORY and setting.startswith(b"filter.")
    }
    if any("=" in name for name in names):  # which no option can say
        return None
    off = ("clean=", "smudge=", "process=", "required=false")
    return [part for name in sorted(names) for way in off for part in ("-c", f"{name}.{way}")]


class _Git:
    """Runs git in a folder, until a time."""

    def __init__(self, folder: Path, ends_at: float) -> None:
        self._folder = folder
        self.ends_at = ends_at

    def line(self, *arguments: str) -> str | None:
        """The one line that it prints; None for nothing."""
        printed = self(*arguments)
        return (printed or b"").decode("utf-8", "surrogateescape").rstrip("\n") or None

    def __call__(self, *arguments: str) -> bytes | None:
        """What it prints; None where it fails, takes too long, or prints too much."""
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
            try:
                while (code := process.poll()) is None and self._may_go_on(printed.fileno()):
                    time.sleep(_POLL_S)
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()
            size = os.fstat(printed.fileno()).st_size
            if code != 0 or size > MAX_DIFF_BYTES:
                return None
            printed.seek(0)
            return printed.read()

    def _may_go_on(self, printed: int) -> bool:
        return time.monotonic() < self.ends_at and os.fstat(printed).st_size <= MAX_DIFF_BYTES


_PACKAGES = ("robo-orchard-hooks", "accelerate", "numpy", "safetensors")


def describe_run(run: PipelineRun, hooks: PipelineHooks) -> dict[str, Any]:
    """The resolved configuration, the command, the versions and the git state.

    All of it is what JSON can say. Nothing reads it back: it decides nothing.
    """
    accelerator = run.accelerator
    return {
        "configuration": {
            "limits": {
                "max_step": run.limits.max_step,
                "max_optimizer_step": run.limits.max_optimizer_step,
                "max_epoch": run.limits.max_epoch,
            },
            "processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "dataloader": _kind(run.dataloader),
            "data_order": None if run.data is None else asdict(run.data.order),
            "batch_processor": _kind(run.batch_processor),
            "model": _kind(plain_model(run)),
            "optimizer": _optimizer(run),
            "lr_scheduler": None if run.lr_scheduler is None else _kind(run.lr_scheduler),
            "hooks": {hook.name: _configuration(hook) for hook in hooks.named_hooks()},
        },
        "command": shlex.join(sys.orig_argv),
        "versions": versions(),
        "git": _git_state(_script_folder()),
    }


def _optimizer(run: PipelineRun) -> dict[str, Any] | None:
    if run.optimizer is None:
        return None
    groups = [
        {name: value for name, value in group.items() if isinstance(value, bool | int | str)}
        | {name: repr(value) for name, value in group.items() if isinstance(value, float | tuple)}
        for group in run.optimizer.param_groups
    ]
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    return {"class": _kind(inner), "param_groups": groups}


def _configuration(hook: PipelineHooks) -> Any:
    """A hook's configuration; of one that has none, its class."""
    configuration = getattr(hook, "cfg", None)
    if isinstance(configuration, Config):
        try:
            return configuration.to_dict()
        except ConfigSaveError:  # it holds a class that is made in a function, say
            return repr(configuration)
    return _kind(hook)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


@cache
def versions() -> dict[str, str]:
    """Of Python, torch and what else a run's numbers may depend on, by the package's name."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # with its build
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its source
            continue
    return found


def _script_folder() -> Path:
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    return script.resolve().parent if script.is_file() else Path.cwd()


@cache
def _git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is of, and whether files may differ from it; None without git."""
    state = git_state(folder)
    if state is None or state.commit is None:
        return None
    differs = any(not name.startswith("??") for name in state.changed)
    return {"commit": state.commit, "changed": differs or state.left_out is not None}
