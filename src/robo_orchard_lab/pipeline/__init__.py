"""Training pipeline: the trainer, its hooks, triggers, data, metrics and checkpoints."""

from robo_orchard_lab.pipeline.batch_processor import (
    BatchProcessor,
    NamedSteps,
    SimpleBatchProcessor,
    SupervisedProcessor,
)
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.shutdown import init_process_group_after_restart
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.progress import (
    CHANNEL_NAMES,
    PIPELINE_CHANNELS,
    ChannelName,
    TrainerLimits,
    TrainerProgress,
)
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer, SimpleTrainer
from robo_orchard_lab.pipeline.trigger import (
    AtSteps,
    EveryEpochs,
    EveryOptimizerSteps,
    EverySeconds,
    EverySteps,
    First,
    Last,
    Schedule,
    ScheduleField,
    Trigger,
    TriggerField,
)

__all__ = [
    "CHANNEL_NAMES",
    "PIPELINE_CHANNELS",
    "AtSteps",
    "BatchProcessor",
    "ChannelName",
    "EveryEpochs",
    "EveryOptimizerSteps",
    "EverySeconds",
    "EverySteps",
    "First",
    "HookBasedTrainer",
    "Last",
    "NamedSteps",
    "PipelineHookArgs",
    "PipelineHooks",
    "PipelineHooksConfig",
    "RunPath",
    "Schedule",
    "ScheduleField",
    "SimpleBatchProcessor",
    "SimpleTrainer",
    "SupervisedProcessor",
    "TrainerLimits",
    "TrainerProgress",
    "Trigger",
    "TriggerField",
    "init_process_group_after_restart",
]
