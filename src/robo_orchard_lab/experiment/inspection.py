"""Descriptions for people: the fields of configs, the built-in hooks, and the hooks of a run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from robo_orchard_core.utils.cli import Option, options_of
from robo_orchard_core.utils.config import (
    Config,
    ConfigReferenceError,
    Trust,
    TrustError,
)
from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_core.utils.config.formats import Plain
from robo_orchard_core.utils.config.parts import config_class_of
from robo_orchard_core.utils.config.references import (
    resolve,
    split_reference,
)
from robo_orchard_core.utils.hook import FunctionInfo
from robo_orchard_lab.builtin_hooks import HOOK_MODULES
from robo_orchard_lab.experiment.catalogue import (
    ExperimentTrust,
    definition_of,
    with_definitions,
)
from robo_orchard_lab.experiment.parts import ExperimentFields, HooksPart

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.pipeline import PipelineHooks


# --- fields ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldHelp:
    """Description of one field."""

    path: str
    """Dotted path."""
    description: str
    type: str
    default: str | None
    """Default as written in a file; None for a required field."""

    @property
    def text(self) -> str:
        """Description with type and default, for help texts."""
        default = "required" if self.default is None else f"default: {self.default}"
        return f"{self.description} ({self.type}; {default})".strip()


@cache
def experiment_fields() -> tuple[FieldHelp, ...]:
    """Describe the fields of every experiment; fields of its parts depend on their classes."""
    return tuple(fields_of(ExperimentFields))


def fields_of(config_class: type[BaseModel]) -> list[FieldHelp]:
    """Describe the fields of a config class, with the fields of nested configs by dotted path."""
    required = getattr(config_class, "required_parameters", ())  # of a config made of a signature
    return [
        _describe_field(option, required)
        for option in options_of(config_class)
        if not _is_nested_config(option) and option.path not in (("class_type",), ("func",))
    ]


def _is_nested_config(option: Option) -> bool:
    kind = option.field.annotation
    return isinstance(kind, type) and issubclass(kind, Config)


def _describe_field(option: Option, required: Iterable[str]) -> FieldHelp:
    has_default = not (option.required or ".".join(option.path) in required)
    names = option.type.split(" | ")
    if "Trigger" in names:  # text such as "50 steps" is a trigger
        names = [name for name in names if name != "str"]
    return FieldHelp(
        path=".".join(option.path),
        description=option.field.description or "",
        type=" | ".join(names),
        default=option.default_text if has_default else None,
    )


# --- built-in hooks --------------------------------------------------------------------------

EXAMPLES: Mapping[str, dict[str, Plain]] = {
    "EarlyStopping": {"monitor": "eval/val/loss", "mode": "min", "patience": 3},
    "FreezeHook": {"patterns": ["backbone.*"]},
    "GradientClippingHook": {"max_norm": 1.0},
    "KeepBest": {"monitor": "eval/val/loss", "mode": "min", "path": "best.safetensors"},
    "MetricTracker": {
        "metrics": {
            "accuracy": {
                "class_type": "torchmetrics.classification:MulticlassAccuracy",
                "num_classes": 10,
            }
        }
    },
    "MetricsLogger": {
        "every": "50 steps | 1 epoch",
        "sinks": {
            "file": {"class_type": "JsonLinesSink", "path": "metrics.jsonl"},
        },
    },
    "ProgressBarHook": {"metrics": ["eval/val/loss"]},
    "TimeLimit": {"limit": "3h30min"},
    "TorchProfilerHook": {"folder": "traces"},
}
"""Required and common fields of built-in hooks."""

_ROLE = re.compile(r":\w+:`~?([^`]+)`")  # of reStructuredText, as in :class:`EMA`

_FOR_CODE = (">>>", "Args:", "Raises:")

_ARGUMENTS: Mapping[str, dict[str, Any]] = {"ValidationHook": {"dataloaders": {"val": [None]}}}
"""Arguments that the experiment passes to a hook, in addition to the hook's fields."""


@dataclass(frozen=True)
class HookInfo:
    """Description of a hook class."""

    name: str
    """Name in files."""
    reference: str
    """Definition of the class."""
    summary: str
    """First sentence of the docstring."""
    description: str
    """Remaining docstring."""
    fields: tuple[FieldHelp, ...]
    channels: tuple[str, ...] | None
    """Channels of the hooks of the example; None if the example can't be built here, for example
    without an optional dependency."""
    example: dict[str, Plain]
    """Entry for a file."""


def hook_names() -> list[str]:
    """Return the names of the built-in hooks; torch is not imported."""
    return [*HOOK_MODULES]


def hooks() -> list[HookInfo]:
    """Describe all built-in hooks."""
    return [hook(name) for name in hook_names()]


