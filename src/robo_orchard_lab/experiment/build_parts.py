"""From each part of an experiment to the object that it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from robo_orchard_core.utils.config import (
    Config,
    ConfigBuildError,
    ConfigError,
    ConfigFieldError,
    function_of,
)
from robo_orchard_core.utils.config.class_config import returned_class
from robo_orchard_core.utils.config.errors import dotted
from robo_orchard_core.utils.config.model import field_values
from robo_orchard_core.utils.config.parts import DerivedConfig, code_of, parameters_of
from robo_orchard_core.utils.config.references import members
from robo_orchard_lab.experiment.parameter_groups import parameter_groups
from robo_orchard_lab.experiment.parts import AUTO, LoaderConfig, ScheduleConfig
from robo_orchard_lab.pipeline import PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks import ValidationHookConfig
from robo_orchard_lab.pipeline.hooks.optimizer import ScheduleUnit
from robo_orchard_lab.pipeline.run.run_path import in_run_folder


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


def schedule_unit(config: Any) -> ScheduleUnit:
    """When a schedule moves."""
    plateau = issubclass(getattr(config, "class_type", object), ReduceLROnPlateau)
    every: ScheduleUnit | None = getattr(config, "every", None)
    return every or ("epoch" if plateau else "optimizer_step")


def make_schedule(
    config: Any, optimizer: torch.optim.Optimizer, count_moves: Callable[[], int]
) -> LRScheduler:
    """A schedule, and those in it, of the optimizer; ``count_moves`` is asked for ``auto``."""
    made: LRScheduler = _made_with(_counted(config, count_moves), optimizer=optimizer)
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


def _counted(config: Any, count_moves: Callable[[], int], *, outermost: bool = True) -> Any:
    """The config of a schedule with numbers in the place of ``auto``, also in those within."""
    if not outermost and getattr(config, "every", None) is not None:
        raise ConfigFieldError(
            "says when the whole schedule moves; write it beside the outermost", ("every",)
        )
    changes: dict[str, Any] = {}
    for name, value in field_values(config).items():
        with building(name):
            field = type(config).model_fields.get(name)
            if value == AUTO and field is not None and int in members(field.annotation):
                changes[name] = count_moves()
            elif isinstance(value, list):
                changes[name] = [
                    _counted_within(part, count_moves, index) for index, part in enumerate(value)
                ]
    return config.model_copy(update=changes) if changes else config


def _counted_within(part: Any, count_moves: Callable[[], int], index: int) -> Any:
    with building(index):
        is_schedule = isinstance(part, ScheduleConfig)
        return _counted(part, count_moves, outermost=False) if is_schedule else part
