"""Build the objects of a run from an experiment, in the order of a training script."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from robo_orchard_core.utils.config import (
    Config,
    ConfigBuildError,
    ConfigError,
    ConfigFieldError,
    function_of,
)
from robo_orchard_core.utils.config.build import (
    returned_class,
)
from robo_orchard_core.utils.config.errors import at_path, suggest_name
from robo_orchard_core.utils.config.model import field_values
from robo_orchard_lab.experiment.construction import building, made_with
from robo_orchard_lab.experiment.from_data import (
    FIELDS_FROM_DATA,
    FROM_DATA,
    TRAIN,
    named_datasets,
    read_value,
    replaced,
)
from robo_orchard_lab.experiment.initial_weights import WeightsReport, load_weights
from robo_orchard_lab.experiment.optimizers import (
    by_name,
    check_lr_schedulers,
    lr_scheduler_options,
    make_lr_schedulers,
    make_optimizer,
    make_optimizers,
)
from robo_orchard_lab.experiment.parts import (
    AUTO,
    CHECKPOINT,
    AcceleratorConfig,
    ExperimentFields,
    InitialWeights,
    LoaderConfig,
)
from robo_orchard_lab.experiment.resume_diff import lr_settings
from robo_orchard_lab.experiment.run_checkpoints import list_checkpoints
from robo_orchard_lab.experiment.run_plan import count_lr_scheduler_steps
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.checkpoint.manifest import CHECKPOINTS_FOLDER
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.distributed.failure_watch import fail_together
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.gradient_checkpointing import enable_gradient_checkpointing
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.hooks import SaveCheckpoint, ValidationHookConfig
from robo_orchard_lab.pipeline.media import flatten
from robo_orchard_lab.pipeline.pipeline_run import Locate
from robo_orchard_lab.pipeline.progress import TrainerLimits
from robo_orchard_lab.pipeline.run.run_path import in_run_folder

FieldsT = TypeVar("FieldsT", bound=ExperimentFields)
_MAX_VISITS = 16


def check_dataset_roots(part: Any) -> None:
    """Refuse image folders in a config whose symbolic links form a loop: torchvision follows links.

    Costs a listing of each folder.
    """
    if isinstance(part, Config):
        values: Any = field_values(part)
        if hasattr(getattr(part, "class_type", None), "find_classes"):
            with building("root"):
                _check_link_loops(str(values.get("root")))
        part = list(values.values())
    if isinstance(part, Mapping):
        part = list(part.values())
    for inner in part if isinstance(part, (list, tuple)) else ():
        check_dataset_roots(inner)


def _check_link_loops(root: str) -> None:
    visits: Counter[tuple[int, int]] = Counter()
    folders = [root]
    while folders:
        folder = folders.pop()
        with suppress(OSError):  # torchvision reports a missing root
            found = os.stat(folder)
            visits[found.st_dev, found.st_ino] += 1
            if visits[found.st_dev, found.st_ino] > _MAX_VISITS:
                raise ConfigFieldError(
                    f"expected a folder without loops of links; {folder} is reached on more than "
                    f"{_MAX_VISITS} ways; remove a link"
                )
            with os.scandir(folder) as entries:
                folders += [entry.path for entry in entries if entry.is_dir()]


def make_loader(config: LoaderConfig) -> DataLoader[Any]:
    """Build a ``DataLoader``; samplers with a parameter ``data_source`` receive the dataset."""
    with building("dataset"):
        check_dataset_roots(config.dataset)
        dataset = config.dataset()
    given = {"data_source": dataset}
    names = ["num_workers", "pin_memory", "timeout", "prefetch_factor", "persistent_workers"]
    if config.batch_sampler is None:
        names += ["batch_size", "shuffle", "drop_last"]
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    for name in ("collate_fn", "worker_init_fn"):
        if (function := getattr(config, name)) is not None:
            with building(name):
                options[name] = function_of(function)
    for name in ("sampler", "batch_sampler"):
        if (sampler := getattr(config, name)) is not None:
            with building(name):
                options[name] = made_with(sampler, given)
    return DataLoader(dataset, **options)


def make_processor(config: Any) -> BatchProcessor:
    """Build a batch processor, or wrap a function ``forward(model, batch)``."""
    if (function := getattr(config, "func", None)) is not None:
        result = returned_class(function)
        if result is None or not issubclass(result, SimpleBatchProcessor):
            return SimpleBatchProcessor.from_callable(function_of(config))
    made: BatchProcessor = config()
    return made


def make_hook(
    config: Any, run_folder: Path | None, evaluation: Mapping[str, Iterable[Any]]
) -> PipelineHooks:
    """Build the hooks of a config.

    Args:
        config: Config of the hooks.
        run_folder: Base of relative paths in ``config``; None keeps the paths.
        evaluation: Loaders by name, for a ``ValidationHook`` without own loaders.
    """
    check_dataset_roots(config)
    if run_folder is not None:
        config = in_run_folder(config, run_folder)
    if isinstance(config, ValidationHookConfig) and config.dataloaders is None:
        if not evaluation:
            raise ConfigFieldError("there are no evaluation sets; add them to data.evaluation")
        return config(dataloaders=evaluation)
    made: PipelineHooks = config()
    return made


class LiveObjects(TypedDict, total=False):
    """Replacements for described parts; see `build_experiment`."""

    accelerator: Accelerator | None
    dataloader: Iterable[Any] | None
    evaluation: Mapping[str, Iterable[Any] | None] | None
    model: torch.nn.Module | None
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None
    lr_scheduler: LRScheduler | Mapping[str, LRScheduler] | None
    batch_processor: BatchProcessor | None
    hooks: Mapping[str, HookLike | None] | None
    run_folder: str | os.PathLike[str] | None
    resume: str | os.PathLike[str] | None


@dataclass(frozen=True)
class BuiltExperiment:
    """Objects of a run and its trainer."""

    config: ExperimentFields
    run_folder: Path
    accelerator: Accelerator
    dataloader: Iterable[Any]
    evaluation: dict[str, Iterable[Any]]
    """Loaders of the evaluation sets by name."""
    model: torch.nn.Module
    """Model as built; ``trainer.model`` is prepared by Accelerate."""
    optimizers: dict[str, torch.optim.Optimizer]
    """Optimizers by name; the only one without a name has the key ``""``."""
    lr_schedulers: dict[str, LRScheduler]
    """LR schedulers by the names of their optimizers."""
    batch_processor: BatchProcessor
    hooks: dict[str, PipelineHooks]
    """Hooks by name, the outermost first; ``checkpoint`` is the innermost."""
    trainer: HookBasedTrainer
    initial_weights: WeightsReport | None = None
    """Report of the weights to begin with; None without ``init_from``, and after a resume."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Optimizer; None with named optimizers."""
        return self.optimizers.get("")

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """LR scheduler; None with named optimizers."""
        return self.lr_schedulers.get("")


