"""Optimizers, their parameter groups and LR schedulers, built from an experiment."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from robo_orchard_core.utils.config import ConfigBuildError, ConfigFieldError
from robo_orchard_core.utils.config.build import DerivedConfig, code_of
from robo_orchard_core.utils.config.errors import describe
from robo_orchard_core.utils.config.model import field_values
from robo_orchard_core.utils.config.references import reference_to, union_members
from robo_orchard_lab.experiment.construction import building, made_with
from robo_orchard_lab.experiment.parts import AUTO, LRSchedulerFields
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks.optimizer import LRSchedulerUnit, check_lr_scheduler
from robo_orchard_lab.pipeline.model import (
    NamedParameters,
    all_named_parameters,
    match_parameters,
    suggest_pattern,
)
from robo_orchard_lab.pipeline.pipeline_run import Locate

NORMS_AND_BIASES = "norms_and_biases"
_NORM = re.compile(r"Norm(\dd)?$")
_BIAS = re.compile(r"(^|\.)(bias_[^.]*|([^.]*_)?bias)$")


def parameter_groups(
    model: torch.nn.Module,
    groups: Mapping[str, Mapping[str, Any]],
    own: Collection[torch.nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Build parameter groups for a torch optimizer, in a reproducible order.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    >>> groups = parameter_groups(model, {
    ...     "no_decay": {"parameters": "norms_and_biases", "weight_decay": 0.0},
    ... })
    >>> [(len(group.pop("params")), group) for group in groups]
    [(1, {}), (3, {'weight_decay': 0.0})]

    Each parameter belongs to the first group that it matches. Parameters without a match form
    the first group, with the optimizer's default options. Frozen parameters are included, as in
    ``model.parameters()``; optimizers skip parameters without a gradient.

    Args:
        model: Model whose parameters are grouped.
        groups: Groups by name. ``"parameters"`` is a pattern of parameter names or a list of
            patterns: ``*`` matches any text, dots included, ``?`` one character, ``[ab]`` one of
            several. ``"norms_and_biases"`` matches the parameters of normalization layers (classes
            named like ``LayerNorm`` or ``BatchNorm2d``, and their subclasses) and parameters named
            ``bias``, ``..._bias`` or ``bias_...``. Other keys are options of the optimizer.
        own: Parameters to group; None: all parameters of the model.

    Raises:
        ConfigFieldError: A pattern matches nothing, or earlier groups contain all parameters of a
            group. The path begins with the group's name.
    """
    named = all_named_parameters(model)
    if own is not None:
        named = [(name, parameter) for name, parameter in named if parameter in own]
    group_of: dict[torch.nn.Parameter, str] = {}
    for name, group in groups.items():
        with building(name, "parameters"):
            matched = [*_matched(model, named, group["parameters"])]
            free = [parameter for parameter in matched if parameter not in group_of]
            if not free:
                earlier = ", ".join(dict.fromkeys(group_of[parameter] for parameter in matched))
                raise ConfigFieldError(
                    f"all matching parameters belong to earlier groups ({earlier}); move this "
                    "group before them, or remove it"
                )
        group_of |= dict.fromkeys(free, name)
    members: dict[str | None, list[torch.nn.Parameter]] = {name: [] for name in (None, *groups)}
    for parameter in dict.fromkeys(parameter for _, parameter in named):
        members[group_of.get(parameter)].append(parameter)
    rest = members.pop(None)
    divided: list[dict[str, Any]] = [{"params": rest}] if rest else []
    for name, group in groups.items():
        options = {option: value for option, value in group.items() if option != "parameters"}
        divided.append({"params": members[name], **options})
    return divided


def _matched(
    model: torch.nn.Module, named: NamedParameters, patterns: str | Sequence[str]
) -> Iterator[torch.nn.Parameter]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        advice = ""
        if pattern == NORMS_AND_BIASES:
            of_norms = {
                parameter
                for module in model.modules()
                if any(_NORM.search(base.__name__) for base in type(module).__mro__)
                for parameter in module.parameters(recurse=False)
            }
            found = [p for name, p in named if _BIAS.search(name) or p in of_norms]
        elif not (found := match_parameters(pattern, named)):
            advice = f"; {suggest_pattern(pattern, named)}"
        if not found:
            raise ConfigFieldError(f"{pattern!r} matches no parameter{advice}")
        yield from found


