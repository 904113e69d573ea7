"""From an experiment to the objects of its run, made in the order that a script has them in."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from robo_orchard_core.utils.config import (
    Config,
    ConfigBuildError,
    ConfigError,
    ConfigFieldError,
    function_of,
)
from robo_orchard_core.utils.config.build import (
    DerivedConfig,
    code_of,
    parameters_of,
    returned_class,
)
from robo_orchard_core.utils.config.errors import dotted
from robo_orchard_core.utils.config.model import field_values
from robo_orchard_core.utils.config.references import union_members
from robo_orchard_lab.experiment.parts import (
    AUTO,
    CHECKPOINT,
    AcceleratorConfig,
    ExperimentFields,
    LoaderConfig,
    LRSchedulerConfig,
)
from robo_orchard_lab.experiment.run_plan import count_lr_scheduler_steps
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.distributed.sections import fail_together
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.hooks import ValidationHookConfig
from robo_orchard_lab.pipeline.hooks.optimizer import LRSchedulerUnit
from robo_orchard_lab.pipeline.model import (
    NamedParameters,
    all_named_parameters,
    match_parameters,
    suggest_pattern,
)
from robo_orchard_lab.pipeline.progress import TrainerLimits
from robo_orchard_lab.pipeline.run.run_path import in_run_folder

# --- parameter groups ------------------------------------------------------------------------
# Parameters with options of their own, such as no weight decay, as groups for an optimizer.


NORMS_AND_BIASES = "norms_and_biases"
_NORM = re.compile(r"Norm(\dd)?$")
_BIAS = re.compile(r"(^|\.)(bias_[^.]*|([^.]*_)?bias)$")


def parameter_groups(
    model: torch.nn.Module, groups: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The groups that torch's optimizers take, in an order that a resumed run finds again.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    >>> groups = parameter_groups(model, {
    ...     "no_decay": {"parameters": "norms_and_biases", "weight_decay": 0.0},
    ... })
    >>> [(len(group.pop("params")), group) for group in groups]
    [(1, {}), (3, {'weight_decay': 0.0})]

    Each parameter is in one group: the first of ``groups`` that it matches. First come those that
    match none, with the optimizer's own options, if there are any; then the others as they are
    listed. Parameters that are frozen are among them, as in ``model.parameters()``: without a
    gradient, an optimizer passes them over.

    Args:
        model: whose parameters to divide.
        groups: by name. ``"parameters"`` is a pattern or a list of them: names of parameters, with
            ``*`` for any text, dots included, ``?`` for one character and ``[ab]`` for one of some.
            The word ``"norms_and_biases"`` stands for the parameters of normalization layers
            (modules of a class that is named like ``LayerNorm`` or ``BatchNorm2d``, or has a base
            that is) and those named ``bias``, ``..._bias`` or ``bias_...``. All else are options
            of the optimizer.

    Raises:
        ConfigFieldError: a pattern matches nothing, or a group gets no parameter since all that it
            matches are in groups ahead of it. The path begins with the group's name.
    """
    named = all_named_parameters(model)
    group_of: dict[torch.nn.Parameter, str] = {}
    for name, group in groups.items():
        matched = list(_matched(model, named, name, group["parameters"]))
        free = [parameter for parameter in matched if parameter not in group_of]
        if not free:
            ahead = ", ".join(dict.fromkeys(group_of[parameter] for parameter in matched))
            raise ConfigFieldError(
                f"all that it matches are in groups ahead of it ({ahead}), so that none is left; "
                "list it ahead of these, or leave it out",
                (name, "parameters"),
            )
        group_of |= dict.fromkeys(free, name)
    members: dict[str | None, list[torch.nn.Parameter]] = {name: [] for name in (None, *groups)}
    for parameter in model.parameters():
        members[group_of.get(parameter)].append(parameter)
    rest = members.pop(None)
    divided: list[dict[str, Any]] = [{"params": rest}] if rest else []
    for name, group in groups.items():
        options = {option: value for option, value in group.items() if option != "parameters"}
        divided.append({"params": members[name], **options})
    return divided


