"""From an experiment to the objects of its run, made in the order that a script has them in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.optim.lr_scheduler import LRScheduler

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_lab.experiment.auto_steps import count_moves
from robo_orchard_lab.experiment.build_parts import (
    building,
    make_hook,
    make_loader,
    make_optimizer,
    make_processor,
    make_schedule,
    schedule_unit,
)
from robo_orchard_lab.experiment.config import CHECKPOINT, ExperimentConfig
from robo_orchard_lab.experiment.parts import AUTO, AcceleratorConfig
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks
from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.distributed.sections import end_together
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.progress import TrainerLimits


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

    config: ExperimentConfig
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
    experiment: ExperimentConfig,
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
    schedule, limits = experiment.schedule, _limits(experiment)
    with end_together():
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
            with building("schedule"):
                assert optimizer is not None  # as the experiment has checked
                unit = schedule_unit(schedule)
                moves = partial(count_moves, dataloader, accelerator, limits, unit)
                lr_scheduler = make_schedule(schedule, optimizer, moves)
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
        schedule_every=getattr(schedule, "every", None),
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
    experiment: ExperimentConfig, given: Mapping[str, Iterable[Any] | None]
) -> dict[str, Iterable[Any]]:
    """The loaders of the evaluation sets by name."""
    loaders: dict[str, Iterable[Any]] = {}
    for name, described in experiment.data.evaluation.items():
        if name not in given:
            with building("data", "evaluation", name):
                loaders[name] = make_loader(described)
    return loaders | {name: loader for name, loader in given.items() if loader is not None}


def build_hooks(
    experiment: ExperimentConfig,
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


def _limits(experiment: ExperimentConfig) -> TrainerLimits:
    trainer = experiment.trainer
    return TrainerLimits(trainer.max_step, trainer.max_optimizer_step, trainer.max_epoch)


def _made_model(part: Any) -> torch.nn.Module:
    model: torch.nn.Module = part()
    return model


def _described(part: Any, name: str) -> Any:
    if part is None:
        raise ConfigFieldError(f"is null, which leaves it to a script: build({name}=...)")
    return part
