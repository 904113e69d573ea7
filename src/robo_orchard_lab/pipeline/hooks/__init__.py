"""The hooks that come with the system, one file each."""

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
