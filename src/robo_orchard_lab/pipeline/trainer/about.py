"""Which run a checkpoint is of, for people who find it later."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from robo_orchard_core.utils.config import Config, ConfigSaveError
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.git_state import git_state
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.plain_model import plain_model

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
