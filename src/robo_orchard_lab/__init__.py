"""A hook-based training system for PyTorch and Accelerate."""

HOOK_MODULES = {
    "ClearCacheHook": "clear_cache",
    "EarlyStopping": "early_stopping",
    "EMA": "ema",
    "FreezeHook": "freeze",
    "GradientClippingHook": "gradient_clipping",
    "HookProfiler": "hook_profiler",
    "KeepBest": "keep_best",
    "LogImages": "log_images",
    "LossTracker": "loss_tracker",
    "MetricTracker": "metric_tracker",
    "MetricsLogger": "metrics_logger",
    "ModelSummary": "model_summary",
    "NonFiniteGuard": "non_finite_guard",
    "Preemption": "preemption",
    "ProgressBarHook": "progress_bar",
    "Report": "report",
    "SamplePredictions": "log_images",
    "SaveCheckpoint": "save_checkpoint",
    "SaveModel": "save_model",
    "StatsMonitor": "stats_monitor",
    "TimeLimit": "time_limit",
    "TorchProfilerHook": "torch_profiler",
    "ValidationHook": "validation",
}
"""Module in `robo_orchard_lab.pipeline.hooks` that defines each hook class.

The module also defines the hook's config, ``<class>Config``.
"""
