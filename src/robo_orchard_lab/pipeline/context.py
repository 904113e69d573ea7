"""What hooks are given."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from robo_orchard_lab.pipeline.events import CHANNEL_NAMES, ChannelName
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.progress import TrainerLimits, TrainerProgress
from robo_orchard_lab.pipeline.requests import Requests

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

_IN_STEP: tuple[ChannelName, ...] = (
    "on_step",
    "on_batch",
    "on_model_forward",
    "on_model_backward",
    "on_optimizer_step",
)


def _valid_in(*channels: ChannelName) -> dict[str, tuple[ChannelName, ...]]:
    return {"channels": channels}


@dataclass(slots=True, eq=False, repr=False)
class PipelineHookArgs:
    """What every hook is called with: one object for one scope of work.

    All channels of a step share one object; the loop and each epoch have their own. The counters
    are those of :class:`TrainerProgress` at the time of reading. Hooks read; of what they set,
    only changes to the batch in place and to the model mean anything.
    Fields that belong to some channels only hold their default elsewhere;
    :meth:`channels_of` says which.
    """

    progress: TrainerProgress = field(default_factory=TrainerProgress)
    # The trainer sets the next three always; only arguments made by hand may lack them.
    limits: TrainerLimits = None  # type: ignore[assignment]  # see above
    accelerator: Accelerator = None  # type: ignore[assignment]  # see above
    model: torch.nn.Module = None  # type: ignore[assignment]  # see above
    """As prepared: moved to its device, wrapped for several processes."""
    optimizer: torch.optim.Optimizer | None = None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    dataloader: Any = None
    metrics: MetricsBoard = field(default_factory=MetricsBoard)
    requests: Requests = field(default_factory=Requests)

    exception: BaseException | None = None
    """In an ``after``: the error that is on its way out of the scope, or None."""

    batch: Any = field(default=None, metadata=_valid_in(*_IN_STEP))
    """The batch, on the accelerator's device."""
    at_accumulation_boundary: bool = field(default=False, metadata=_valid_in(*_IN_STEP))
    """Whether this step ends an accumulation window, so that an update is due."""
    model_outputs: Any = field(default=None, metadata=_valid_in(*_IN_STEP))
    """What the batch processor returned; set when the forward body is over."""
    loss: torch.Tensor | None = field(default=None, metadata=_valid_in(*_IN_STEP))
    """This rank's loss of this batch, detached, not divided for accumulation, on its device (to
    read it as a number waits for the device); set when the forward body is over."""
    update_committed: bool | None = field(
        default=None, metadata=_valid_in("on_optimizer_step", "on_step")
    )
    """Whether the update changed the weights (True) or was skipped (False); None before it."""
    epoch_completed: bool = field(default=False, metadata=_valid_in("on_epoch"))
    """In ``after``: whether the data was passed over to its end."""

    @property
    def epoch_id(self) -> int:
        """The epoch, from 0."""
        return self.progress.epoch_id

    @property
    def step_id(self) -> int:
        """The step in the epoch, from 0."""
        return self.progress.step_id

    @property
    def global_step_id(self) -> int:
        """The step in the run, from 0."""
        return self.progress.global_step_id

    @property
    def optimizer_step_id(self) -> int:
        """How many updates have been committed."""
        return self.progress.optimizer_step_id

    @property
    def max_step(self) -> int | None:
        """The limit in steps, or None."""
        return self.limits.max_step

    @property
    def max_optimizer_step(self) -> int | None:
        """The limit in committed updates, or None."""
        return self.limits.max_optimizer_step

    @property
    def max_epoch(self) -> int | None:
        """The limit in epochs, or None."""
        return self.limits.max_epoch

    @classmethod
    def channels_of(cls, name: str) -> tuple[ChannelName, ...]:
        """The channels in which a field has a meaning.

        >>> PipelineHookArgs.channels_of("epoch_completed")
        ('on_epoch',)
        """
        for declared in fields(cls):
            if declared.name == name:
                channels: tuple[ChannelName, ...] = declared.metadata.get("channels", CHANNEL_NAMES)
                return channels
        raise AttributeError(f"{cls.__name__} has no field {name!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.progress}>"
