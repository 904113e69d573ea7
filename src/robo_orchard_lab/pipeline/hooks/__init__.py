"""The hooks that come with the system, one file each, which is imported when first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

_NAMES_OF = {
    "clear_cache": ("ClearCacheHook", "ClearCacheHookConfig"),
    "early_stopping": ("EarlyStopping", "EarlyStoppingConfig"),
    "ema": ("EMA", "EMAConfig"),
    "freeze": ("FreezeHook", "FreezeHookConfig"),
    "gradient_clipping": ("GradientClippingHook", "GradientClippingHookConfig"),
    "keep_best": ("KeepBest", "KeepBestConfig"),
    "loss_tracker": ("LossTracker", "LossTrackerConfig"),
    "metric_tracker": ("MetricTracker", "MetricTrackerConfig"),
    "metrics_logger": ("MetricsLogger", "MetricsLoggerConfig"),
    "model_summary": ("ModelSummary", "ModelSummaryConfig", "summarize"),
    "non_finite_guard": ("NonFiniteError", "NonFiniteGuard", "NonFiniteGuardConfig"),
    "optimizer": ("OptimizerHook",),
    "preemption": ("Preemption", "PreemptionConfig"),
    "progress_bar": ("ProgressBarHook", "ProgressBarHookConfig"),
    "save_checkpoint": ("SaveCheckpoint", "SaveCheckpointConfig"),
    "save_model": ("SaveModel", "SaveModelConfig"),
    "stats_monitor": ("StatsMonitor", "StatsMonitorConfig"),
    "time_limit": ("TimeLimit", "TimeLimitConfig"),
    "torch_profiler": ("TorchProfilerHook", "TorchProfilerHookConfig"),
    "validation": ("ValidationHook", "ValidationHookConfig"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:  # the same for tools that read types
    from robo_orchard_lab.pipeline.hooks.clear_cache import ClearCacheHook as ClearCacheHook
    from robo_orchard_lab.pipeline.hooks.clear_cache import (
        ClearCacheHookConfig as ClearCacheHookConfig,
    )
    from robo_orchard_lab.pipeline.hooks.early_stopping import EarlyStopping as EarlyStopping
    from robo_orchard_lab.pipeline.hooks.early_stopping import (
        EarlyStoppingConfig as EarlyStoppingConfig,
    )
    from robo_orchard_lab.pipeline.hooks.ema import EMA as EMA
    from robo_orchard_lab.pipeline.hooks.ema import EMAConfig as EMAConfig
    from robo_orchard_lab.pipeline.hooks.freeze import FreezeHook as FreezeHook
    from robo_orchard_lab.pipeline.hooks.freeze import FreezeHookConfig as FreezeHookConfig
    from robo_orchard_lab.pipeline.hooks.gradient_clipping import (
        GradientClippingHook as GradientClippingHook,
    )
    from robo_orchard_lab.pipeline.hooks.gradient_clipping import (
        GradientClippingHookConfig as GradientClippingHookConfig,
    )
    from robo_orchard_lab.pipeline.hooks.keep_best import KeepBest as KeepBest
    from robo_orchard_lab.pipeline.hooks.keep_best import KeepBestConfig as KeepBestConfig
    from robo_orchard_lab.pipeline.hooks.loss_tracker import LossTracker as LossTracker
    from robo_orchard_lab.pipeline.hooks.loss_tracker import LossTrackerConfig as LossTrackerConfig
    from robo_orchard_lab.pipeline.hooks.metric_tracker import MetricTracker as MetricTracker
    from robo_orchard_lab.pipeline.hooks.metric_tracker import (
        MetricTrackerConfig as MetricTrackerConfig,
    )
    from robo_orchard_lab.pipeline.hooks.metrics_logger import MetricsLogger as MetricsLogger
    from robo_orchard_lab.pipeline.hooks.metrics_logger import (
        MetricsLoggerConfig as MetricsLoggerConfig,
    )
    from robo_orchard_lab.pipeline.hooks.model_summary import ModelSummary as ModelSummary
    from robo_orchard_lab.pipeline.hooks.model_summary import (
        ModelSummaryConfig as ModelSummaryConfig,
    )
    from robo_orchard_lab.pipeline.hooks.model_summary import summarize as summarize
    from robo_orchard_lab.pipeline.hooks.non_finite_guard import NonFiniteError as NonFiniteError
    from robo_orchard_lab.pipeline.hooks.non_finite_guard import NonFiniteGuard as NonFiniteGuard
    from robo_orchard_lab.pipeline.hooks.non_finite_guard import (
        NonFiniteGuardConfig as NonFiniteGuardConfig,
    )
    from robo_orchard_lab.pipeline.hooks.optimizer import OptimizerHook as OptimizerHook
    from robo_orchard_lab.pipeline.hooks.preemption import Preemption as Preemption
    from robo_orchard_lab.pipeline.hooks.preemption import PreemptionConfig as PreemptionConfig
    from robo_orchard_lab.pipeline.hooks.progress_bar import ProgressBarHook as ProgressBarHook
    from robo_orchard_lab.pipeline.hooks.progress_bar import (
        ProgressBarHookConfig as ProgressBarHookConfig,
    )
    from robo_orchard_lab.pipeline.hooks.save_checkpoint import SaveCheckpoint as SaveCheckpoint
    from robo_orchard_lab.pipeline.hooks.save_checkpoint import (
        SaveCheckpointConfig as SaveCheckpointConfig,
    )
    from robo_orchard_lab.pipeline.hooks.save_model import SaveModel as SaveModel
    from robo_orchard_lab.pipeline.hooks.save_model import SaveModelConfig as SaveModelConfig
    from robo_orchard_lab.pipeline.hooks.stats_monitor import StatsMonitor as StatsMonitor
    from robo_orchard_lab.pipeline.hooks.stats_monitor import (
        StatsMonitorConfig as StatsMonitorConfig,
    )
    from robo_orchard_lab.pipeline.hooks.time_limit import TimeLimit as TimeLimit
    from robo_orchard_lab.pipeline.hooks.time_limit import TimeLimitConfig as TimeLimitConfig
    from robo_orchard_lab.pipeline.hooks.torch_profiler import (
        TorchProfilerHook as TorchProfilerHook,
    )
    from robo_orchard_lab.pipeline.hooks.torch_profiler import (
        TorchProfilerHookConfig as TorchProfilerHookConfig,
    )
    from robo_orchard_lab.pipeline.hooks.validation import ValidationHook as ValidationHook
    from robo_orchard_lab.pipeline.hooks.validation import (
        ValidationHookConfig as ValidationHookConfig,
    )
else:
    # The trainer needs two of them. All, with what they stand on, would take as long to import as
    # the trainer itself.
    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = found  # the next look-up finds it without coming here
        return found
