"""Built-in hooks: one module each, imported on first use; and the names for writing hooks.

`robo_orchard_lab.HOOK_MODULES` lists the hooks; the imports below repeat them for type checkers.
"""

from typing import TYPE_CHECKING

from robo_orchard_core.utils.hook import HookContext as HookContext
from robo_orchard_core.utils.hook import RemovableHandle as RemovableHandle
from robo_orchard_core.utils.hook import RemoveableHandle as RemoveableHandle
from robo_orchard_core.utils.lazy_exports import lazy_exports
from robo_orchard_lab import HOOK_MODULES
from robo_orchard_lab.pipeline.context import PipelineHookArgs as PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks as PipelineHooks
from robo_orchard_lab.pipeline.hook_set import PipelineHooksConfig as PipelineHooksConfig

_MODULE_OF = {
    **HOOK_MODULES,
    **{f"{hook}Config": module for hook, module in HOOK_MODULES.items()},
    "NonFiniteError": "non_finite_guard",
    "OptimizerHook": "optimizer",
    "default_hooks": "metrics_logger",
    "summarize": "model_summary",
}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
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
    from robo_orchard_lab.pipeline.hooks.hook_profiler import HookProfiler as HookProfiler
    from robo_orchard_lab.pipeline.hooks.hook_profiler import (
        HookProfilerConfig as HookProfilerConfig,
    )
    from robo_orchard_lab.pipeline.hooks.keep_best import KeepBest as KeepBest
    from robo_orchard_lab.pipeline.hooks.keep_best import KeepBestConfig as KeepBestConfig
    from robo_orchard_lab.pipeline.hooks.log_images import LogImages as LogImages
    from robo_orchard_lab.pipeline.hooks.log_images import LogImagesConfig as LogImagesConfig
    from robo_orchard_lab.pipeline.hooks.log_images import SamplePredictions as SamplePredictions
    from robo_orchard_lab.pipeline.hooks.log_images import (
        SamplePredictionsConfig as SamplePredictionsConfig,
    )
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
    from robo_orchard_lab.pipeline.hooks.metrics_logger import default_hooks as default_hooks
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
    from robo_orchard_lab.pipeline.hooks.report import Report as Report
    from robo_orchard_lab.pipeline.hooks.report import ReportConfig as ReportConfig
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
    # The trainer needs few of the hooks; importing all of them would double its import time.
    __getattr__ = lazy_exports(__name__, _MODULE_OF)
