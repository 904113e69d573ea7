"""Which hooks there are, with their fields, and which run in an experiment: as data."""

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
from robo_orchard_lab.experiment.catalogue import (
    CATALOGUE,
    ExperimentTrust,
    definition_of,
    with_definitions,
)
from robo_orchard_lab.experiment.parts import HooksPart

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.pipeline import PipelineHooks


# --- field help ------------------------------------------------------------------------------
# The fields of configs for people: what each is, takes, and is by default.


@dataclass(frozen=True)
class FieldHelp:
    """One field, by its dotted path."""

    path: str
    description: str
    type: str
    default: str | None
    """As in a file; None where one has to be given."""

    @property
    def text(self) -> str:
        """What help says of it."""
        default = "required" if self.default is None else f"default: {self.default}"
        return f"{self.description} ({self.type}; {default})".strip()


@cache
def experiment_fields() -> tuple[FieldHelp, ...]:
    """The fields of every experiment; those of its parts are their classes'."""
    from robo_orchard_lab.experiment.config import ExperimentConfig

    return tuple(fields_of(ExperimentConfig))


def fields_of(config_class: type[BaseModel]) -> list[FieldHelp]:
    """The fields of a config class, those of the configs that it holds behind their names."""
    required = getattr(
        config_class, "required_parameters", ()
    )  # of one that is made of a signature
    return [
        _field(option, required)
        for option in options_of(config_class)
        if not _only_holds(option) and option.path not in (("class_type",), ("func",))
    ]


def _only_holds(option: Option) -> bool:
    """Whether it is a config's, whose fields are listed themselves."""
    kind = option.field.annotation
    return isinstance(kind, type) and issubclass(kind, Config)


def _field(option: Option, required: Iterable[str]) -> FieldHelp:
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
"""Fields of built-in hooks that they need, or are seldom seen without."""

_BUILT_IN = "robo_orchard_lab.pipeline.hooks."
_ROLE = re.compile(r":\w+:`~?([^`]+)`")  # of reStructuredText, as in :class:`EMA`

_FOR_CODE = (">>>", "Args:", "Raises:")

_GIVEN: Mapping[str, dict[str, Any]] = {"ValidationHook": {"dataloaders": {"val": [None]}}}
"""What a hook gets from the experiment, beside its own fields."""


@dataclass(frozen=True)
class HookInfo:
    """A kind of hook."""

    name: str
    """As files name it."""
    reference: str
    """Where it is defined."""
    summary: str
    """The first sentence about it."""
    description: str
    """The rest."""
    fields: tuple[FieldHelp, ...]
    channels: tuple[str, ...] | None
    """The channels that it has hooks on with the fields of the example; None where it can't be
    made here, as without what it needs to be installed."""
    example: dict[str, Plain]
    """An entry of it, as in a file."""


def hook_names() -> list[str]:
    """The built-in hooks, by the names that files use. It needs no torch."""
    return [
        name
        for name, at in CATALOGUE.items()
        if at.startswith(_BUILT_IN) and ":" not in name and f"{name}Config" in CATALOGUE
    ]


def hooks() -> list[HookInfo]:
    """All built-in hooks."""
    return [hook(name) for name in hook_names()]


def hook(name: str, trust: Trust | None = None) -> HookInfo:
    """What there is to know about a hook.

    Args:
        name: of a built-in one, or where any other one is defined, ``my_package.hooks:MyHook``.
        trust: what may be imported for it; by default what the catalogue has.

    Raises:
        ConfigReferenceError: it leads to no hook.
        TrustError: it leads to what is not trusted; nothing was imported.
    """
    trust = ExperimentTrust().trust if trust is None else trust
    if ":" not in name and name not in (known := hook_names()):
        advice = suggest_name(name, known, "there are")
        raise ConfigReferenceError(f"there is no hook {name!r}; {advice}")
    reference = definition_of(name)
    example: dict[str, Plain] = {"class_type": name, **EXAMPLES.get(name, {})}
    if not trust.covers(*split_reference(reference)):
        package = reference.partition(".")[0].partition(":")[0]
        raise TrustError(f"{name!r} is code that is not trusted; if you do, say --trust {package}")
    found: Any = resolve(reference, trust)
    if not (isinstance(found, type) and issubclass(found, _hooks_class())):
        raise ConfigReferenceError(f"{name!r} is no hook, which is a PipelineHooks")
    summary, description = _told(found)
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


def _told(code: Any) -> tuple[str, str]:
    """The first sentence of a docstring, and what comes behind it but for what is about code."""
    text = inspect.getdoc(code) or ""
    first, _, rest = _ROLE.sub(r"`\1`", text).replace("``", "`").partition("\n\n")
    about = [part for part in rest.split("\n\n") if not part.startswith(_FOR_CODE)]
    return " ".join(first.split()), "\n\n".join(about).strip()


class _Holder(Config):
    hook: HooksPart


def _channels(name: str, example: dict[str, Plain], trust: Trust) -> tuple[str, ...] | None:
    from robo_orchard_lab.pipeline import CHANNEL_NAMES

    document = with_definitions({"hook": example})
    assert isinstance(document, dict)  # as what it was given
    try:
        built: PipelineHooks = _Holder.from_dict(document, trust=trust).hook(**_GIVEN.get(name, {}))
    except Exception:  # whatever its constructor needs that isn't there
        return None
    return tuple(channel for channel in CHANNEL_NAMES if len(built.get_channel(channel)))


@dataclass(frozen=True)
class PlannedHook:
    """One hook of a channel, in its place."""

    channel: str
    position: int
    """From 0, the outermost: its ``before`` is the first, its ``after`` the last."""
    hook: str
    """The name of the bundle that it belongs to, as the experiment has it."""
    class_name: str
    when: str
    """``always``, or the schedule."""
    before: str | None
    """The file and line of its ``before``; None where it has none."""
    after: str | None


def plan_hooks(hooks: PipelineHooks) -> list[PlannedHook]:
    """What runs of a run's hooks: channel by channel, each from the outermost."""
    from robo_orchard_lab.pipeline import CHANNEL_NAMES

    return [
        PlannedHook(
            channel=channel,
            position=entry.position,
            hook=entry.label if entry.owner is None else entry.owner.name,
            class_name=type(entry.owner or entry.context).__name__,
            when=str(getattr(entry.context, "when", "always")),
            before=_line(entry.before),
            after=_line(entry.after),
        )
        for channel in CHANNEL_NAMES
        for entry in hooks.get_channel(channel).entries()
    ]


def _line(function: Any) -> str | None:
    if function is None:
        return None
    about = FunctionInfo.of(function)
    return about.location or about.name


def build_hook_set(experiment: ExperimentConfig) -> PipelineHooks:
    """The hooks that a run of an experiment has, the trainer's own first; to look at, not to run.

    They are built, and neither the model nor the data.

    Raises:
        ConfigError: a hook can't be built, with its place.
    """
    import torch
    from accelerate import Accelerator

    from robo_orchard_lab.experiment.build import build_hooks
    from robo_orchard_lab.pipeline import PipelineHooks
    from robo_orchard_lab.pipeline.hooks import OptimizerHook

    hooks = PipelineHooks()
    if experiment.optimizer is not None:
        stands_in = torch.optim.SGD([torch.zeros(())], lr=0.0)
        hooks += OptimizerHook(Accelerator(cpu=True), stands_in, None, hooks)
    sets = {name: [None] for name in experiment.data.evaluation}
    hooks += PipelineHooks.from_hooks(build_hooks(experiment, {}, sets, experiment.folder()))
    return hooks
