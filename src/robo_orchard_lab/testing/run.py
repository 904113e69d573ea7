"""Running hooks on a tiny model."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.testing.counting import TracedCall, count_host_reads
from robo_orchard_lab.testing.fixtures import (
    HookSource,
    RunSetting,
    build_hooks,
    build_training,
    completed,
    isolated,
    listed,
)
from robo_orchard_lab.testing.recorder import Event, MadeRequest, Recorder, copied_state


@dataclass(frozen=True, slots=True)
class HookRun:
    """What came of a run."""

    hooks: tuple[PipelineHooks, ...]
    """Those that were tested, as they are after the run."""
    progress: TrainerProgress
    """The counters at the end."""
    events: tuple[Event, ...]
    """Every channel that was entered and left."""
    requests: tuple[MadeRequest, ...]
    """What hooks asked of the trainer, in the order in which they did."""
    records: tuple[MetricsRecord, ...]
    """What each logging point found, and at the end the rest."""
    losses: tuple[float, ...]
    """The loss of each step."""
    model: torch.nn.Module
    """The trained model."""
    weights_by_step: tuple[dict[str, torch.Tensor], ...]
    """Parameters and buffers by name, at the start of each step and at the end of the run."""
    drawn_next: tuple[float, ...] = ()
    """What torch's, NumPy's and Python's global generators give after the run."""
    host_reads: tuple[TracedCall, ...] | None = None
    """What was read from tensors, where that was counted."""
    states_at_start: dict[str, Any] | None = None
    """The states of the hooks as they came from a saved run, if the run went on from one."""

    @property
    def hook(self) -> PipelineHooks:
        """The hook that was tested.

        Raises:
            ValueError: there were several, or none.
        """
        if len(self.hooks) != 1:
            raise ValueError(f"the run had {len(self.hooks)} hooks: see run.hooks")
        return self.hooks[0]

    @property
    def metrics(self) -> dict[str, dict[int, float]]:
        """What was published and logged: each name's values by the step that they belong to.

        Where a logging point told a name twice for one step, the later value.
        """
        by_name: dict[str, dict[int, float]] = {}
        for record in self.records:
            for value in record.values:
                by_name.setdefault(value.name, {})[value.step] = value.value
        return by_name

    @property
    def trace(self) -> list[str]:
        """The events as lines, indented by the channels that are open.

        Each is ``before|after channel epoch step global_step optimizer_step``; an after that sees
        an error ends with it.
        """
        return ["  " * event.depth + str(event) for event in self.events]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers at the end, by name."""
        return self.weights_by_step[-1]


def run_hook(hook: HookSource | Iterable[HookSource], **setting: Unpack[RunSetting]) -> HookRun:
    """Train a tiny model with a hook, or with several, and give what came of it.

    >>> from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
    >>> run = run_hook(GradientClippingHookConfig(max_norm=1.0), steps=4, accumulate=2)
    >>> list(run.metrics["grad_norm"])
    [2, 4]
    >>> run.progress.optimizer_step_id, run.requests
    (2, ())

    It is a real trainer and a real ``Accelerator`` on the CPU. Each run of one setting is the
    same; the random states and what Accelerate keeps for the process are afterwards as they were.

    Args:
        hook: a hook, its configuration or a function that makes either; or several of these.
        **setting: see :class:`RunSetting`.

    Raises:
        TypeError: it is no hook, or there is no such setting.
        Exception: whatever the hook raises, with notes that say where.
    """
    return train(listed(hook), completed(setting))


def train(
    hooks: Iterable[HookSource],
    setting: RunSetting,
    *,
    again: bool = False,
    stop_after: int | None = None,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    count_reads: bool = False,
) -> HookRun:
    """One run of a setting that is complete.

    Args:
        hooks: those that are tested.
        setting: with all of its defaults.
        again: whether there are other runs, so that each needs hooks of its own.
        stop_after: ask to stop after this step of the run.
        save_to: save a checkpoint here afterwards.
        resume_from: go on from a checkpoint.
        count_reads: record what is read from tensors.
    """
    recorder = Recorder(setting["log_every"], stop_after)
    with isolated(setting["seed"]):
        training = build_training(setting)
        tested = build_hooks(hooks, again)
        trainer = HookBasedTrainer(
            *training,
            hooks=[recorder, *tested, *build_hooks(setting["beside"], again)],
            max_step=setting["steps"],
            max_optimizer_step=setting["optimizer_steps"],
            max_epoch=setting["epochs"],
            resume_from=resume_from,
        )
        states = None if resume_from is None else states_of(tested)
        with count_host_reads() if count_reads else nullcontext() as reads:
            trainer()
        if save_to is not None:
            trainer.save_checkpoint(save_to)
        weights = [*recorder.weights, copied_state(trainer.model)]
        drawn = (torch.rand(()).item(), float(np.random.rand()), random.random())
    return HookRun(
        tested,
        trainer.progress,
        tuple(recorder.events),
        tuple(recorder.requests),
        tuple(recorder.records),
        tuple(float(loss) for loss in recorder.losses),
        trainer.model,
        tuple(weights),
        drawn,
        None if reads is None else tuple(reads),
        states,
    )


def states_of(hooks: Iterable[PipelineHooks]) -> dict[str, Any]:
    """Copies of the hooks' states, and of those in them, by name."""
    named = (bundle for hook in hooks for bundle in (hook, *hook.all_hooks()))
    return {bundle.name: copy.deepcopy(bundle.state_dict()) for bundle in named}
