"""Observation of what a hook reads, changes and requests in a real run.

- Fields of ``args``: a subclass of ``PipelineHookArgs`` records accesses below a frame of the hook.
- Weights, buffers, gradients, optimizer state: a dispatch mode records operations that use them.
- Changes: the state is compared before and after each function of the hook, and over each commit
  point.
- Requests: a listener keeps those by the hook.
"""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline import (
    CHANNEL_NAMES,
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    context,
)
from robo_orchard_lab.pipeline.errors import RunPreempted
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.requests import Request, SaveWeightsRequest
from robo_orchard_lab.testing.run import MadeRequest

DATA_FIELDS = {
    "batch": "batch",
    "batch_size": "batch_size",
    "model_outputs": "model_outputs",
    "attached_loss": "loss",
    "loss": "loss",
    "losses": "losses",
    "loss_weight": "loss_weight",
    "given_loss_weight": "loss_weight",
    "grad_norm": "grad_norm",
    "skip_reason": "skip_reason",
    "update_committed": "update_committed",
    "_update_committed": "update_committed",
    "sample_numbers": "sample_numbers",
    "sample_indices": "sample_indices",
}
"""Fields whose reading a hook declares, with the declared name."""
ASSIGNED = {name: name for name in DATA_FIELDS} | {
    "_update_committed": "update_committed",
    "gradients_changed": "gradients",
    "grad_norm_order": "grad_norm",
}
READING = ("subscribe", "listen", "last_value", "last_values", "latest", "add_writer")
"""Methods of the board that read values."""


class Effects:
    """Observed names, as a hook declares them."""

    def __init__(self, hook: PipelineHooks, folder: Path, files: set[str]) -> None:
        self.hook, self.folder, self.files = hook, folder, files
        self.reads = set[str]()
        self.changes = set[str]()
        self.requests = set[str]()
        self.of_run = set[str]()
        """Attributes of ``args.run`` that the hook read."""

    def is_acting(self, depth: int = 2) -> bool:
        """Return True below a frame of the hook, but not below a frame of this module."""
        frame = sys._getframe(depth)
        if frame.f_code.co_filename == context.__file__:
            return False  # a property reads the field behind it
        found: Any = frame
        while found is not None:
            if found.f_code.co_filename in (__file__, *self.files):
                return bool(found.f_code.co_filename != __file__)
            found = found.f_back
        return False


