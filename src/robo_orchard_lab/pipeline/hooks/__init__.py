"""The hooks that come with the system, one file each, which is imported when first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robo_orchard_lab.pipeline.hooks.clear_cache import ClearCacheHook, ClearCacheHookConfig
    from robo_orchard_lab.pipeline.hooks.early_stopping import EarlyStopping, EarlyStoppingConfig
    from robo_orchard_lab.pipeline.hooks.ema import EMA, EMAConfig
    from robo_orchard_lab.pipeline.hooks.freeze import FreezeHook, FreezeHookConfig
    from robo_orchard_lab.pipeline.hooks.gradient_clipping import (
        GradientClippingHook,
        GradientClippingHookConfig,
    )
    from robo_orchard_lab.pipeline.hooks.keep_best import KeepBest, KeepBestConfig
    from robo_orchard_lab.pipeline.hooks.loss_tracker import LossTracker, LossTrackerConfig
    from robo_orchard_lab.pipeline.hooks.metric_tracker import MetricTracker, MetricTrackerConfig
    from robo_orchard_lab.pipeline.hooks.metrics_logger import MetricsLogger, MetricsLoggerConfig
    from robo_orchard_lab.pipeline.hooks.model_summary import (
        ModelSummary,
        ModelSummaryConfig,
        summarize,
    )
    from robo_orchard_lab.pipeline.hooks.non_finite_guard import (
        NonFiniteError,
        NonFiniteGuard,
        NonFiniteGuardConfig,
    )
    from robo_orchard_lab.pipeline.hooks.optimizer import OptimizerHook
    from robo_orchard_lab.pipeline.hooks.preemption import Preemption, PreemptionConfig
    from robo_orchard_lab.pipeline.hooks.progress_bar import ProgressBarHook, ProgressBarHookConfig
    from robo_orchard_lab.pipeline.hooks.save_checkpoint import SaveCheckpoint, SaveCheckpointConfig
    from robo_orchard_lab.pipeline.hooks.save_model import SaveModel, SaveModelConfig
    from robo_orchard_lab.pipeline.hooks.stats_monitor import StatsMonitor, StatsMonitorConfig
    from robo_orchard_lab.pipeline.hooks.time_limit import TimeLimit, TimeLimitConfig
    from robo_orchard_lab.pipeline.hooks.torch_profiler import (
        TorchProfilerHook,
        TorchProfilerHookConfig,
    )
    from robo_orchard_lab.pipeline.hooks.validation import ValidationHook, ValidationHookConfig

__all__ = [
    "EMA",
    "ClearCacheHook",
    "ClearCacheHookConfig",
    "EMAConfig",
    "EarlyStopping",
    "EarlyStoppingConfig",
    "FreezeHook",
    "FreezeHookConfig",
    "GradientClippingHook",
    "GradientClippingHookConfig",
    "KeepBest",
    "KeepBestConfig",
    "LossTracker",
    "LossTrackerConfig",
    "MetricTracker",
    "MetricTrackerConfig",
    "MetricsLogger",
    "MetricsLoggerConfig",
    "ModelSummary",
    "ModelSummaryConfig",
    "NonFiniteError",
    "NonFiniteGuard",
    "NonFiniteGuardConfig",
    "OptimizerHook",
    "Preemption",
    "PreemptionConfig",
    "ProgressBarHook",
    "ProgressBarHookConfig",
    "SaveCheckpoint",
    "SaveCheckpointConfig",
    "SaveModel",
    "SaveModelConfig",
    "StatsMonitor",
    "StatsMonitorConfig",
    "TimeLimit",
    "TimeLimitConfig",
    "TorchProfilerHook",
    "TorchProfilerHookConfig",
    "ValidationHook",
    "ValidationHookConfig",
    "summarize",
]

# The trainer needs two of them. All, with what they stand on, would take as long to import as the
# trainer itself.
_MODULE_OF = {
    "ClearCacheHook": "clear_cache",
    "ClearCacheHookConfig": "clear_cache",
    "EarlyStopping": "early_stopping",
    "EarlyStoppingConfig": "early_stopping",
    "EMA": "ema",
    "EMAConfig": "ema",
    "FreezeHook": "freeze",
    "FreezeHookConfig": "freeze",
    "GradientClippingHook": "gradient_clipping",
    "GradientClippingHookConfig": "gradient_clipping",
    "KeepBest": "keep_best",
    "KeepBestConfig": "keep_best",
    "LossTracker": "loss_tracker",
    "LossTrackerConfig": "loss_tracker",
    "MetricTracker": "metric_tracker",
    "MetricTrackerConfig": "metric_tracker",
    "MetricsLogger": "metrics_logger",
    "MetricsLoggerConfig": "metrics_logger",
    "ModelSummary": "model_summary",
    "ModelSummaryConfig": "model_summary",
    "summarize": "model_summary",
    "NonFiniteError": "non_finite_guard",
    "NonFiniteGuard": "non_finite_guard",
    "NonFiniteGuardConfig": "non_finite_guard",
    "OptimizerHook": "optimizer",
    "Preemption": "preemption",
    "PreemptionConfig": "preemption",
    "ProgressBarHook": "progress_bar",
    "ProgressBarHookConfig": "progress_bar",
    "SaveCheckpoint": "save_checkpoint",
    "SaveCheckpointConfig": "save_checkpoint",
    "SaveModel": "save_model",
    "SaveModelConfig": "save_model",
    "StatsMonitor": "stats_monitor",
    "StatsMonitorConfig": "stats_monitor",
    "TimeLimit": "time_limit",
    "TimeLimitConfig": "time_limit",
    "TorchProfilerHook": "torch_profiler",
    "TorchProfilerHookConfig": "torch_profiler",
    "ValidationHook": "validation",
    "ValidationHookConfig": "validation",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = found  # the next look-up finds it without coming here
    return found
