"""Give memory back that is kept for later."""

from __future__ import annotations

from accelerate.utils.memory import clear_device_cache
from pydantic import Field

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.trigger import TriggerField


class ClearCacheHook(PipelineHooks):
    """Empties the cache of the device's memory by a schedule: of CUDA, MPS, XPU or another.

    It frees what PyTorch keeps for later tensors, for other processes or against fragments; what
    is in use stays. It runs on every rank, waits for the device, and the memory has to be asked
    for anew afterwards, so do it seldom. The result of the training does not change.

    >>> hooks = PipelineHooks.from_hooks([ClearCacheHookConfig(every="1000 steps | 1 epoch")])
    >>> [channel for channel in ("on_step", "on_epoch") if len(hooks.get_channel(channel))]
    ['on_step', 'on_epoch']
    """

    keeps_trajectory = True

    def __init__(self, cfg: ClearCacheHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_at_commit(self._clear, cfg.every)

    def _clear(self, args: PipelineHookArgs) -> None:
        if args.exception is None:  # else the device may be what failed
            clear_device_cache(garbage_collection=self.cfg.collect_garbage)  # waits for the device


class ClearCacheHookConfig(PipelineHooksConfig[ClearCacheHook]):
    """When to clear the cache.

    >>> print(ClearCacheHookConfig().every)
    1 epoch
    """

    class_type: type[ClearCacheHook] = ClearCacheHook
    every: TriggerField = Field(default="1 epoch", description="When to do it.")
    collect_garbage: bool = Field(
        default=False,
        description="First let Python find unused objects that refer to each other, which may "
        "hold tensors; takes some 100 ms in a large program.",
    )
