"""Public imports for writing hooks."""

from robo_orchard_core.utils.hook import HookContext, RemovableHandle, RemoveableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.progress import ChannelName
from robo_orchard_lab.pipeline.trigger import Schedule, ScheduleField, Trigger, TriggerField

__all__ = [
    "ChannelName",
    "HookContext",
    "PipelineHookArgs",
    "PipelineHooks",
    "PipelineHooksConfig",
    "RemovableHandle",
    "RemoveableHandle",
    "Schedule",
    "ScheduleField",
    "Trigger",
    "TriggerField",
]