def observe(
    trainer_of: Callable[[list[Any]], HookBasedTrainer],
    make: Callable[[], Any] | None,
    folder: Path,
    *,
    others: list[Any],
    name: str = "",
    more_files: tuple[str, ...] = (),
) -> Effects:
    """Train with a hook and return its effects.

    Args:
        trainer_of: builds the trainer of hooks, with the run folder.
        make: builds the hook, or its configuration; None for the hook ``name`` of the trainer.
        folder: run folder.
        others: other hooks, which run outside the hook.
        name: name of the hook in the trainer.
        more_files: names of further source files of the hook, next to its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Effects] = []
        _record_args(patch, seen)
        listener = PipelineHooks("listener")
        trainer = trainer_of([listener, *others, *([] if make is None else [make()])])
        hook = trainer.hooks[name]
        file = Path(inspect.getfile(type(hook)))
        files = {str(file), *(str(file.with_name(other)) for other in more_files)}
        effects = Effects(hook, folder, files)
        seen.append(effects)
        _listen(listener, effects)
        _record_metrics(patch, effects)
        _wrap(hook, trainer, effects)
        known = set(trainer.metrics.names())
        with _operations(trainer, effects), suppress(RunPreempted):
            trainer()
    if any(not n.startswith("fed/") for n in set(trainer.metrics.names()) - known):
        effects.changes.add("metrics")
    _find_files(effects)
    return effects


def _record_args(patch: pytest.MonkeyPatch, seen: list[Effects]) -> None:
    class RecordingArgs(PipelineHookArgs):
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            if seen and name in DATA_FIELDS and seen[0].is_acting():
                seen[0].reads.add(DATA_FIELDS[name])
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if seen and name in ASSIGNED and seen[0].is_acting():
                seen[0].changes.add(ASSIGNED[name])
            super().__setattr__(name, value)

    def of_run(run: PipelineRun, name: str) -> Any:
        if seen and name in ("model", "optimizers") and seen[0].is_acting():
            seen[0].of_run.add(name)
        return object.__getattribute__(run, name)

    for module in ("trainer", "commit"):
        patch.setattr(f"robo_orchard_lab.pipeline.trainer.{module}.PipelineHookArgs", RecordingArgs)
    patch.setattr(PipelineRun, "__getattribute__", of_run)


def _record_metrics(patch: pytest.MonkeyPatch, effects: Effects) -> None:
    def recorded(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if effects.is_acting():
                effects.reads.add("metrics")
            return method(*args, **kwargs)

        return call

    for name in READING:
        patch.setattr(MetricsBoard, name, recorded(getattr(MetricsBoard, name)))


def _listen(listener: PipelineHooks, effects: Effects) -> None:
    def keep(request: Request) -> None:
        if request.by == effects.hook.name:
            effects.requests.add(MadeRequest(0, request).kind)
            if isinstance(request, SaveWeightsRequest):
                effects.of_run.add(str(request.path))  # the trainer writes this file

    kept: list[list[torch.Tensor]] = []

    @listener.on_loop.before
    def listen(args: PipelineHookArgs) -> None:
        args.requests.listen(keep)
        kept.clear()  # a rollback loads other weights

    def weights(args: PipelineHookArgs) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in args.model.state_dict().values()]

    @listener.on_step.before
    def compare(args: PipelineHookArgs) -> None:
        if kept and not all(map(torch.equal, kept[0], weights(args))):
            effects.changes.add("weights or buffers at a commit point")

    @listener.on_optimizer_step.after
    def keep_weights(args: PipelineHookArgs) -> None:
        kept[:] = [weights(args)]


def _wrap(hook: PipelineHooks, trainer: HookBasedTrainer, effects: Effects) -> None:
    """Compare the state of the run before and after each function of a hook."""

    def compared(function: Any) -> Any:
        if function is None:
            return None

        def call(args: PipelineHookArgs) -> None:
            before = _state(trainer)
            function(args)
            for name, value in _state(trainer).items():
                if not _equal(value, before[name]):
                    effects.changes.add(name)

        return call

    for channel in CHANNEL_NAMES:
        entries = [e for e in hook.get_channel(channel).entries() if e.owner is hook]
        if entries:
            hook.get_channel(channel).unregister_all()
        for entry in entries:
            wrapped = HookContext.from_callable(compared(entry.before), compared(entry.after))
            hook.register_hook(channel, wrapped)
        for inner in hook.all_hooks() if entries else ():
            hook.get_channel(channel).register(inner.get_channel(channel))


def _state(trainer: HookBasedTrainer) -> dict[str, Any]:
    parameters, modules = [*trainer.model.parameters()], [*trainer.model.modules()]
    optimizers = trainer.optimizers.values()
    return {
        "model.weights": [p.detach().clone() for p in parameters],
        "model.buffers": [b.clone() for b in trainer.model.buffers()],
        "model.mode": [m.training for m in modules],
        "model.requires_grad": [p.requires_grad for p in parameters],
        "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
        "optimizer state": [
            leaf.clone() for o in optimizers for leaf in tree_leaves(o.state_dict()["state"])
            if isinstance(leaf, torch.Tensor)
        ],
        "learning rates": [group["lr"] for o in optimizers for group in o.param_groups],
        "signal handlers": [signal.getsignal(signal.SIGUSR1)],
    }  # fmt: skip


def _equal(a: list[Any], b: list[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
        return bool(x is y or (not isinstance(x, torch.Tensor) and x == y))

    return len(a) == len(b) and all(map(same, a, b))


@contextmanager
def _operations(trainer: HookBasedTrainer, effects: Effects) -> Iterator[None]:
    """Record operations of the hook on weights, buffers, gradients and optimizer state."""

    def names() -> dict[int, str]:
        found: dict[str, list[Any]] = {
            "model.weights": [*trainer.model.parameters()],
            "model.buffers": [*trainer.model.buffers()],
            "gradients": [p.grad for p in trainer.model.parameters()],
            "optimizer state": [
                leaf for o in trainer.optimizers.values() for leaf in tree_leaves(dict(o.state))
            ],
        }
        return {
            tensor.untyped_storage().data_ptr(): name
            for name, tensors in found.items()
            for tensor in tensors
            if isinstance(tensor, torch.Tensor) and tensor.numel()
        }

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if effects.is_acting():
                known = names()
                for argument, value in zip(func._schema.arguments, args, strict=False):
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        continue
                    for leaf in tree_leaves(value):
                        if isinstance(leaf, torch.Tensor):
                            name = known.get(leaf.untyped_storage().data_ptr())
                            effects.reads.update([name] if name else [])
            return func(*args, **(kwargs or {}))

    with ExitStack() as stack:
        stack.enter_context(Operations())  # type: ignore[no-untyped-call]  # of torch
        yield


def _find_files(effects: Effects) -> None:
    of_others = {"events.jsonl", "run_state.json", "plan.json"}
    if effects.hook.name != "SaveCheckpoint":
        of_others.add("checkpoints")
    for path in effects.folder.rglob("*"):
        top = path.relative_to(effects.folder).parts[0]
        if path.is_dir() or top in of_others or str(path) in effects.of_run:
            continue
        effects.changes.add("report" if top == "media" else "files")
