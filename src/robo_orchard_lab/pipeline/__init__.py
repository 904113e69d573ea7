"""Training pipeline: the trainer, its hooks, triggers, data, metrics and checkpoints.

Names are imported on first use: modules without torch stay usable without torch.
"""

from typing import TYPE_CHECKING

from robo_orchard_core.utils.lazy_exports import lazy_exports

_MODULE_OF = {
    "AtSteps": "trigger",
    "BatchProcessor": "batch_processor",
    "CHANNEL_NAMES": "progress",
    "ChannelName": "progress",
    "EveryEpochs": "trigger",
    "EveryOptimizerSteps": "trigger",
    "EverySeconds": "trigger",
    "EverySteps": "trigger",
    "First": "trigger",
    "HookBasedTrainer": "trainer",
    "Last": "trigger",
    "NamedSteps": "batch_processor",
    "PIPELINE_CHANNELS": "progress",
    "PipelineHookArgs": "context",
    "PipelineHooks": "hook_set",
    "PipelineHooksConfig": "hook_set",
    "RunPath": "run.run_path",
    "Schedule": "trigger",
    "ScheduleField": "trigger",
    "SimpleBatchProcessor": "batch_processor",
    "SimpleTrainer": "trainer",
    "SupervisedProcessor": "batch_processor",
    "TrainerLimits": "progress",
    "TrainerProgress": "progress",
    "Trigger": "trigger",
    "TriggerField": "trigger",
    "init_process_group_after_restart": "distributed.shutdown",
}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from robo_orchard_lab.pipeline.batch_processor import BatchProcessor as BatchProcessor
    from robo_orchard_lab.pipeline.batch_processor import NamedSteps as NamedSteps
    from robo_orchard_lab.pipeline.batch_processor import (
        SimpleBatchProcessor as SimpleBatchProcessor,
    )
    from robo_orchard_lab.pipeline.batch_processor import SupervisedProcessor as SupervisedProcessor
    from robo_orchard_lab.pipeline.context import PipelineHookArgs as PipelineHookArgs
    from robo_orchard_lab.pipeline.distributed.shutdown import (
        init_process_group_after_restart as init_process_group_after_restart,
    )
    from robo_orchard_lab.pipeline.hook_set import PipelineHooks as PipelineHooks
    from robo_orchard_lab.pipeline.hook_set import PipelineHooksConfig as PipelineHooksConfig
    from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES as CHANNEL_NAMES
    from robo_orchard_lab.pipeline.progress import PIPELINE_CHANNELS as PIPELINE_CHANNELS
    from robo_orchard_lab.pipeline.progress import ChannelName as ChannelName
    from robo_orchard_lab.pipeline.progress import TrainerLimits as TrainerLimits
    from robo_orchard_lab.pipeline.progress import TrainerProgress as TrainerProgress
    from robo_orchard_lab.pipeline.run.run_path import RunPath as RunPath
    from robo_orchard_lab.pipeline.trainer import HookBasedTrainer as HookBasedTrainer
    from robo_orchard_lab.pipeline.trainer import SimpleTrainer as SimpleTrainer
    from robo_orchard_lab.pipeline.trigger import AtSteps as AtSteps
    from robo_orchard_lab.pipeline.trigger import EveryEpochs as EveryEpochs
    from robo_orchard_lab.pipeline.trigger import EveryOptimizerSteps as EveryOptimizerSteps
    from robo_orchard_lab.pipeline.trigger import EverySeconds as EverySeconds
    from robo_orchard_lab.pipeline.trigger import EverySteps as EverySteps
    from robo_orchard_lab.pipeline.trigger import First as First
    from robo_orchard_lab.pipeline.trigger import Last as Last
    from robo_orchard_lab.pipeline.trigger import Schedule as Schedule
    from robo_orchard_lab.pipeline.trigger import ScheduleField as ScheduleField
    from robo_orchard_lab.pipeline.trigger import Trigger as Trigger
    from robo_orchard_lab.pipeline.trigger import TriggerField as TriggerField
else:
    __getattr__ = lazy_exports(__name__, _MODULE_OF)
