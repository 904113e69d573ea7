"""The hooks that come with the system, one file each."""

from robo_orchard_lab.pipeline.hooks.gradient_clipping import (
    GradientClippingHook,
    GradientClippingHookConfig,
)
from robo_orchard_lab.pipeline.hooks.optimizer import OptimizerHook
from robo_orchard_lab.pipeline.hooks.progress_bar import ProgressBarHook, ProgressBarHookConfig

__all__ = [
    "GradientClippingHook",
    "GradientClippingHookConfig",
    "OptimizerHook",
    "ProgressBarHook",
    "ProgressBarHookConfig",
]
