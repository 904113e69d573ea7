"""Run of hooks on a tiny model, and the recorder of its events, requests and metrics."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName, TrainerProgress
from robo_orchard_lab.pipeline.requests import Request
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.pipeline.trigger import AtSteps, Role
from robo_orchard_lab.testing.counting import TracedCall, count_host_reads
from robo_orchard_lab.testing.fixtures import (
    HookSource,
    RunSetting,
    as_sources,
    build_hooks,
    build_training,
    isolated,
    with_defaults,
)

RECORDER = "hook test kit"


@dataclass(frozen=True, slots=True)
class Event:
    """Entry or exit of a channel, outside all hooks but the optimizer's.

    Attributes:
        depth: Number of enclosing open channels.
        error: The error that propagates through the scope, or None.
    """

    channel: ChannelName
    role: Role
    epoch_id: int
    step_id: int
    global_step_id: int
    optimizer_step_id: int
    depth: int
    error: str | None

    def __str__(self) -> str:
        counters = self.epoch_id, self.step_id, self.global_step_id, self.optimizer_step_id
        error = f" {self.error}" if self.error else ""
        return f"{self.role} {self.channel} {' '.join(map(str, counters))}{error}"


@dataclass(frozen=True, slots=True)
class MadeRequest:
    """Request of a hook to the trainer."""

    step: int
    """Number of steps done, including the current step."""
    request: Request

    @property
    def kind(self) -> str:
        """``stop``, ``evaluate``, ``save_weights`` or ``log``."""
        words = re.findall("[A-Z][a-z]*", type(self.request).__name__.removesuffix("Request"))
        return "_".join(words).lower()

    @property
    def by(self) -> str:
        """Name of the hook."""
        return self.request.by

    @property
    def reason(self) -> str:
        """Reason of the request."""
        return self.request.reason

    def __str__(self) -> str:
        return f"{self.kind} at step {self.step}, requested by {self.by}: {self.reason}"


@dataclass(frozen=True, slots=True)
class HookRun:
    """Result of a test run.

    Attributes:
        hooks: The tested hooks in their final state.
        progress: The final counters.
        events: Entries and exits of all channels.
        requests: Requests of hooks in order of time.
        records: Metrics of each logging point, and of the end of the run.
        losses: The loss of each step.
        model: The trained model.
        weights_by_step: Parameters and buffers by name, before each step and at the end.
        next_random_numbers: Next number of the global generators after the run, by library.
        host_reads: Reads of tensor values, if they were counted.
        states_at_start: States of the hooks after loading a checkpoint; None without one.
    """

    hooks: tuple[PipelineHooks, ...]
    progress: TrainerProgress
    events: tuple[Event, ...]
    requests: tuple[MadeRequest, ...]
    records: tuple[MetricsRecord, ...]
    losses: tuple[float, ...]
    model: torch.nn.Module
    weights_by_step: tuple[dict[str, torch.Tensor], ...]
    next_random_numbers: dict[str, float]
    host_reads: tuple[TracedCall, ...] | None
    states_at_start: dict[str, Any] | None

    @property
    def hook(self) -> PipelineHooks:
        """The tested hook.

        Raises:
            ValueError: the run had several hooks, or none.
        """
        if len(self.hooks) != 1:
            raise ValueError(f"the run had {len(self.hooks)} hooks: see run.hooks")
        return self.hooks[0]

    @property
    def metrics(self) -> dict[str, dict[int, float]]:
        """Logged values by name and step; the last value if a step was logged twice."""
        by_name: dict[str, dict[int, float]] = {}
        for record in self.records:
            for value in record.values:
                by_name.setdefault(value.name, {})[value.step] = value.value
        return by_name

    @property
    def trace(self) -> list[str]:
        """Events as lines, indented by depth.

        A line is ``before|after channel epoch step global_step optimizer_step``, followed by the
        error that propagates, if any.
        """
        return ["  " * event.depth + str(event) for event in self.events]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Final parameters and buffers by name."""
        return self.weights_by_step[-1]


def run_hook(hook: HookSource | Iterable[HookSource], **setting: Unpack[RunSetting]) -> HookRun:
    """Train a tiny model with one or several hooks and return the result.

    >>> from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
    >>> run = run_hook(GradientClippingHookConfig(max_norm=1.0), steps=4, accumulate=2)
    >>> list(run.metrics["grad_norm"])
    [2, 4]
    >>> run.progress.optimizer_step_id, run.requests
    (2, ())

    Uses a real trainer and a real ``Accelerator`` on the CPU. Runs with equal settings are equal;
    RNG states and Accelerate's process-wide state are restored afterwards.

    Args:
        hook: a hook, its config or a function that returns either; or several of these.
        **setting: see :class:`RunSetting`.

    Raises:
        TypeError: ``hook`` is no hook source, or a setting is unknown.
        Exception: any error of the hook, with notes that name its location.
    """
    return train(as_sources(hook), with_defaults(setting))


