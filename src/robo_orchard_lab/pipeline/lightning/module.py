"""Inspection of a LightningModule: overridden hooks, signatures, optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from robo_orchard_lab.pipeline.errors import PipelineConfigError

_PACKAGES = frozenset({"lightning", "pytorch_lightning"})
_STEP, _EPOCH = (True, False), (False, True)
HOOKS: dict[str, tuple[bool, bool] | None] = {
    "setup": None,
    "configure_model": None,
    "configure_optimizers": None,
    "on_fit_start": None,
    "on_train_start": _EPOCH,
    "on_train_epoch_start": _EPOCH,
    "on_after_batch_transfer": None,
    "on_train_batch_start": _STEP,
    "training_step": _STEP,
    "on_before_backward": _STEP,
    "on_after_backward": _STEP,
    "on_before_optimizer_step": _STEP,
    "on_train_batch_end": _STEP,
    "on_train_epoch_end": _EPOCH,
    "on_validation_start": _EPOCH,
    "on_validation_epoch_start": _EPOCH,
    "on_validation_batch_start": _EPOCH,
    "validation_step": _EPOCH,
    "on_validation_batch_end": _EPOCH,
    "on_validation_epoch_end": _EPOCH,
    "on_validation_end": None,
    "on_train_end": None,
    "on_fit_end": None,
    "teardown": None,
    "test_step": _EPOCH,
    "predict_step": None,
}
"""Hooks of a module that are called, with Lightning's defaults of ``on_step`` and
``on_epoch`` for ``self.log`` in them; None where a module can't log."""
_OF_THE_SCRIPT = [
    *("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"),
    *("automatic_optimization", "example_input_array", "strict_loading"),
]
"""Names that a module may define for its script to use."""
_REMOVED = {
    **{f"{stage}_epoch_end": f"on_{stage}_epoch_end" for stage in ("validation", "test")},
    "training_epoch_end": "on_train_epoch_end",
    "training_step_end": "training_step",
    "validation_step_end": "validation_step",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
}
"""Hooks that Lightning 2 removed and refuses, with their successors."""
_REMEDIES = {
    "backward": "use a hook on on_model_backward",
    "configure_callbacks": "pass hooks to the trainer",
    "configure_gradient_clipping": "use GradientClippingHook",
    "lr_scheduler_step": "use an LR scheduler of torch",
    "on_before_zero_grad": "use on_train_batch_end, or an EMA hook",
    "on_load_checkpoint": "keep the state in buffers, or in a hook with state_dict",
    "on_save_checkpoint": "keep the state in buffers, or in a hook with state_dict",
    "optimizer_step": "use a hook on on_optimizer_step, and an LR scheduler for a warm-up",
    "optimizer_zero_grad": "use a hook on on_optimizer_step",
    "prepare_data": "call it in the script, on one process",
    "transfer_batch_to_device": "use on_after_batch_transfer",
}


def lightning_bases(module: object) -> list[type]:
    """Return LightningModule and its own bases, if the object is an instance of it."""
    bases = list(type(module).__mro__)
    for index, cls in enumerate(bases):
        if cls.__name__ == "LightningModule" and cls.__module__.partition(".")[0] in _PACKAGES:
            return bases[index:]
    return []


def is_overridden(module: object, name: str) -> bool:
    """Return True if the object, or a class outside of Lightning, defines the name."""
    owner = next((cls for cls in type(module).__mro__ if name in vars(cls)), None)
    return name in vars(module) or (owner is not None and owner not in lightning_bases(module))


def check_module(module: Any, left_out: Collection[str]) -> None:
    """Refuse an object that is no LightningModule, or overrides hooks that nothing calls.

    Raises:
        PipelineConfigError: the message states a remedy.
    """
    who, bases = type(module).__name__, lightning_bases(module)
    if not bases:
        raise PipelineConfigError(
            f"module: expected a LightningModule, found a {who}; for another module, subclass "
            "SimpleBatchProcessor"
        )
    for name in ("training_step", "configure_optimizers"):
        if not is_overridden(module, name):
            raise PipelineConfigError(f"{who} has no {name}, which a training needs; define it")
    for name, successor in _REMOVED.items():
        if hasattr(module, name) and name not in left_out:
            raise PipelineConfigError(
                f"{who}.{name}: Lightning 2 removed this hook; move its code to {successor}"
            )
    known = {*HOOKS, *_OF_THE_SCRIPT, *left_out, *dir(Module)}
    for name in sorted({name for cls in bases for name in vars(cls)} - known):
        of_a_training = not name.startswith(("_", "on_test_", "on_predict_"))
        if of_a_training and is_overridden(module, name):
            raise PipelineConfigError(
                f"{who}.{name} is not called by LightningModuleProcessor; "
                f"{_REMEDIES.get(name, 'move its code to a hook')}, or pass leave_out=[{name!r}] "
                "to go without it"
            )


