"""The small training that hooks are run in."""

from __future__ import annotations

import copy
import difflib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from robo_orchard_lab.pipeline.batch_processor import BatchProcessor, SimpleBatchProcessor
from robo_orchard_lab.pipeline.checkpoint import capture_random_state, restore_random_state
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig

# --- isolation -------------------------------------------------------------------------------
# Runs that leave no trace in the process.


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """A fresh random state and a fresh Accelerate; then the caller's again, whatever happens.

    Put back are the random states of torch, NumPy and Python, what Accelerate keeps for the whole
    process, and the environment variables.
    """
    random_state = capture_random_state()
    environment = dict(os.environ)
    shared: list[dict[str, Any]] = [
        kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)
    ]
    kept = [dict(state) for state in shared]
    try:
        # In place, since objects of the caller may hold these very dicts.
        for state in shared:
            state.clear()
        seed_all(seed)
        yield
    finally:
        for state, values in zip(shared, kept, strict=True):
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


HookSource: TypeAlias = (
    PipelineHooks
    | PipelineHooksConfig[PipelineHooks]
    | Callable[[], PipelineHooks | PipelineHooksConfig[PipelineHooks]]
)
"""A hook, its configuration, or a function that makes either. What runs a hook more than once
takes no hook, only what makes a new one each time."""


class RunSetting(TypedDict, total=False):
    """How hooks are run; everything has a small default, and every run starts alike."""

    steps: int | None
    """Stop after this many batches; 6 by default, where no other limit is given."""
    epochs: int | None
    """Stop after this many passes over the data."""
    optimizer_steps: int | None
    """Stop after this many committed updates."""
    accumulate: int
    """Batches to an update; 1 by default."""
    model: torch.nn.Module | Callable[[], torch.nn.Module]
    """A module, which is copied for each run, or a function that makes one. By default a linear
    layer, dropout and another layer, from 4 features to 2."""
    data: Iterable[Any] | Callable[[], Iterable[Any]]
    """An iterable of batches, or a function that makes one, as is needed for what can be read
    only once or draws from a random generator of its own. By default 4 batches to an epoch of
    4 samples each, shuffled: random features and targets."""
    batch_processor: BatchProcessor
    """By default the mean squared error of ``model(features)``."""
    optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
    """Makes the optimizer of the model's parameters; by default SGD with momentum."""
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None
    """Makes the schedule of the optimizer; None by default."""
    beside: Sequence[HookSource]
    """Other hooks to run inside of those that are tested, such as one that publishes what these
    wait for."""
    log_every: str | None
    """The schedule of logging points; by default each step and epoch. None for those alone that
    a hook asks for. What is published and not logged is told when the run ends."""
    seed: int
    """Of torch, NumPy and Python; 0 by default."""


def _tiny_model() -> torch.nn.Module:
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers)


def _tiny_data() -> Iterable[Any]:
    # Shuffled by torch's own generator: a hook that draws from it gets other samples.
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
    "beside": (),
    "log_every": "1 step | 1 epoch",
    "seed": 0,
}
_LIMITS = ("steps", "epochs", "optimizer_steps")


def completed(setting: RunSetting) -> RunSetting:
    """The setting with its defaults.

    Raises:
        TypeError: it has a key that there is not.
    """
    for name in setting:
        if name not in _DEFAULTS:
            near = difflib.get_close_matches(name, _DEFAULTS, n=1)
            raise TypeError(
                f"there is no setting {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" There are {', '.join(_DEFAULTS)}"
            )
    full: RunSetting = {**_DEFAULTS, **setting}
    if all(setting.get(limit) is None for limit in _LIMITS):
        full["steps"] = 6
    return full


def build_training(setting: RunSetting) -> Training:
    """The model, the data and what goes with them, of a setting that is complete."""
    model_source, data_source = setting["model"], setting["data"]
    if isinstance(model_source, torch.nn.Module):
        model = copy.deepcopy(model_source)
    else:
        model = model_source()
    optimizer = None
    if setting["batch_processor"].need_backward:
        optimizer = setting["optimizer"](model.parameters())
    make_lr_scheduler = setting["lr_scheduler"]
    return Training(
        Accelerator(cpu=True, gradient_accumulation_steps=setting["accumulate"]),
        model,
        data_source() if callable(data_source) else data_source,
        setting["batch_processor"],
        optimizer,
        None if make_lr_scheduler is None or optimizer is None else make_lr_scheduler(optimizer),
    )


class Training(NamedTuple):
    """What a trainer is made of, but for its hooks and limits, in the order of its arguments."""

    accelerator: Accelerator
    model: torch.nn.Module
    dataloader: Iterable[Any]
    batch_processor: BatchProcessor
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None


def listed(hooks: HookSource | Iterable[HookSource]) -> tuple[HookSource, ...]:
    """One hook or several, to be gone through any number of times."""
    one = isinstance(hooks, PipelineHooks | PipelineHooksConfig) or callable(hooks)
    return (hooks,) if one else tuple(hooks)  # type: ignore[return-value, arg-type]  # as ``one`` tells


def build_hooks(hooks: Iterable[HookSource], again: bool) -> tuple[PipelineHooks, ...]:
    """The hooks of one run.

    Args:
        hooks: what they are, or are made of.
        again: whether each call must give new ones.

    Raises:
        TypeError: one is something else, or a hook where new ones are needed.
    """
    return tuple(_build(hook, again) for hook in hooks)


def _build(source: Any, again: bool) -> PipelineHooks:
    if isinstance(source, PipelineHooks):
        if again:
            name = type(source).__name__
            raise TypeError(
                f"hook {source.name!r} is to run several times, each time as a new one: give its "
                f"configuration, or a function that makes it, such as lambda: {name}(...)"
            )
        return source
    made = source() if callable(source) else source
    if isinstance(made, PipelineHooksConfig):
        made = made()
    if not isinstance(made, PipelineHooks):
        raise TypeError(
            "expected a PipelineHooks, a PipelineHooksConfig or a function that makes one, got "
            + (f"a function that gives {made!r:.60}" if callable(source) else f"{source!r:.60}")
        )
    return made
