"""The hook that writes down what happens in a run."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName
from robo_orchard_lab.pipeline.requests import Request
from robo_orchard_lab.pipeline.trigger import AtSteps, Role

NAME = "hook test kit"


@dataclass(frozen=True, slots=True)
class Event:
    """A channel that is entered or left, outside of all hooks but the optimizer's."""

    channel: ChannelName
    role: Role
    epoch_id: int
    step_id: int
    global_step_id: int
    optimizer_step_id: int
    depth: int
    """How many channels are open around it."""
    error: str | None
    """The error that is on its way out of the scope, or None."""

    def __str__(self) -> str:
        counters = self.epoch_id, self.step_id, self.global_step_id, self.optimizer_step_id
        error = f" {self.error}" if self.error else ""
        return f"{self.role} {self.channel} {' '.join(map(str, counters))}{error}"


@dataclass(frozen=True, slots=True)
class MadeRequest:
    """Something that a hook has asked of the trainer."""

    step: int
    """How many steps of the run were done, the one that was open included."""
    request: Request

    @property
    def kind(self) -> str:
        """``stop``, ``evaluate``, ``save_weights`` or ``log``."""
        words = re.findall("[A-Z][a-z]*", type(self.request).__name__.removesuffix("Request"))
        return "_".join(words).lower()

    @property
    def by(self) -> str:
        """Who asked."""
        return self.request.by

    @property
    def reason(self) -> str:
        """Why."""
        return self.request.reason

    def __str__(self) -> str:
        return f"{self.kind} at step {self.step}, asked by {self.by}: {self.reason}"


class Recorder(PipelineHooks):
    """Writes down events, requests, metrics, losses and weights; reads nothing from the device.

    Args:
        log_every: the schedule of the logging points it asks for, or None.
        stop_after: ask to stop after this many steps of the run, or None.
    """

    def __init__(self, log_every: str | None, stop_after: int | None) -> None:
        super().__init__(NAME)
        self.events: list[Event] = []
        self.requests: list[MadeRequest] = []
        self.records: list[MetricsRecord] = []
        self.losses: list[torch.Tensor] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self._depth = 0
        self._handles: list[RemovableHandle] = []
        self.register_hook("on_loop", HookContext.from_callable(self._listen, self._unlisten))
        for channel in CHANNEL_NAMES:
            self.register_hook(channel, self._recording(channel))
        self.register_hook(
            "on_step", HookContext.from_callable(self._keep_weights, self._keep_loss)
        )
        if log_every is not None:
            self.register_at_commit(self._log, log_every)
        if stop_after is not None:
            stop = HookContext.from_callable(after=self._stop)
            self.register_hook("on_step", stop, AtSteps({stop_after}))

    def _listen(self, args: PipelineHookArgs) -> None:
        def keep(request: Request) -> None:
            if request.by != NAME:
                self.requests.append(MadeRequest(args.progress.steps_done, request))

        self._handles = [args.requests.listen(keep), args.metrics.listen(self.records.append)]

    def _unlisten(self, args: PipelineHookArgs) -> None:
        for handle in self._handles:
            handle.remove()

    def _recording(self, channel: ChannelName) -> HookContext[PipelineHookArgs]:
        def before(args: PipelineHookArgs) -> None:
            self._write("before", channel, args)
            self._depth += 1

        def after(args: PipelineHookArgs) -> None:
            self._depth -= 1
            self._write("after", channel, args)

        return HookContext.from_callable(before, after)

    def _write(self, role: Role, channel: ChannelName, args: PipelineHookArgs) -> None:
        counters = args.epoch_id, args.step_id, args.global_step_id, args.optimizer_step_id
        error = None if args.exception is None else repr(args.exception)
        self.events.append(Event(channel, role, *counters, self._depth, error))

    def _keep_weights(self, args: PipelineHookArgs) -> None:
        self.weights.append(copied_state(args.model))

    def _keep_loss(self, args: PipelineHookArgs) -> None:
        if args.loss is not None:
            self.losses.append(args.loss)

    def _log(self, args: PipelineHookArgs) -> None:
        args.requests.log("the test looks at the metrics", by=NAME)

    def _stop(self, args: PipelineHookArgs) -> None:
        args.requests.stop("the test interrupts the run", by=NAME)


def copied_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of now, by name."""
    state = model.state_dict().items()
    return {name: v.detach().clone() for name, v in state if isinstance(v, torch.Tensor)}
