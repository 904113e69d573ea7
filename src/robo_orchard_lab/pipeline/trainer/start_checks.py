"""Checks before the first step: metrics that hooks wait for, and the hooks that publish them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from fnmatch import fnmatchcase

from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.errors import UnknownMetricError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.job_log import job_logger

logger = job_logger(__name__)

_PUBLISHERS = {
    "eval": "ValidationHook",
    "grad_norm": "StatsMonitor",
    "loss": "LossTracker",
    "lr": "StatsMonitor",
    "perf": "StatsMonitor",
    "train": "MetricTracker",
}
"""Hook that publishes the metrics of a group."""


def check_metric_names(run: PipelineRun, hooks: PipelineHooks) -> None:
    """Check the names of metrics that hooks wait for, once the loop has begun for all hooks.

    If a hook may publish undeclared metrics, an unknown name is logged: as a warning if the name
    is similar to a known one.

    Raises:
        UnknownMetricError: no hook publishes a metric, and all hooks declare theirs.
    """
    by_name = {hook.name: hook for hook in hooks.all_hooks()}
    declared = [name for hook in by_name.values() for name in hook.published_metrics or ()]
    known = {*declared, *run.metrics.names()}
    others = hooks.undeclared_publishers()
    for name, who in run.metrics.expected_names():
        if name in known or any(fnmatchcase(name, pattern) for pattern in declared):
            continue
        place = run.locate(who, *_setting_of(by_name.get(who), name))
        error = UnknownMetricError(name, known, who, _publisher_hint(name, known), place)
        if not others:
            raise error
        logger.log(
            logging.WARNING if error.similar else logging.INFO,
            "%s. Hooks may publish undeclared metrics (%s): set published_metrics = [%r] on the "
            "class of such a hook, so that misspelled names are errors before the first step",
            *(error, ", ".join(others), name),
        )


def _publisher_hint(name: str, known: Iterable[str]) -> str:
    """Return the hook to add for a metric of a group that no hook publishes, or ""."""
    group = name.partition("/")[0]
    is_published = any(other.partition("/")[0] == group for other in known)
    return f"Add a {_PUBLISHERS[group]}" if group in _PUBLISHERS and not is_published else ""


def _setting_of(hook: PipelineHooks | None, value: str) -> tuple[str | int, ...]:
    """Return the keys of a value in a hook's configuration."""
    if hook is None:
        return ("monitor",)  # of the LR scheduler
    for name, found in getattr(hook, "cfg", ()):
        if found == value:
            return (name,)
        if isinstance(found, list) and value in found:
            return name, found.index(value)
    return ()