def make_optimizer(config: Any, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build an optimizer of the configured parameters, by default all, in their groups."""
    parameters: Iterable[Any] = model.parameters()
    own = None
    if (patterns := getattr(config, "parameters", None)) is not None:
        with building("parameters"):
            own = {*_matched(model, all_named_parameters(model), patterns)}
        parameters = [parameter for parameter in parameters if parameter in own]
    if groups := getattr(config, "groups", {}):
        with building("groups"):
            parameters = parameter_groups(
                model,
                {
                    name: {"parameters": group.parameters, **group.options()}
                    for name, group in groups.items()
                },
                own,
            )
    made: torch.optim.Optimizer = config(parameters)
    return made


def make_optimizers(
    configs: Mapping[str, Any], model: torch.nn.Module
) -> dict[str, torch.optim.Optimizer]:
    """Build optimizers by name; each trainable parameter of the model belongs to one of them.

    Raises:
        ConfigFieldError: A pattern matches nothing, two optimizers have a parameter, or none has a
            trainable parameter.
    """
    owners: dict[torch.nn.Parameter, str] = {}
    names = {parameter: name for name, parameter in all_named_parameters(model)}
    made: dict[str, torch.optim.Optimizer] = {}
    for name, config in configs.items():
        with building(name):
            made[name] = make_optimizer(config, model)
            for parameter in (p for group in made[name].param_groups for p in group["params"]):
                if (other := owners.setdefault(parameter, name)) != name:
                    problem = f"{names[parameter]!r} belongs to the optimizer {other!r} already; "
                    raise ConfigFieldError(problem + "change the patterns of one", ("parameters",))
    lacking = [name for p, name in names.items() if p.requires_grad and p not in owners]
    if lacking:
        raise ConfigFieldError(
            f"no optimizer has {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''} "
            f"({len(lacking)} trainable parameters); add a pattern of their names to one "
            "optimizer's parameters, or set requires_grad=False in the model"
        )
    return made


def lr_scheduler_unit(config: Any) -> LRSchedulerUnit:
    """Return the interval at which an LR scheduler steps."""
    plateau = issubclass(getattr(config, "class_type", object), ReduceLROnPlateau)
    every: LRSchedulerUnit | None = getattr(config, "every", None)
    return every or ("epoch" if plateau else "optimizer_step")


def make_lr_scheduler(
    config: Any, optimizer: torch.optim.Optimizer, count_steps: Callable[[], int]
) -> LRScheduler:
    """Build an LR scheduler; ``count_steps`` computes ``auto``."""
    made: Any = made_with(_counted(config, count_steps), {"optimizer": optimizer})
    if not isinstance(made, LRScheduler):
        name = reference_to(code_of(config))
        raise ConfigBuildError(f"expected an LR scheduler from {name!r}, found {describe(made)}")
    return made


def make_lr_schedulers(
    configs: Any, optimizers: Any, count_steps: Callable[[LRSchedulerUnit], int]
) -> Any:
    """Build the LR scheduler of an optimizer, or LR schedulers by the names of optimizers."""
    if not isinstance(configs, dict):
        count = partial(count_steps, lr_scheduler_unit(configs))
        return make_lr_scheduler(configs, optimizers, count)
    made = {}
    for name, config in configs.items():
        with building(name):
            if not (isinstance(optimizers, Mapping) and name in optimizers):  # the caller's own
                raise ConfigFieldError(f"optimizer= lacks {name!r}; pass lr_scheduler= as well")
            made[name] = make_lr_schedulers(config, optimizers[name], count_steps)
    return made


def check_lr_schedulers(configs: Any, made: Any, locate: Locate | None) -> None:
    """Check the options of LR schedulers as the trainer does, where the place is known."""
    for name, scheduler in by_name(made).items():
        config = configs[name] if name else configs
        options = getattr(config, "every", None), getattr(config, "monitor", None)
        try:
            check_lr_scheduler(scheduler, *options)
        except PipelineConfigError as error:
            place = locate("lr_scheduler", *filter(None, [name])) if locate else name
            raise PipelineConfigError(f"{place}: {error}") from None


def lr_scheduler_options(configs: Any, option: str) -> Any:
    """Return an option of an LR scheduler, or of LR schedulers by name."""
    if not isinstance(configs, dict):
        return getattr(configs, option, None)
    found = {name: lr_scheduler_options(config, option) for name, config in configs.items()}
    return {name: value for name, value in found.items() if value is not None} or None


def _counted(config: Any, count_steps: Callable[[], int], *, outermost: bool = True) -> Any:
    """Replace ``auto`` by the number of steps in an LR scheduler and the parts inside."""
    if isinstance(config, list):
        parts = []
        for index, part in enumerate(config):
            with building(index):
                parts.append(_counted(part, count_steps, outermost=False))
        return parts
    if not isinstance(config, DerivedConfig | LRSchedulerFields):
        return config
    for name in () if outermost else ("every", "monitor"):
        if isinstance(config, LRSchedulerFields) and getattr(config, name) is not None:
            raise ConfigFieldError("applies to the outermost LR scheduler; move it there", (name,))
    changes: dict[str, Any] = {}
    for name, value in field_values(config).items():
        with building(name):
            field = type(config).model_fields.get(name)
            kinds = () if field is None else union_members(field.annotation)
            if value == AUTO and {int, Any}.intersection(kinds):
                changes[name] = count_steps()
            elif isinstance(value, list | DerivedConfig):
                changes[name] = _counted(value, count_steps, outermost=False)
    return config.model_copy(update=changes) if changes else config


def by_name(objects: Any) -> dict[str, Any]:
    """Return objects by the names of optimizers; a single object has the name ``""``."""
    if isinstance(objects, Mapping):
        return dict(objects)
    return {} if objects is None else {"": objects}