def hook(name: str, trust: Trust | None = None) -> HookInfo:
    """Describe a hook.

    Args:
        name: Name of a built-in hook, or a definition such as ``my_package.hooks:MyHook``.
        trust: Packages that may be imported; by default only the catalogue.

    Raises:
        ConfigReferenceError: There is no such hook.
        TrustError: The hook is not trusted; nothing was imported.
    """
    trust = ExperimentTrust().trust if trust is None else trust
    if ":" not in name and name not in (known := hook_names()):
        advice = suggest_name(name, known, "there are")
        raise ConfigReferenceError(f"there is no hook {name!r}; {advice}")
    reference = definition_of(name)
    example: dict[str, Plain] = {"class_type": name, **EXAMPLES.get(name, {})}
    if not trust.covers(*split_reference(reference)):
        package = reference.partition(".")[0].partition(":")[0]
        raise TrustError(f"{name!r} is not trusted; if you trust its code, pass --trust {package}")
    found: Any = resolve(reference, trust)
    if not (isinstance(found, type) and issubclass(found, _hooks_class())):
        raise ConfigReferenceError(f"expected a subclass of PipelineHooks, found {name!r}")
    summary, description = _split_docstring(found)
    return HookInfo(
        name=name,
        reference=reference,
        summary=summary,
        description=description,
        fields=tuple(fields_of(config_class_of(found))),
        channels=_channels(name, example, trust),
        example=example,
    )


def _hooks_class() -> type:
    from robo_orchard_lab.pipeline import PipelineHooks

    return PipelineHooks


def _split_docstring(code: Any) -> tuple[str, str]:
    """Return the first sentence of a docstring and the rest, without sections about code."""
    text = inspect.getdoc(code) or ""
    first, _, rest = _ROLE.sub(r"`\1`", text).replace("``", "`").partition("\n\n")
    parts = [part for part in rest.split("\n\n") if not part.startswith(_FOR_CODE)]
    return " ".join(first.split()), "\n\n".join(parts).strip()


class _Holder(Config):
    hook: HooksPart


def _channels(name: str, example: dict[str, Plain], trust: Trust) -> tuple[str, ...] | None:
    from robo_orchard_lab.pipeline import CHANNEL_NAMES

    document = with_definitions({"hook": example})
    assert isinstance(document, dict)
    try:
        config = _Holder.from_dict(document, trust=trust)
        built: PipelineHooks = config.hook(**_ARGUMENTS.get(name, {}))
    except Exception:  # the constructor decides which error
        return None
    return tuple(channel for channel in CHANNEL_NAMES if len(built.get_channel(channel)))


# --- hooks of a run --------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedHook:
    """Hook on a channel of a run."""

    channel: str
    position: int
    """Position from 0, the outermost: its ``before`` runs first, its ``after`` last."""
    hook: str
    """Name in the experiment of the hooks to which it belongs."""
    class_name: str
    when: str
    """``always``, or the trigger."""
    before: str | None
    """File and line of ``before``, or None."""
    after: str | None
    """File and line of ``after``, or None."""


def plan_hooks(hooks: PipelineHooks) -> list[PlannedHook]:
    """List the hooks of a run by channel, each channel from the outermost hook."""
    from robo_orchard_lab.pipeline import CHANNEL_NAMES

    return [
        PlannedHook(
            channel=channel,
            position=entry.position,
            hook=entry.label if entry.owner is None else entry.owner.name,
            class_name=type(entry.owner or entry.context).__name__,
            when=str(getattr(entry.context, "when", "always")),
            before=_location(entry.before),
            after=_location(entry.after),
        )
        for channel in CHANNEL_NAMES
        for entry in hooks.get_channel(channel).entries()
    ]


def _location(function: Any) -> str | None:
    if function is None:
        return None
    info = FunctionInfo.of(function)
    return info.location or info.name


def build_hook_set(experiment: ExperimentConfig) -> PipelineHooks:
    """Build the hooks of a run for inspection, the trainer's own first; they can't run.

    Neither the model nor the data is built.

    Raises:
        ConfigError: A hook can't be built; the error has its path.
    """
    import torch
    from accelerate import Accelerator

    from robo_orchard_lab.experiment.build import build_hooks
    from robo_orchard_lab.pipeline import PipelineHooks
    from robo_orchard_lab.pipeline.hooks import OptimizerHook

    hooks = PipelineHooks()
    if experiment.optimizer is not None:
        placeholder = torch.optim.SGD([torch.zeros(())], lr=0.0)
        hooks += OptimizerHook(Accelerator(cpu=True), placeholder, None, hooks)
    sets = {name: [None] for name in experiment.data.evaluation}
    hooks += PipelineHooks.from_hooks(build_hooks(experiment, {}, sets, experiment.folder()))
    return hooks