def train(
    hooks: Iterable[HookSource],
    setting: RunSetting,
    *,
    has_more_runs: bool = False,
    stop_after: int | None = None,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    counts_reads: bool = False,
) -> HookRun:
    """Run hooks once with complete settings.

    Args:
        hooks: sources of the tested hooks.
        setting: complete settings.
        has_more_runs: the hooks are run several times: refuse hook objects.
        stop_after: number of steps after which to request a stop.
        save_to: path of a checkpoint to save afterwards.
        resume_from: path of a checkpoint to resume from.
        counts_reads: record reads of tensor values.
    """
    recorder = Recorder(setting["log_every"], stop_after)
    with isolated(setting["seed"]):
        training = build_training(setting)
        tested = build_hooks(hooks, has_more_runs)
        trainer = HookBasedTrainer(
            *training,
            hooks=[recorder, *tested, *build_hooks(setting["extra_hooks"], has_more_runs)],
            max_step=setting["steps"],
            max_optimizer_step=setting["optimizer_steps"],
            max_epoch=setting["epochs"],
            resume_from=resume_from,
        )
        states = None if resume_from is None else hook_states(tested)
        with count_host_reads() if counts_reads else nullcontext() as reads:
            trainer()
        if save_to is not None:
            trainer.save_checkpoint(save_to)
        weights = [*recorder.weights, _copy_of_state(trainer.model)]
        random_numbers = {
            "torch": torch.rand(()).item(),
            "NumPy": float(np.random.rand()),
            "Python": random.random(),
        }
    return HookRun(
        tested,
        trainer.progress,
        tuple(recorder.events),
        tuple(recorder.made),
        tuple(recorder.records),
        tuple(float(loss) for loss in recorder.losses),
        trainer.model,
        tuple(weights),
        random_numbers,
        None if reads is None else tuple(reads),
        states,
    )


def hook_states(hooks: Iterable[PipelineHooks]) -> dict[str, Any]:
    """Return copies of the states of hooks and their nested hooks by name."""
    bundles = (bundle for hook in hooks for bundle in (hook, *hook.all_hooks()))
    return {bundle.name: copy.deepcopy(bundle.state_dict()) for bundle in bundles}


class Recorder(PipelineHooks):
    """Recording hook for events, requests, metrics, losses and weights, without a device sync.

    Args:
        log_every: trigger of the logging points to request, or None.
        stop_after: number of steps after which to request a stop, or None.
    """

    def __init__(self, log_every: str | None, stop_after: int | None) -> None:
        super().__init__(RECORDER)
        self.events: list[Event] = []
        self.made: list[MadeRequest] = []
        self.records: list[MetricsRecord] = []
        self.losses: list[torch.Tensor] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self._depth = 0
        make = HookContext.from_callable
        self.register_hook("on_loop", make(before=self._listen))
        for channel in CHANNEL_NAMES:
            self.register_hook(channel, self._event_recorder(channel))
        self.register_hook(
            "on_step",
            make(lambda args: self.weights.append(_copy_of_state(args.model)), self._keep_loss),
        )
        if log_every is not None:
            reason = "the test reads the metrics"
            self.register_at_commit(lambda args: args.requests.log(reason, by=RECORDER), log_every)
        if stop_after is not None:
            why = "the test interrupts the run"
            stop: HookContext[PipelineHookArgs] = make(
                after=lambda args: args.requests.stop(why, by=RECORDER)
            )
            self.register_hook("on_step", stop, AtSteps({stop_after}))

    def _listen(self, args: PipelineHookArgs) -> None:
        def keep(request: Request) -> None:
            if request.by != RECORDER:
                self.made.append(MadeRequest(args.progress.steps_done, request))

        args.requests.listen(keep)
        args.metrics.listen(self.records.append)

    def _event_recorder(self, channel: ChannelName) -> HookContext[PipelineHookArgs]:
        def record(role: Role, args: PipelineHookArgs) -> None:
            self._depth -= role == "after"
            counters = args.epoch_id, args.step_id, args.global_step_id, args.optimizer_step_id
            error = None if args.exception is None else repr(args.exception)
            self.events.append(Event(channel, role, *counters, self._depth, error))
            self._depth += role == "before"

        return HookContext.from_callable(partial(record, "before"), partial(record, "after"))

    def _keep_loss(self, args: PipelineHookArgs) -> None:
        if args.loss is not None:
            self.losses.append(args.loss)


def _copy_of_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict().items()
    return {name: v.detach().clone() for name, v in state if isinstance(v, torch.Tensor)}