def _matched(
    model: torch.nn.Module, named: NamedParameters, group: str, patterns: str | Sequence[str]
) -> Iterator[torch.nn.Parameter]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        norms_and_biases = pattern == NORMS_AND_BIASES
        found = _norms_and_biases(model) if norms_and_biases else match_parameters(pattern, named)
        if not found:
            advice = "" if norms_and_biases else f"; {suggest_pattern(pattern, named)}"
            raise ConfigFieldError(
                f"{pattern!r} matches no parameter of the model{advice}", (group, "parameters")
            )
        yield from found


def _norms_and_biases(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    biases = [parameter for name, parameter in all_named_parameters(model) if _BIAS.search(name)]
    norms = [module for module in model.modules() if _is_norm(type(module))]
    return biases + [p for norm in norms for p in norm.parameters(recurse=False)]


def _is_norm(cls: type) -> bool:
    return any(_NORM.search(base.__name__) for base in cls.__mro__)


# --- build parts -----------------------------------------------------------------------------
# From each part of an experiment to the object that it describes.


@contextmanager
def building(*path: str | int) -> Iterator[None]:
    """Around the making of a part: errors say where in the experiment it is described.

    What is raised for a wrong argument or a missing file becomes a ``ConfigBuildError``, which it
    is the cause of. Anything else gets a note.
    """
    try:
        yield
    except ConfigError as error:
        raise error.under(path) from error.__cause__
    except (TypeError, ValueError, OSError) as error:
        ours = isinstance(error, PipelineConfigError)
        problem = str(error) if ours else f"{type(error).__name__}: {error}"
        raise ConfigBuildError(problem, path) from error
    except Exception as error:
        error.add_note(f"while {dotted(path)} was built")
        raise


def make_loader(config: LoaderConfig) -> DataLoader[Any]:
    """A ``DataLoader`` of a dataset; samplers that take a ``data_source`` get that."""
    with building("dataset"):
        dataset = config.dataset()
    options: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "num_workers",
            "pin_memory",
            "timeout",
            "prefetch_factor",
            "persistent_workers",
        )
    }
    if config.collate_fn is not None:
        with building("collate_fn"):
            options["collate_fn"] = function_of(config.collate_fn)
    if config.batch_sampler is not None:
        with building("batch_sampler"):
            options["batch_sampler"] = _made_with(config.batch_sampler, data_source=dataset)
        return DataLoader(dataset, **options)
    if config.sampler is not None:
        with building("sampler"):
            options["sampler"] = _made_with(config.sampler, data_source=dataset)
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        shuffle=config.shuffle,
        drop_last=config.drop_last,
        **options,
    )