def build_experiment(
    experiment: ExperimentFields,
    locate: Locate | None = None,
    *,
    accelerator: Accelerator | None = None,
    dataloader: Iterable[Any] | None = None,
    evaluation: Mapping[str, Iterable[Any] | None] | None = None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None = None,
    lr_scheduler: LRScheduler | Mapping[str, LRScheduler] | None = None,
    batch_processor: BatchProcessor | None = None,
    hooks: Mapping[str, HookLike | None] | None = None,
    run_folder: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> BuiltExperiment:
    """Build the objects of a run, except passed objects, on every rank.

    A script that builds them in this order trains the same weights, bit for bit::

        set_seed(seed)
        accelerator = Accelerator(...)
        with accelerator.main_process_first():
            dataloader = DataLoader(...); evaluation = {name: DataLoader(...), ...}
        model = ...
        optimizer = SGD(model.parameters(), ...)          # or groups of them
        lr_scheduler = OneCycleLR(optimizer, ...)
        batch_processor = ...
        hooks = {name: hook, ...}                         # without own loaders: evaluation
        trainer = HookBasedTrainer(...)

    Args:
        experiment: Experiment to build.
        locate: Returns the place of a setting, for messages.
        accelerator: Replaces the described accelerator. Likewise for the objects below: the
            described part is not built.
        dataloader: Training data.
        evaluation: Loaders by name, in place of or in addition to ``data.evaluation``; None
            removes a set.
        model: Model, prepared or not.
        optimizer: Optimizer of the model's parameters, or optimizers by name.
        lr_scheduler: LR scheduler of the optimizer, or LR schedulers by its name; it steps at
            ``lr_scheduler.every``, if set.
        batch_processor: Batch processor.
        hooks: Hooks by name, in place of the described ones or after them; None removes one. A
            config is built with its paths unchanged.
        run_folder: Run folder; by default that of the experiment.
        resume: ``"auto"``, ``"never"`` or a checkpoint's folder; by default as in the experiment.

    Raises:
        ConfigError: A part can't be built, or is null and not passed; the error has its path.
        Exception: Errors of the described code and of :class:`HookBasedTrainer`.
    """
    folder = experiment.folder() if run_folder is None else Path(run_folder)
    has_own_lr = optimizer is None and lr_scheduler is None
    set_seed(experiment.seed)
    if accelerator is None:
        accelerator = make_accelerator(experiment.accelerator, folder)
    scheduler_config, options = experiment.lr_scheduler, experiment.trainer
    limits = TrainerLimits(options.max_step, options.max_optimizer_step, options.max_epoch)
    with fail_together():
        with accelerator.main_process_first():  # downloads and caches happen once
            if dataloader is None:
                with building("data", "train"):
                    dataloader = make_loader(_described(experiment.data.train, "dataloader"))
            loaders = _make_evaluation(experiment, evaluation or {})
        complete = with_data(experiment, {**loaders, TRAIN: dataloader})
        if model is None:
            with building("model"):
                model = _make_model(_described(complete.model, "model"))
            model = _with_options(model, experiment)
        if optimizer is None and experiment.optimizer is not None:
            with building("optimizer"):
                described = experiment.optimizer
                make: Any = make_optimizers if isinstance(described, dict) else make_optimizer
                optimizer = make(described, model)
        if lr_scheduler is None and scheduler_config is not None:
            count = partial(count_lr_scheduler_steps, dataloader, accelerator, limits)
            with building("lr_scheduler"):
                lr_scheduler = make_lr_schedulers(scheduler_config, optimizer, count)
            check_lr_schedulers(scheduler_config, lr_scheduler, locate)
        if batch_processor is None:
            with building("batch_processor"):
                described = _described(complete.batch_processor, "batch_processor")
                batch_processor = make_processor(described)
        built_hooks = build_hooks(complete, hooks or {}, loaders, folder)
        resume = experiment.resume if resume is None else resume
        report: WeightsReport | None = None
        if experiment.init_from is not None and not _has_checkpoint(resume, built_hooks, folder):
            report = _load_initial_weights(experiment.init_from, model)
    plain: dict[str, Any] | None = None
    with suppress(ConfigError):  # configs of live objects have no plain values
        plain = experiment.to_dict()
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
        lr_scheduler_every=lr_scheduler_options(scheduler_config, "every"),
        lr_scheduler_monitor=lr_scheduler_options(scheduler_config, "monitor"),
        run_folder=folder,
        resume_from=None if resume == "never" else resume,
        data_order=DataOrder(seed=experiment.seed, **dict(experiment.data.order)),
        agree_every=options.agree_every,
        stall_timeout_s=options.stall_timeout_s,
        lr_settings=lr_settings(plain) if plain is not None and has_own_lr else None,
        locate=locate,
    )
    if plain is not None:
        trainer.report.hyperparameters = flatten(plain)
    if trainer.resumed:
        report = None
    return BuiltExperiment(
        experiment,
        folder,
        accelerator,
        dataloader,
        loaders,
        model,
        by_name(optimizer),
        by_name(lr_scheduler),
        batch_processor,
        built_hooks,
        trainer,
        report,
    )


