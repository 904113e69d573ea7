"""Evaluation of saved weights, and predictions, on the data sets of an experiment."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.experiment.build import (
    make_accelerator,
    make_hook,
    make_loader,
    make_processor,
    with_data,
)
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.construction import building
from robo_orchard_lab.experiment.initial_weights import SavedWeights
from robo_orchard_lab.experiment.parts import LoaderConfig
from robo_orchard_lab.experiment.run_checkpoints import RunCheckpoints
from robo_orchard_lab.experiment.run_folder import NoRunError
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.distributed.failure_watch import fail_together
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import KeepBestConfig, ValidationHookConfig
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.predictions import Predictions
from robo_orchard_lab.pipeline.run.run_path import in_run_folder

OWN_WEIGHTS = "model"
"""Name of the model's own weights, next to names of hooks."""


def best_weights(
    experiment: ExperimentConfig, run_folder: Path, checkpoints: RunCheckpoints
) -> SavedWeights:
    """Read the best weights of a run: the file of a `KeepBest`, or the best checkpoint.

    Raises:
        NoRunError: The run has neither.
        ConfigError: One checkpoint is selected.
        CheckpointError: The best checkpoint is damaged.
    """
    checkpoints.check_best()
    for config in experiment.hooks.values():
        if isinstance(config, KeepBestConfig):
            path = Path(in_run_folder(config, run_folder).path)
            if path.is_file():
                return SavedWeights.from_file(path)
    try:
        return SavedWeights.from_checkpoint(checkpoints.pick(best=True))
    except NoRunError:
        raise NoRunError(
            f"the best weights of {run_folder} are unknown: it has no file of a KeepBest and no "
            "checkpoint.monitor; omit --best for the newest checkpoint"
        ) from None


def evaluate(
    experiment: ExperimentConfig,
    saved: SavedWeights,
    sets: Sequence[str] = (),
    *,
    weights: Sequence[str] = (),
    max_batches: int | None = None,
) -> dict[str, float]:
    """Evaluate saved weights as the `ValidationHook`s of the run do.

    Each hook uses its sets, its metrics, and its weights, such as a moving average. A named set
    that no hook uses, such as a test set, gets the metrics of the first hook. Without such a hook,
    the losses on each set are computed.

    Args:
        experiment: Experiment of the run.
        saved: Weights to evaluate.
        sets: Names of evaluation and test sets; by default all evaluation sets.
        weights: Names of hooks whose weights to use, and `OWN_WEIGHTS` for the model's own; by
            default those of the run's hooks.
        max_batches: Use only the first batches of each set, instead of the hooks' limits.

    Returns:
        Values by name, such as ``eval/val/loss``; with several weights, ``eval/val/EMA/loss``.

    Raises:
        ConfigError: A set or weights don't exist, a part can't be built, or there is nothing to
            measure.
        StateError: The weights belong to another model.
    """
    with experiment.located(), _accelerator_of(experiment) as accelerator:
        experiment = with_data(experiment)
        hooks = _validation_hooks(experiment, saved, sets, weights, max_batches)
        with _loaded(experiment, saved, hooks, accelerator) as args:
            for measure in args.run.evaluations.values():
                measure(args)
            args.metrics.flush(log=True, accelerator=accelerator)
            values = {value.name: value.value for value in args.metrics.last_values()}
        if not values:
            raise ConfigFieldError(
                "there is nothing to measure: it returns no loss in an evaluation, and no "
                "ValidationHook has metrics; return a loss or named values from "
                "evaluation_forward, or add metrics to the hook",
                ("batch_processor",),
            )
        return values


def predict(
    experiment: ExperimentConfig,
    saved: SavedWeights,
    data: str,
    *,
    weights: str | None = None,
    max_batches: int | None = None,
) -> Predictions:
    """Return the outputs for each sample of a data set, in the order of its dataset, on every rank.

    The set is loaded without shuffling and without ``drop_last``.

    Args:
        experiment: Experiment of the run.
        saved: Weights to use.
        data: Name of an evaluation or test set, or ``train``.
        weights: Name of the hook whose weights to use; None for the model's own.
        max_batches: Use only the first batches.

    Raises:
        ConfigError: The set or the weights don't exist, or a part can't be built.
        StateError: The weights belong to another model.
        BatchProcessorError: The outputs have no row for each sample.
    """
    with evaluating(experiment, saved, data, weights=weights, max_batches=max_batches) as (_, one):
        return one.predict()[data]


@contextmanager
def evaluating(
    experiment: ExperimentConfig,
    saved: SavedWeights,
    data: str,
    *,
    weights: str | None,
    max_batches: int | None,
) -> Iterator[tuple[PipelineHookArgs, Evaluator]]:
    """Build the model with saved weights, and an evaluator of one data set.

    The arguments are those of :func:`predict`.
    """
    with experiment.located(), _accelerator_of(experiment) as accelerator:
        path, described = _find_set(experiment, data)
        experiment = with_data(experiment)
        keepers = _keepers(experiment, saved, [weights])
        if described.batch_sampler is None:
            described = described.replace(shuffle=False, drop_last=False)
        with building(*path):
            loader = make_loader(described)
        with _loaded(experiment, saved, keepers, accelerator) as args, args.run.applied(weights):
            yield (
                args,
                Evaluator(
                    args.model,
                    args.batch_processor,
                    {data: loader},
                    accelerator=accelerator,
                    max_batches=max_batches,
                    who="predict",
                ),
            )


