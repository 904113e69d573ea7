"""Descriptions for people: the fields of configs, and the built-in hooks."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from robo_orchard_core.utils.cli import options_of
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
from robo_orchard_lab.experiment.catalogue import (
    CATALOGUE,
    ExperimentTrust,
    definition_of,
    kind_of,
    with_definitions,
)
from robo_orchard_lab.experiment.parts import ExperimentFields, HooksPart

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.pipeline import PipelineHooks


@dataclass(frozen=True)
class FieldHelp:
    """Description of one field.

    Attributes:
        path: Dotted path.
        default: Default as written in a file; None for a required field.
    """

    path: str
    description: str
    type: str
    default: str | None

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
    found = []
    for option in options_of(config_class):
        kind, path = option.field.annotation, ".".join(option.path)
        if (isinstance(kind, type) and issubclass(kind, Config)) or path in ("class_type", "func"):
            continue  # the fields of a nested config follow
        names = option.type.split(" | ")
        if "Trigger" in names:  # text such as "50 steps" is a trigger
            names = [name for name in names if name != "str"]
        default = None if option.required or path in required else option.default_text
        description = option.field.description or ""
        found.append(FieldHelp(path, description, " | ".join(names), default))
    return found


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
    "RolloutEvaluation": {
        "environment": {"class_type": "Reach", "render_mode": "rgb_array"},
        "every": "200 steps | 1 epoch",
        "episodes": 20,
    },
    "SweepTrial": {"study": "spirals", "trial": 0, "metric": "eval/val/loss"},
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
    """Description of a hook class.

    Attributes:
        name: Name in files.
        reference: Definition of the class.
        summary: First sentence of the docstring.
        description: Remaining docstring.
        channels: Channels of the hooks of the example; None if the example can't be built here,
            for example without an optional dependency.
        effects: Lines such as ``reads loss``, as declared with the settings of the example.
        example: Entry for a file.
    """

    name: str
    reference: str
    summary: str
    description: str
    fields: tuple[FieldHelp, ...]
    channels: tuple[str, ...] | None
    effects: tuple[str, ...]
    example: dict[str, Plain]


def hook_names() -> list[str]:
    """Return the names of the built-in hooks; torch is not imported."""
    return [
        name
        for name, definition in CATALOGUE.items()
        if kind_of(definition) == "a hook" and ":" not in name and not name.endswith("Config")
    ]


def hook_summaries() -> dict[str, str]:
    """Return the first sentence of each built-in hook's docstring; no hook is imported.

    >>> hook_summaries()["EMA"]
    'Exponential moving average of the weights, updated after each committed update.'
    """
    classes: dict[str, dict[str, ast.ClassDef]] = {}
    found = {}
    for name in hook_names():
        module, qualname = split_reference(definition_of(name))
        if module not in classes:
            package, *parts = module.split(".")
            source = resources(package).joinpath(*parts[:-1], f"{parts[-1]}.py").read_text("utf-8")
            nodes = ast.parse(source).body
            classes[module] = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        found[name] = _sentences(ast.get_docstring(classes[module][qualname]))[0]
    return found


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
    if not trust.covers(*split_reference(reference)):
        package = reference.partition(".")[0].partition(":")[0]
        raise TrustError(f"{name!r} is not trusted; if you trust its code, pass --trust {package}")
    from robo_orchard_lab.pipeline import CHANNEL_NAMES, PipelineHooks
    from robo_orchard_lab.pipeline.plan import RunPlan

    found: Any = resolve(reference, trust)
    if not (isinstance(found, type) and issubclass(found, PipelineHooks)):
        raise ConfigReferenceError(f"expected a subclass of PipelineHooks, found {name!r}")
    summary, *parts = _sentences(inspect.getdoc(found))
    example: dict[str, Plain] = {"class_type": name, **EXAMPLES.get(name, {})}
    channels, effects = None, list[str]()
    with suppress(Exception):  # the constructor decides which error
        holder = _Holder.from_dict({"hook": with_definitions(example)}, trust=trust)
        built: PipelineHooks = holder.hook(**_ARGUMENTS.get(name, {}))
        channels = tuple(each for each in CHANNEL_NAMES if len(built.get_channel(each)))
        effects = RunPlan.of(built).hooks[0].effects
    return HookInfo(
        name,
        reference,
        summary=summary,
        description="\n\n".join(p for p in parts if not p.startswith(_FOR_CODE)).strip(),
        fields=tuple(fields_of(config_class_of(found))),
        channels=channels,
        effects=tuple(effects),
        example=example,
    )


def _sentences(docstring: str | None) -> list[str]:
    """Return the summary of a docstring in one line, and its further paragraphs."""
    first, *parts = _ROLE.sub(r"`\1`", docstring or "").replace("``", "`").split("\n\n")
    return [" ".join(first.split()), *parts]


class _Holder(Config):
    hook: HooksPart


def build_hook_set(experiment: ExperimentConfig) -> PipelineHooks:
    """Build the hooks of a run for inspection, the trainer's own first; they can't run.

    The model is not built, and the data only for hooks with ``from_data``.
    """
    import torch
    from accelerate import Accelerator

    from robo_orchard_lab.experiment.build import build_hooks, with_data
    from robo_orchard_lab.pipeline import PipelineHooks
    from robo_orchard_lab.pipeline.hooks.optimizer import NamedOptimizersHook, OptimizerHook

    hooks = PipelineHooks()
    if experiment.optimizer is not None:
        placeholder = torch.optim.SGD([torch.zeros(())], lr=0.0)
        hook = partial(OptimizerHook, Accelerator(cpu=True), placeholder, None, hooks)
        described = experiment.optimizer
        if isinstance(described, dict):
            named = [hook(optimizer_name=name) for name in described]
            hooks += NamedOptimizersHook(named, None)
        else:
            hooks += hook()
    sets = {name: [None] for name in experiment.data.evaluation}
    # Values of the data are needed in hooks only.
    experiment = with_data(experiment.model_copy(update={"model": None, "batch_processor": None}))
    hooks += PipelineHooks.from_hooks(build_hooks(experiment, {}, sets, experiment.folder()))
    return hooks