def _has_checkpoint(
    resume: str | os.PathLike[str], hooks: Mapping[str, PipelineHooks], folder: Path
) -> bool:
    """Return True if the trainer resumes, or refuses to, instead of starting fresh."""
    if resume in ("auto", "never"):
        savers = [hook for hook in hooks.values() if isinstance(hook, SaveCheckpoint)]
        root = savers[0].root(folder) if savers else folder / CHECKPOINTS_FOLDER
        return resume == "auto" and bool(list_checkpoints(root).infos)
    return True


def _load_initial_weights(config: InitialWeights, model: torch.nn.Module) -> WeightsReport:
    with building("init_from"):
        try:
            return load_weights(model, **field_values(config))
        except StateError as error:
            raise ConfigBuildError(str(error), ("path",)) from error


def make_accelerator(config: AcceleratorConfig, run_folder: Path) -> Accelerator:
    """Build the Accelerator; its trackers write to the run folder."""
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
    """Build the loaders of the evaluation sets, except passed loaders."""
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
    """Build the hooks by name, ``checkpoint`` last.

    Args:
        experiment: Experiment that describes the hooks.
        given: Hooks in place of described ones, or after them; None removes one.
        evaluation: Loaders by name, for hooks that evaluate.
        folder: Run folder, the base of relative paths.
    """
    described = {**experiment.hooks, CHECKPOINT: experiment.checkpoint}
    names = dict.fromkeys([*experiment.hooks, *given])
    names.pop(CHECKPOINT, None)
    built: dict[str, PipelineHooks] = {}
    for name in [*names, CHECKPOINT]:
        hook = given[name] if name in given else described[name]
        if isinstance(hook, PipelineHooks):
            built[name] = hook
        elif hook is not None and name in given:
            built[name] = make_hook(hook, None, evaluation)
        elif hook is not None:
            with building(*([name] if name == CHECKPOINT else ["hooks", name])):
                built[name] = make_hook(hook, folder, evaluation)
    return built