def step_function(module: Any, name: str) -> Callable[[Any, int], Any]:
    """Return a step of the module as a function of batch and index; a step may omit the index.

    Raises:
        PipelineConfigError: the step has another argument.
    """
    step = getattr(module, name)
    parameters = inspect.signature(step).parameters.values()
    for parameter in parameters:
        if parameter.name in ("dataloader_iter", "optimizer_idx", "hiddens"):
            raise PipelineConfigError(
                f"{type(module).__name__}.{name}: expected the arguments batch and batch_idx, "
                f"found {parameter.name}; take a batch and its index"
            )
    takes_index = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return step if takes_index else lambda batch, index: step(batch)


class Scheduler(NamedTuple):
    """LR scheduler with its settings, which have Lightning's names and defaults."""

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool | None = None


def parse_optimizers(result: Any, who: str) -> tuple[list[Optimizer], list[Scheduler]]:
    """Return optimizers and LR schedulers of any result of ``configure_optimizers``.

    Raises:
        PipelineConfigError: the form is unknown, or a setting has no counterpart.
    """
    schedulers: list[Any] = []
    match result:
        case [[*found], [*schedulers]]:
            pass
        case [[*found], scheduler]:
            schedulers = [scheduler]
        case {"optimizer": optimizer}:
            found = [optimizer]
            if (scheduler := result.get("lr_scheduler")) is not None:
                is_config = isinstance(scheduler, Mapping)
                monitor = {"scheduler": scheduler, "monitor": result.get("monitor")}
                schedulers = [scheduler if is_config else monitor]
        case [{"optimizer": _}, *_]:
            found = [part["optimizer"] for part in result]
            schedulers = [part["lr_scheduler"] for part in result if "lr_scheduler" in part]
        case [*found]:
            pass
        case _:
            found = [result]
    if not found or not all(isinstance(optimizer, Optimizer) for optimizer in found):
        raise PipelineConfigError(
            f"{who}: expected an optimizer, a list of optimizers, (optimizers, LR schedulers), or "
            f"a mapping with 'optimizer', found {result!r:.200}"
        )
    return found, [_parse_scheduler(scheduler, who) for scheduler in schedulers]


def _parse_scheduler(given: Any, who: str) -> Scheduler:
    settings = given if isinstance(given, Mapping) else {"scheduler": given}
    if "scheduler" not in settings or not settings.keys() <= {*Scheduler._fields}:
        raise PipelineConfigError(
            f"{who}: expected an LR scheduler, or a mapping of {', '.join(Scheduler._fields)}, "
            f"found the keys {', '.join(map(str, settings)) or 'none'}"
        )
    found = Scheduler(**settings)
    is_plateau = isinstance(found.scheduler, ReduceLROnPlateau)
    for name, allowed, remedy in (
        ("interval", ["epoch"] if is_plateau else ["epoch", "step"], "choose another LR scheduler"),
        ("frequency", [1], "scale the arguments of the LR scheduler instead"),
        ("strict", [True], "log the monitored value in every evaluation"),
        ("reduce_on_plateau", [None, is_plateau], "use torch's ReduceLROnPlateau"),
    ):
        if (value := getattr(found, name)) not in allowed:
            raise PipelineConfigError(
                f"{who}: expected {name} {' or '.join(map(str, allowed))} of the LR scheduler, "
                f"found {value!r}; {remedy}"
            )
    if is_plateau and found.monitor is None:
        raise PipelineConfigError(
            f"{who}: expected a monitor of ReduceLROnPlateau, found none; return "
            "{'optimizer': ..., 'lr_scheduler': ..., 'monitor': 'val_loss'}"
        )
    return found
