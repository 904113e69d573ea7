"""The channels of a training run and how they nest, as data.

Each channel is a scope that hooks attach to. One run opens them like this::

    on_loop
      on_epoch
        for each batch:
          on_step
            on_batch
              on_model_forward
              on_model_backward      only when the processor needs backward
            on_optimizer_step        only at an accumulation boundary
          commit point: progress has advanced, requests are decided
        commit point: the epoch counter has advanced
      on_evaluation                  around each evaluation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

ChannelName: TypeAlias = Literal[
    "on_loop",
    "on_epoch",
    "on_step",
    "on_batch",
    "on_model_forward",
    "on_model_backward",
    "on_optimizer_step",
    "on_evaluation",
]


@dataclass(frozen=True, slots=True)
class PipelineChannel:
    """One scope of a run."""

    name: ChannelName
    parent: ChannelName | None
    """The channel that is open around it; None for the outermost."""
    around: str
    """What its hooks run around."""


PIPELINE_CHANNELS: tuple[PipelineChannel, ...] = (
    PipelineChannel("on_loop", None, "one call of the trainer"),
    PipelineChannel("on_epoch", "on_loop", "one pass over the data"),
    PipelineChannel("on_step", "on_epoch", "one batch, from the data loader to the update"),
    PipelineChannel("on_batch", "on_step", "forward and backward of one batch"),
    PipelineChannel("on_model_forward", "on_batch", "the batch processor's forward"),
    PipelineChannel("on_model_backward", "on_batch", "the backward pass"),
    PipelineChannel("on_optimizer_step", "on_step", "one update of the weights"),
    PipelineChannel("on_evaluation", "on_loop", "one evaluation"),
)
"""Every channel, outermost first, in the order in which a run first opens them."""

CHANNEL_NAMES: tuple[ChannelName, ...] = tuple(channel.name for channel in PIPELINE_CHANNELS)
