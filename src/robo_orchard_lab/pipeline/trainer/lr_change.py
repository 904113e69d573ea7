"""Change of learning rates and LR schedulers on a resume."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from robo_orchard_lab.pipeline.checkpoint import SavedState
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks.optimizer import OptimizerHook
from robo_orchard_lab.pipeline.job_log import announce, job_logger
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun

logger = job_logger(__name__)

_PREVIEW = 3  # learning rates after the next one
_CYCLED = ("momentum", "betas")  # by LR schedulers that add max_momentum to a group


class LRChange:
    """Learning rates and LR schedulers of this run, in place of those of a checkpoint.

    Created before the first step of the LR schedulers, whose states it copies.
    """

    def __init__(self, run: PipelineRun, hooks: PipelineHooks) -> None:
        self._run = run
        self._hooks = [hook for hook in hooks.all_hooks() if isinstance(hook, OptimizerHook)]
        self._begin = [_copied(hook) for hook in self._hooks] if run.lr_settings is not None else []

    def is_due(self, saved: SavedState) -> bool:
        """Return True if the checkpoint was saved with other settings than this run's."""
        about = saved.info.metadata.get("configuration")
        found = about.get("lr_settings") if isinstance(about, Mapping) else None
        return self._run.lr_settings is not None and found != self._run.lr_settings

    def prepare(self) -> None:
        """Remove the options that LR schedulers added to the groups: a checkpoint may lack them."""
        for hook in self._hooks:
            for group in hook.optimizer.param_groups:
                for option in group.keys() - hook.optimizer.defaults.keys() - {"params"}:
                    del group[option]

    def apply(self) -> None:
        """Set the learning rates of this run at the restored counters, and log them.

        Each LR scheduler is stepped from its begin to the counters, on the curve of this run.
        ReduceLROnPlateau, which depends on metrics, starts again.
        """
        lines = []
        for hook, (options, state) in zip(self._hooks, self._begin, strict=True):
            groups, kept = hook.optimizer.param_groups, hook.optimizer.defaults.keys() - {"lr"}
            before = [dict(group) for group in groups]
            for group, new in zip(groups, copy.deepcopy(options), strict=True):
                is_cycled = "max_momentum" in group or "max_momentum" in new
                own = {k: group[k] for k in kept if not (is_cycled and k in _CYCLED)}
                parameters = group["params"]
                group.clear()
                group.update({**new, **own, "params": parameters})
            with _without_warnings():
                if hook.lr_scheduler is not None:
                    hook.lr_scheduler.load_state_dict(copy.deepcopy(state))
                hook.step_lr_scheduler_to(self._run.progress)
                curves = _next_learning_rates(hook)
            for number, (old, curve) in enumerate(zip(before, curves, strict=True)):
                label = [hook.optimizer_name] if hook.optimizer_name else []
                label += [f"group {number}"] if len(groups) > 1 else []
                rates = ", ".join(f"{rate:.4g}" for rate in curve)
                prefix = f"{' '.join(label)}: " if label else ""
                lines.append(f"  {prefix}{float(old['lr']):.4g} -> {rates}, ...")
        announce(logger, f"the learning rate changes at {self._run.progress}, to")
        for line in lines:
            announce(logger, line)


def _copied(hook: OptimizerHook) -> tuple[list[dict[str, Any]], Any]:
    """Copy the options of the parameter groups, and the state of the LR scheduler."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in hook.optimizer.param_groups]
    with _without_warnings():
        state = None if hook.lr_scheduler is None else hook.lr_scheduler.state_dict()
    return copy.deepcopy((groups, state))


def _next_learning_rates(hook: OptimizerHook) -> list[list[float]]:
    """Return the next learning rates of each group; optimizer and LR scheduler stay the same."""
    options, state = _copied(hook)
    found = [[float(group["lr"])] for group in hook.optimizer.param_groups]
    for _ in range(_PREVIEW):
        hook.step_lr_scheduler(1)
        for group, rates in zip(hook.optimizer.param_groups, found, strict=True):
            rates.append(float(group["lr"]))
    for group, before in zip(hook.optimizer.param_groups, options, strict=True):
        group.update(before)
    if hook.lr_scheduler is not None:
        hook.lr_scheduler.load_state_dict(state)
    return found


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: the optimizer has made no step in this process
        yield