def make_optimizer(config: Any, model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer of all parameters of the model, in the groups that are described."""
    described: Mapping[str, Any] = getattr(config, "groups", {})
    groups = {
        name: {"parameters": group.parameters, **group.options()}
        for name, group in described.items()
    }
    parameters: Iterable[Any] = model.parameters()
    if groups:
        with building("groups"):
            parameters = parameter_groups(model, groups)
    made: torch.optim.Optimizer = config(parameters)
    return made


def lr_scheduler_unit(config: Any) -> LRSchedulerUnit:
    """When a schedule moves."""
    plateau = issubclass(getattr(config, "class_type", object), ReduceLROnPlateau)
    every: LRSchedulerUnit | None = getattr(config, "every", None)
    return every or ("epoch" if plateau else "optimizer_step")


def make_lr_scheduler(
    config: Any, optimizer: torch.optim.Optimizer, count_steps: Callable[[], int]
) -> LRScheduler:
    """A schedule, and those in it, of the optimizer; ``count_steps`` is asked for ``auto``."""
    made: LRScheduler = _made_with(_counted(config, count_steps), optimizer=optimizer)
    return made


def make_processor(config: Any) -> BatchProcessor:
    """A batch processor, or one whose ``forward(model, batch)`` is a function."""
    function = getattr(config, "func", None)
    if function is not None and not _makes_a(SimpleBatchProcessor, function):
        return SimpleBatchProcessor.from_callable(function_of(config))
    made: BatchProcessor = config()
    return made


def make_hook(
    config: Any, run_folder: Path | None, evaluation: Mapping[str, Iterable[Any]]
) -> PipelineHooks:
    """A bundle of hooks that writes to the run's folder; one that evaluates gets the sets.

    Args:
        config: of the hook.
        run_folder: where the paths in ``config`` begin; None leaves them as they are.
        evaluation: loaders by name, for a ``ValidationHook`` without any of its own.
    """
    if run_folder is not None:
        config = in_run_folder(config, run_folder)
    if isinstance(config, ValidationHookConfig) and config.dataloaders is None:
        if not evaluation:
            raise ConfigFieldError(
                "there is nothing to evaluate on; describe sets in data.evaluation"
            )
        return config(dataloaders=evaluation)
    made: PipelineHooks = config()
    return made


def _makes_a(kind: type, function: Callable[..., Any]) -> bool:
    result = returned_class(function)
    return result is not None and issubclass(result, kind)


def _made_with(config: Any, **given: Any) -> Any:
    """What a config makes, with these arguments where it takes them, and where those within do.

    One that takes any keyword arguments hands them on to what does.
    """
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters_of(code_of(config)))
    return config(**{**(given if takes_any else {}), **_own_and_within(config, given)})


def _own_and_within(config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a config's code: those given that it takes, and parts within that take some."""
    names = {parameter.name for parameter in parameters_of(code_of(config))}
    arguments = {name: value for name, value in given.items() if name in names}
    if isinstance(config, DerivedConfig):
        for name, value in config.arguments().items():
            made = _given_within(value, given)
            if made is not value:
                arguments[name] = made
    return arguments


def _given_within(value: Any, given: Mapping[str, Any]) -> Any:
    """The value with instances in the place of those parts in it that take what is given."""
    if isinstance(value, DerivedConfig):
        arguments = _own_and_within(value, given)
        return value(**arguments) if arguments else value
    if isinstance(value, (list, tuple)):
        parts = [_given_within(part, given) for part in value]
        same = all(part is before for part, before in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    return value


def _counted(config: Any, count_steps: Callable[[], int], *, outermost: bool = True) -> Any:
    """The config of a schedule with numbers in the place of ``auto``, also in those within."""
    if not outermost and getattr(config, "every", None) is not None:
        raise ConfigFieldError(
            "says when the whole schedule moves; write it beside the outermost", ("every",)
        )
    changes: dict[str, Any] = {}
    for name, value in field_values(config).items():
        with building(name):
            field = type(config).model_fields.get(name)
            if value == AUTO and field is not None and int in union_members(field.annotation):
                changes[name] = count_steps()
            elif isinstance(value, list):
                changes[name] = [
                    _counted_within(part, count_steps, index) for index, part in enumerate(value)
                ]
    return config.model_copy(update=changes) if changes else config


def _counted_within(part: Any, count_steps: Callable[[], int], index: int) -> Any:
    with building(index):
        is_schedule = isinstance(part, LRSchedulerConfig)
        return _counted(part, count_steps, outermost=False) if is_schedule else part


class LiveObjects(TypedDict, total=False):
    """What a script may give in the place of what is described; see `build_experiment`."""

    accelerator: Accelerator | None
    dataloader: Iterable[Any] | None
    evaluation: Mapping[str, Iterable[Any] | None] | None
    model: torch.nn.Module | None
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None
    batch_processor: BatchProcessor | None
    hooks: Mapping[str, HookLike | None] | None
    run_folder: str | os.PathLike[str] | None
    resume: str | os.PathLike[str] | None


@dataclass(frozen=True)
class BuiltExperiment:
    """The objects of a run, as a script would have made them, and the trainer that has them."""

    config: ExperimentFields
    run_folder: Path
    accelerator: Accelerator
    dataloader: Iterable[Any]
    evaluation: dict[str, Iterable[Any]]
    """The loaders of the evaluation sets, by name."""
    model: torch.nn.Module
    """As it was made; ``trainer.model`` is the one that is prepared."""
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None
    batch_processor: BatchProcessor
    hooks: dict[str, PipelineHooks]
    """By name, the outermost first; with ``checkpoint``, which is the innermost."""
    trainer: HookBasedTrainer


def build_experiment(
    experiment: ExperimentFields,
    *,
    accelerator: Accelerator | None = None,
    dataloader: Iterable[Any] | None = None,
    evaluation: Mapping[str, Iterable[Any] | None] | None = None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: LRScheduler | None = None,
    batch_processor: BatchProcessor | None = None,
    hooks: Mapping[str, HookLike | None] | None = None,
    run_folder: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> BuiltExperiment:
    """Make all that an experiment describes, on every rank alike, but for what is given.

    This is done in this order, and a script that does so trains the same weights, bit for bit::

        set_seed(seed)
        accelerator = Accelerator(...)
        with accelerator.main_process_first():
            dataloader = DataLoader(...); evaluation = {name: DataLoader(...), ...}
        model = ...
        optimizer = SGD(model.parameters(), ...)          # or groups of them
        lr_scheduler = OneCycleLR(optimizer, ...)
        batch_processor = ...
        hooks = {name: hook, ...}                         # those that have no sets get evaluation
        trainer = HookBasedTrainer(...)

    Args:
        experiment: what to build.
        accelerator: in the place of the one that is described; so are the others. Nothing is made
            of a part that is given.
        dataloader: of ``data.train``.
        evaluation: loaders of sets that are described in ``data.evaluation``, and of more; None
            leaves one out.
        model: prepared or not.
        optimizer: of the model's parameters.
        lr_scheduler: of the optimizer; it moves as ``schedule.every`` says, if that is there.
        batch_processor: from a batch to outputs and loss.
        hooks: in the place of those of the same names; others come behind the described ones. None
            leaves one out. A configuration is built as the described ones are, but with its paths
            as they are.
        run_folder: the run's folder; by default that of the experiment.
        resume: ``"auto"``, ``"never"`` or a checkpoint's folder; by default as the experiment says.

    Raises:
        ConfigError: a part can't be built, or is neither described nor given; with its place.
        Exception: what code that is described raises, and what :class:`HookBasedTrainer` does.
    """
    folder = experiment.folder() if run_folder is None else Path(run_folder)
    set_seed(experiment.seed)
    if accelerator is None:
        accelerator = make_accelerator(experiment.accelerator, folder)
    schedule, limits = experiment.lr_scheduler, _limits(experiment)
    with fail_together():
        with accelerator.main_process_first():  # which may write or fetch the data
            if dataloader is None:
                with building("data", "train"):
                    dataloader = make_loader(_described(experiment.data.train, "dataloader"))
            loaders = _make_evaluation(experiment, evaluation or {})
        if model is None:
            with building("model"):
                model = _made_model(_described(experiment.model, "model"))
        if optimizer is None and experiment.optimizer is not None:
            with building("optimizer"):
                optimizer = make_optimizer(experiment.optimizer, model)
        if lr_scheduler is None and schedule is not None:
            with building("lr_scheduler"):
                assert optimizer is not None  # as the experiment has checked
                unit = lr_scheduler_unit(schedule)
                moves = partial(count_lr_scheduler_steps, dataloader, accelerator, limits, unit)
                lr_scheduler = make_lr_scheduler(schedule, optimizer, moves)
        if batch_processor is None:
            with building("batch_processor"):
                described = _described(experiment.batch_processor, "batch_processor")
                batch_processor = make_processor(described)
        built_hooks = build_hooks(experiment, hooks or {}, loaders, folder)
    resume = experiment.resume if resume is None else resume
    trainer = HookBasedTrainer(
        accelerator,
        model,
        dataloader,
        batch_processor,
        optimizer,
        lr_scheduler,
        built_hooks,
        max_step=limits.max_step,
        max_optimizer_step=limits.max_optimizer_step,
        max_epoch=limits.max_epoch,
        lr_scheduler_every=getattr(schedule, "every", None),
        run_folder=folder,
        resume_from=None if resume == "never" else resume,
        data_order=DataOrder(seed=experiment.seed, **dict(experiment.data.order)),
        agree_every=experiment.trainer.agree_every,
        stall_timeout_s=experiment.trainer.stall_timeout_s,
    )
    return BuiltExperiment(
        experiment,
        folder,
        accelerator,
        dataloader,
        loaders,
        model,
        optimizer,
        lr_scheduler,
        batch_processor,
        built_hooks,
        trainer,
    )


def make_accelerator(config: AcceleratorConfig, run_folder: Path) -> Accelerator:
    """Accelerate's, whose trackers write to the run's folder."""
    cpu = not torch.accelerator.is_available() if config.cpu == AUTO else config.cpu
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    with building("accelerator"):
        return Accelerator(
            cpu=cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            project_dir=run_folder,
            kwargs_handlers=[ddp] if config.find_unused_parameters else None,
        )


def _make_evaluation(
    experiment: ExperimentFields, given: Mapping[str, Iterable[Any] | None]
) -> dict[str, Iterable[Any]]:
    """The loaders of the evaluation sets by name."""
    loaders: dict[str, Iterable[Any]] = {}
    for name, described in experiment.data.evaluation.items():
        if name not in given:
            with building("data", "evaluation", name):
                loaders[name] = make_loader(described)
    return loaders | {name: loader for name, loader in given.items() if loader is not None}


def build_hooks(
    experiment: ExperimentFields,
    given: Mapping[str, HookLike | None],
    evaluation: Mapping[str, Iterable[Any]],
    folder: Path,
) -> dict[str, PipelineHooks]:
    """The hooks by name, ``checkpoint`` last.

    Args:
        experiment: which describes them.
        given: in the place of those of the same names, or behind them; None leaves one out.
        evaluation: loaders by name, for those that evaluate.
        folder: the run's, where the paths of those that are described begin.

    Raises:
        ConfigError: one can't be built, with its place.
    """
    names = dict.fromkeys([*experiment.hooks, *given])
    names.pop(CHECKPOINT, None)
    built: dict[str, PipelineHooks] = {}
    for name in [*names, CHECKPOINT]:
        is_checkpoint = name == CHECKPOINT
        if name in given:
            hook = given[name]
            if isinstance(hook, PipelineHooks):
                built[name] = hook
            elif hook is not None:
                built[name] = make_hook(hook, None, evaluation)
            continue
        part = experiment.checkpoint if is_checkpoint else experiment.hooks[name]
        if part is not None:
            with building(*([CHECKPOINT] if is_checkpoint else ["hooks", name])):
                built[name] = make_hook(part, folder, evaluation)
    return built


def _limits(experiment: ExperimentFields) -> TrainerLimits:
    trainer = experiment.trainer
    return TrainerLimits(trainer.max_step, trainer.max_optimizer_step, trainer.max_epoch)


def _made_model(part: Any) -> torch.nn.Module:
    model: torch.nn.Module = part()
    return model


def _described(part: Any, name: str) -> Any:
    if part is None:
        raise ConfigFieldError(f"is null, which leaves it to a script: build({name}=...)")
    return part
