"""Small, isolated training on the CPU for tests of hooks."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypedDict

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.pipeline.batch_processor import BatchProcessor, SimpleBatchProcessor
from robo_orchard_lab.pipeline.checkpoint import capture_random_state, restore_random_state
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer

HookSource: TypeAlias = (
    PipelineHooks
    | PipelineHooksConfig[PipelineHooks]
    | Callable[[], PipelineHooks | PipelineHooksConfig[PipelineHooks]]
)
"""A hook, its config, or a function that returns either. A function that runs a hook several times
accepts only a config or a function."""


class RunSetting(TypedDict, total=False):
    """Settings of a test run; each has a small default, and each run starts from one seed."""

    steps: int | None
    """Maximum number of batches; 6 by default, if no other limit is set."""
    epochs: int | None
    """Maximum number of epochs."""
    optimizer_steps: int | None
    """Maximum number of committed updates."""
    accumulate: int
    """Batches per update; 1 by default."""
    model: torch.nn.Module | Callable[[], torch.nn.Module]
    """A module, which is copied for each run, or a function that returns a module. The default has
    a linear layer, dropout and another linear layer, from 4 features to 2."""
    data: Iterable[Any] | Callable[[], Iterable[Any]]
    """An iterable of batches, or a function that returns an iterable: for data that can be read
    once, or that has its own random generator. The default has 4 batches of 4 samples, shuffled:
    random features and targets."""
    batch_processor: BatchProcessor
    """The default computes the mean squared error of ``model(features)``."""
    optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
    """Function from parameters to an optimizer; SGD with momentum by default."""
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None
    """Function from an optimizer to an LR scheduler; None by default."""
    extra_hooks: Sequence[HookSource]
    """Other hooks, registered after the tested hooks, such as a hook that publishes a metric."""
    log_every: str | None
    """Trigger of logging points; each step and epoch by default. With None, only the logging
    points that a hook requests. Unlogged metrics are recorded when the run ends."""
    seed: int
    """Seed of torch, NumPy and Python; 0 by default."""


class Training(NamedTuple):
    """First arguments of a trainer, in order."""

    accelerator: Accelerator
    model: torch.nn.Module
    dataloader: Iterable[Any]
    batch_processor: BatchProcessor
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None


def _tiny_model() -> torch.nn.Module:
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers)


def _tiny_data() -> Iterable[Any]:
    # Shuffled by torch's global generator: a hook that uses the generator changes the order.
    dataset = TensorDataset(torch.randn(16, 4), torch.randn(16, 2))
    return DataLoader(dataset, batch_size=4, shuffle=True)


def _squared_error(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    features, targets = batch
    outputs = model(features)
    return outputs, torch.nn.functional.mse_loss(outputs, targets)


_DEFAULTS: RunSetting = {
    "steps": None,
    "epochs": None,
    "optimizer_steps": None,
    "accumulate": 1,
    "model": _tiny_model,
    "data": _tiny_data,
    "batch_processor": SimpleBatchProcessor.from_callable(_squared_error),
    "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "lr_scheduler": None,
    "extra_hooks": (),
    "log_every": "1 step | 1 epoch",
    "seed": 0,
}
_LIMITS = ("steps", "epochs", "optimizer_steps")
_RENAMED = {"beside": "extra_hooks"}


def with_defaults(setting: RunSetting) -> RunSetting:
    """Return the settings with all defaults.

    Raises:
        TypeError: a setting is unknown.
    """
    for name in setting:
        if name not in _DEFAULTS:
            advice = suggest_name(name, [*_DEFAULTS], "expected one of")
            if name in _RENAMED:
                advice = f"its new name is {_RENAMED[name]!r}"
            raise TypeError(f"there is no setting {name!r}; {advice}")
    full: RunSetting = {**_DEFAULTS, **setting}
    if all(setting.get(limit) is None for limit in _LIMITS):
        full["steps"] = 6
    return full


def build_training(setting: RunSetting) -> Training:
    """Build accelerator, model, data and optimizer from complete settings."""
    model, data, processor = setting["model"], setting["data"], setting["batch_processor"]
    model = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model()
    optimizer = setting["optimizer"](model.parameters()) if processor.need_backward else None
    make_lr_scheduler = setting["lr_scheduler"]
    return Training(
        Accelerator(cpu=True, gradient_accumulation_steps=setting["accumulate"]),
        model,
        data() if callable(data) else data,
        processor,
        optimizer,
        None if make_lr_scheduler is None or optimizer is None else make_lr_scheduler(optimizer),
    )


def build_example(run_folder: Path, resume_from: Any) -> HookBasedTrainer:
    """Build the example trainer of :func:`prove_resume`: two epochs of four steps, with dropout."""
    seed_all(0)
    return HookBasedTrainer(
        *build_training(with_defaults({})),
        hooks=[],
        max_epoch=2,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def as_sources(hooks: HookSource | Iterable[HookSource]) -> tuple[HookSource, ...]:
    """Return a tuple of one or several hook sources."""
    if isinstance(hooks, PipelineHooks | PipelineHooksConfig) or callable(hooks):
        return (hooks,)
    return tuple(hooks)


def build_hooks(sources: Iterable[HookSource], must_be_new: bool) -> tuple[PipelineHooks, ...]:
    """Build the hooks of one run; refuse hook objects, which only one run can use, if required."""
    built: list[PipelineHooks] = []
    for source in sources:
        if isinstance(source, PipelineHooks) and must_be_new:
            function = f"lambda: {type(source).__name__}(...)"
            raise TypeError(
                f"hook {source.name!r} runs several times, each time as a new object: expected its "
                f"config or a function that returns it, such as {function}"
            )
        is_hook = isinstance(source, PipelineHooks)
        made: Any = source() if callable(source) and not is_hook else source
        if isinstance(made, PipelineHooksConfig):
            made = made()
        if not isinstance(made, PipelineHooks):
            found = (
                f"a function that returns {made!r:.60}" if callable(source) else f"{source!r:.60}"
            )
            raise TypeError(
                "expected a PipelineHooks, a PipelineHooksConfig or a function that returns one, "
                f"got {found}"
            )
        built.append(made)
    return tuple(built)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed all generators and reset Accelerate in a block; restore the caller's state afterwards.

    Restored are the RNG states, Accelerate's process-wide state and the environment variables.
    """
    random_state = capture_random_state()
    environment = dict(os.environ)
    kinds = (PartialState, AcceleratorState, GradientState)
    shared: list[Any] = [getattr(kind, "_shared_state", None) for kind in kinds]
    if None in shared:
        raise RuntimeError(
            "a separate run needs the _shared_state of Accelerate's states, which accelerate "
            f"{accelerate.__version__} lacks; install accelerate 1.13 to 1.15"
        )
    saved = [dict(state) for state in shared]
    try:
        # In place: objects of the caller may hold these dicts.
        for state in shared:
            state.clear()
        seed_all(seed)
        yield
    finally:
        for state, values in zip(shared, saved, strict=True):
            state.clear()
            state.update(values)
        os.environ.clear()
        os.environ.update(environment)
        restore_random_state(random_state)


def seed_all(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
