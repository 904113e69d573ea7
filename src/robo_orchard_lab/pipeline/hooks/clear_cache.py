"""Hook that empties the device's memory cache."""

from __future__ import annotations

from accelerate.utils.memory import clear_device_cache
from pydantic import Field

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.trigger import TriggerField


class ClearCacheHook(PipelineHooks):
    """Emptying of the device's memory cache (CUDA, MPS, XPU, ...) on a trigger.

    PyTorch keeps freed memory for later tensors. Emptying the cache returns the memory to the
    device. Tensors in use are not touched, and the results of training do not change.

    Use the hook if other processes share the device, or if ``torch.cuda.memory_reserved()`` grows
    far above ``torch.cuda.memory_allocated()``, for example with batches of varying shapes. An
    out-of-memory error alone is no reason: PyTorch empties its cache before raising the error.

    >>> hooks = PipelineHooks.from_hooks([ClearCacheHookConfig(every="1000 steps | 1 epoch")])
    >>> [channel for channel in ("on_step", "on_epoch") if len(hooks.get_channel(channel))]
    ['on_step', 'on_epoch']

    - Ranks: all.
    - State: none.
    - Cost: one device sync each time, and slower allocations afterwards. Choose a rare trigger.
    """

    keeps_trajectory = True
    reads = ()
    changes = ("device cache",)
    requests = ()

    def __init__(self, cfg: ClearCacheHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_at_commit(self._clear, cfg.every)

    def _clear(self, args: PipelineHookArgs) -> None:
        if args.exception is None:  # the device itself may have failed
            clear_device_cache(garbage_collection=self.cfg.collect_garbage)  # device sync


class ClearCacheHookConfig(PipelineHooksConfig[ClearCacheHook]):
    """Trigger and extent of clearing the cache.

    >>> print(ClearCacheHookConfig().every)
    1 epoch
    """

    class_type: type[ClearCacheHook] = ClearCacheHook
    every: TriggerField = Field(
        default="1 epoch", description="Trigger, such as '1000 steps' or '10 min'."
    )
    collect_garbage: bool = Field(
        default=False,
        description="Run Python's garbage collector first, which frees tensors in reference "
        "cycles; costs about 100 ms in a large program.",
    )