@contextmanager
def _accelerator_of(experiment: ExperimentConfig) -> Iterator[Accelerator]:
    """Create the accelerator, which starts the process group; its ranks fail together."""
    for part in ("model", "batch_processor"):
        if getattr(experiment, part) is None:
            raise ConfigFieldError(
                "is null; evaluate in the script that passes it to build()", (part,)
            )
    set_seed(experiment.seed)
    accelerator = make_accelerator(experiment.accelerator, experiment.folder())
    with fail_together():
        yield accelerator


@contextmanager
def _loaded(
    experiment: ExperimentConfig,
    saved: SavedWeights,
    hooks: Mapping[str, PipelineHooks],
    accelerator: Accelerator,
) -> Iterator[PipelineHookArgs]:
    """Build the model with its saved weights, and begin the hooks."""
    with building("model"):
        assert experiment.model is not None
        model = experiment.model()
    saved.load_into(model)
    with building("batch_processor"):
        processor = make_processor(experiment.batch_processor)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    run = PipelineRun.standalone(batch_processor=processor, accelerator=accelerator, model=model)
    run.locate = experiment.locate
    args = PipelineHookArgs(run)
    with PipelineHooks.from_hooks(hooks).begin("on_loop", args):
        yield args


def _validation_hooks(
    experiment: ExperimentConfig,
    saved: SavedWeights,
    sets: Sequence[str],
    weights: Sequence[str],
    max_batches: int | None,
) -> dict[str, PipelineHooks]:
    """Build the hooks that evaluate, for the wanted sets, and the hooks that keep their weights."""
    found = {n: c for n, c in experiment.hooks.items() if isinstance(c, ValidationHookConfig)}
    own = {name for config in found.values() for name in config.dataloaders or ()}
    data = experiment.data
    known = [*data.evaluation, *(data.test or ()), *own]
    for name in sets:
        if name not in known:
            raise _unknown_set(name, known)
    if not (data.evaluation or own or sets):
        raise ConfigFieldError("there are no evaluation sets; add them to data.evaluation")
    found = found or {"evaluation": ValidationHookConfig()}
    plans = []  # name in the file, name here, config, sets
    for name, config in found.items():
        theirs = [*(data.evaluation if config.dataloaders is None else config.dataloaders)]
        used = [n for n in theirs if n in (config.sets or theirs) and n in (sets or theirs)]
        plans.append((name, name, config, used))
    if rest := [name for name in sets if not any(name in used for *_, used in plans)]:
        name, first = next(iter(found.items()))
        new_name = f"{name} on {', '.join(rest)}"
        plans.append((name, new_name, first.replace(dataloaders=None), rest))
    wanted = {each for *_, config, used in plans if config.dataloaders is None for each in used}
    loaders = _loaders(experiment, wanted)
    named = {each: None if each == OWN_WEIGHTS else each for each in weights}
    hooks = _keepers(experiment, saved, named.values())
    for name, new_name, config, used in plans:
        if not used:
            continue
        with building("hooks", name):
            chosen: Any = config.weights if saved.hooks is not None else None  # a file has them
            if named:
                chosen = named if len(named) > 1 else named[weights[0]]
            keepers = chosen.values() if isinstance(chosen, Mapping) else [chosen]
            hooks |= _keepers(experiment, saved, [each for each in keepers if each not in hooks])
            limits: Any = config.max_batches if max_batches is None else max_batches
            if isinstance(limits, Mapping):
                limits = {n: m for n, m in limits.items() if n in used or n not in known} or None
            config = config.replace(sets=used, weights=chosen, max_batches=limits)
            hooks[new_name] = make_hook(config, experiment.folder(), loaders)
    return hooks


def _loaders(experiment: ExperimentConfig, names: Collection[str]) -> dict[str, Iterable[Any]]:
    """Build loaders of evaluation and test sets."""
    loaders: dict[str, Iterable[Any]] = {}
    for kind in ("evaluation", "test"):
        for name, loader in (getattr(experiment.data, kind) or {}).items():
            if name in names:
                with building("data", kind, name):
                    loaders[name] = make_loader(loader)
    return loaders


def _unknown_set(name: str, known: Collection[str]) -> ConfigFieldError:
    return ConfigFieldError(
        f"there is no data set {name!r}; {suggest_name(name, known, 'expected one of')}"
    )


def _find_set(experiment: ExperimentConfig, name: str) -> tuple[tuple[str, ...], LoaderConfig]:
    """Return the path and the configuration of a data set by its name."""
    data = experiment.data
    sets: dict[str, Any] = {"train": (("data", "train"), data.train)}
    for kind in ("evaluation", "test"):
        for each, loader in (getattr(data, kind) or {}).items():
            sets[each] = (("data", kind, each), loader)
    if name not in sets:
        raise _unknown_set(name, sets)
    path, loader = sets[name]
    if loader is None:
        raise ConfigFieldError("is null; predict in the script that passes it to build()", path)
    return path, loader


def _keepers(
    experiment: ExperimentConfig, saved: SavedWeights, names: Iterable[str | None]
) -> dict[str, PipelineHooks]:
    """Build hooks that keep weights, with their saved states."""
    keepers: dict[str, PipelineHooks] = {}
    states = saved.hooks or {}
    for name in filter(None, names):
        problem = f"{saved.path} has no weights of a hook {name!r}"
        if name not in experiment.hooks or name not in states:
            advice = suggest_name(name, [*states], "hooks with a saved state:")
            if saved.hooks is None:
                advice = "it has the weights of one model; name a checkpoint of the run"
            raise ConfigFieldError(f"{problem}; {advice}")
        keeper = make_hook(experiment.hooks[name], experiment.folder(), {})
        if not hasattr(keeper, "applied"):
            raise ConfigFieldError(f"{problem}; name an EMA")
        keeper.load_state_dict(states[name])
        keepers[name] = keeper
    return keepers
