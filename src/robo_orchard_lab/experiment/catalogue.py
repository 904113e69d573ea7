"""What an experiment's file may name without further trust."""

from __future__ import annotations

from robo_orchard_core.utils.config.document import Plain
from robo_orchard_core.utils.config.errors import Path
from robo_orchard_lab.experiment.merging import PART_KEYS

_HOOKS = {
    "clear_cache": "ClearCacheHook",
    "early_stopping": "EarlyStopping",
    "ema": "EMA",
    "freeze": "FreezeHook",
    "gradient_clipping": "GradientClippingHook",
    "keep_best": "KeepBest",
    "loss_tracker": "LossTracker",
    "metric_tracker": "MetricTracker",
    "metrics_logger": "MetricsLogger",
    "model_summary": "ModelSummary",
    "non_finite_guard": "NonFiniteGuard",
    "optimizer": "OptimizerHook",
    "preemption": "Preemption",
    "progress_bar": "ProgressBarHook",
    "save_checkpoint": "SaveCheckpoint",
    "save_model": "SaveModel",
    "stats_monitor": "StatsMonitor",
    "time_limit": "TimeLimit",
    "torch_profiler": "TorchProfilerHook",
    "validation": "ValidationHook",
}

CATALOGUE: dict[str, str] = {
    name: f"robo_orchard_lab.pipeline.hooks.{module}:{name}" for module, name in _HOOKS.items()
}
"""From each name that files may use for a class to the place where it is defined."""


def with_definitions(value: Plain, path: Path = ()) -> Plain:
    """The value with the places where code is defined for the other names that it has.

    Args:
        value: Of a document.
        path: Where it is there; only ``class_type``, ``func`` and ``config_type`` hold short names.
    """
    if isinstance(value, dict):
        return {key: with_definitions(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [with_definitions(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, str) and (":" in value or (path and path[-1] in PART_KEYS)):
        return CATALOGUE.get(value, value)
    return value