def _make_model(part: Any) -> torch.nn.Module:
    try:
        model: torch.nn.Module = part()
    except KeyError as error:
        if not getattr(getattr(part, "func", None), "__module__", "").startswith("torchvision."):
            raise
        raise ValueError(f"torchvision has no weights named {error}") from error
    return model


def _with_options(model: torch.nn.Module, experiment: ExperimentFields) -> torch.nn.Module:
    """Enable gradient checkpointing, and compile the model at the first step, as described."""
    if (modules := experiment.gradient_checkpointing) is not False:
        with building("gradient_checkpointing"):
            enable_gradient_checkpointing(model, None if modules is True else modules)
    if experiment.compile is None:
        return model
    options = field_values(experiment.compile)
    with building("compile"):
        try:
            compiled: Any = torch.compile(model, **{n: v for n, v in options.items() if v != {}})
        except RuntimeError as error:  # an unknown backend or option
            raise ConfigBuildError(f"{type(error).__name__}: {error}") from error
    made: torch.nn.Module = compiled
    return made


def with_data(experiment: FieldsT, loaders: Mapping[str, Iterable[Any]] | None = None) -> FieldsT:
    """Replace each ``{from_data: NAME}`` by a value of a loader's dataset.

    Args:
        experiment: Experiment, returned as given without such values.
        loaders: Loaders by name, ``train`` for the training data; by default those of the named
            datasets are built.

    Raises:
        ConfigFieldError: There is no such dataset or value, or the value does not fit.
    """
    parts = {name: getattr(experiment, name) for name in FIELDS_FROM_DATA}
    parts = {name: part for name, part in parts.items() if named_datasets(part)}
    if not parts:
        return experiment
    known: dict[str, Any] = dict(loaders or {})
    if loaders is None:
        known = {**experiment.data.evaluation, TRAIN: experiment.data.train}
        needed = set().union(*map(named_datasets, parts.values()))
        for name in (name for name in known if name in needed):
            with building("data", *([TRAIN] if name == TRAIN else ["evaluation", name])):
                known[name] = make_loader(_described(known[name], "dataloader"))

    def read(entry: Mapping[str, str]) -> Any:
        name = entry.get("dataset", TRAIN)
        if name not in known:
            advice = suggest_name(name, known, "there is")
            raise ConfigFieldError(f"there is no dataset {name!r}; {advice}", ("dataset",))
        with at_path(FROM_DATA):
            return read_value(getattr(known[name], "dataset", known[name]), entry[FROM_DATA])

    for name, part in parts.items():
        with building(name):
            parts[name] = replaced(part, read)
    return experiment.model_copy(update=parts)


def _described(part: Any, name: str) -> Any:
    if part is None:
        raise ConfigFieldError(f"is null and not passed; call build({name}=...)")
    return part
