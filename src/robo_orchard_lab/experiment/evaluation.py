"""Evaluation of saved weights on the evaluation sets of an experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_core.utils.config.errors import unknown_field
from robo_orchard_lab.experiment.build import (
    building,
    make_accelerator,
    make_hook,
    make_loader,
    make_processor,
)
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.existing_run import RunCheckpoints
from robo_orchard_lab.experiment.run_folder import NoRunError
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.checkpoint import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.distributed.failure_watch import fail_together
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import KeepBestConfig, ValidationHookConfig
from robo_orchard_lab.pipeline.model import plain_name
from robo_orchard_lab.pipeline.run.run_path import in_run_folder
from robo_orchard_lab.pipeline.trainer.rank_state import check_tensors


@dataclass(frozen=True, slots=True)
class SavedWeights:
    """Weights of a model, with the states of hooks."""

    path: Path
    """Checkpoint or file of the weights."""
    weights: Mapping[str, Any]
    """State dict with the names of the unwrapped model."""
    hooks: Mapping[str, Any] | None = None
    """States of hooks by name; None if only the weights were saved."""
    step: int | None = None
    """Number of completed steps, if known."""

    @classmethod
    def from_checkpoint(cls, path: Path) -> SavedWeights:
        """Read the weights of a trainer's checkpoint, without the optimizer state.

        Raises:
            CheckpointError: The checkpoint is damaged, or was not saved by a trainer.
        """
        with OpenCheckpoint(path, ReadLimits()) as opened:
            step = opened.manifest.step
            parts = {part: opened.load(0, only=part) for part in ("model", "trainer", "state")}
        try:
            weights = {
                **parts["model"].parts["model"],
                **parts["trainer"].parts["trainer"]["model_extra"],
            }
            hooks = parts["state"].rank_parts["state"]["hooks"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of a trainer: no {error}") from None
        return cls(path, weights, hooks, step)

    @classmethod
    def from_file(cls, path: Path) -> SavedWeights:
        """Read the weights of a safetensors file."""
        return cls(path, load_file(path))


def best_weights(
    experiment: ExperimentConfig, run_folder: Path, checkpoints: RunCheckpoints
) -> SavedWeights:
    """Read the best weights of a run: the file of a `KeepBest`, or the best checkpoint.

    Raises:
        NoRunError: The run has neither.
        CheckpointError: The best checkpoint is damaged.
    """
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
            "checkpoint.monitor"
        ) from None


@dataclass(frozen=True, slots=True)
class _Measured:
    """Evaluating hooks, and loaders for the loss."""

    hooks: dict[str, PipelineHooks] = field(default_factory=dict)
    loaders: dict[str, Iterable[Any]] = field(default_factory=dict)
    """Loaders that no hook evaluates, for the loss only."""


def evaluate(
    experiment: ExperimentConfig, saved: SavedWeights, sets: Sequence[str] = ()
) -> dict[str, float]:
    """Evaluate saved weights with the `ValidationHook`s of the run.

    Each hook uses its sets, its metrics, and its weights, such as a moving average. Without such
    a hook, the mean loss on each set is computed.

    Args:
        experiment: Experiment of the run.
        saved: Weights to evaluate.
        sets: Names of evaluation sets; by default all.

    Returns:
        Values by name, such as ``eval/val/loss``.

    Raises:
        ConfigError: A set doesn't exist, or a part can't be built.
        StateError: The weights belong to another model.
    """
    for part in ("model", "batch_processor"):
        if getattr(experiment, part) is None:
            raise ConfigFieldError(
                "is null; evaluate in the script that passes it to build()", (part,)
            )
    set_seed(experiment.seed)
    accelerator = make_accelerator(experiment.accelerator, experiment.folder())
    with fail_together():
        return _evaluate(experiment, saved, sets, accelerator)


def _evaluate(
    experiment: ExperimentConfig,
    saved: SavedWeights,
    sets: Sequence[str],
    accelerator: Accelerator,
) -> dict[str, float]:
    measured = _measured(experiment, saved, sets)
    with building("model"):
        assert experiment.model is not None
        model = experiment.model()
    _load(model, saved)
    with building("batch_processor"):
        processor = make_processor(experiment.batch_processor)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    found: dict[str, float] = {}
    if measured.loaders:
        evaluator = Evaluator(model, processor, measured.loaders, accelerator=accelerator)
        found |= {f"eval/{name}": value for name, value in evaluator.evaluate().items()}
    run = PipelineRun.standalone(batch_processor=processor, accelerator=accelerator, model=model)
    args = PipelineHookArgs(run)
    with PipelineHooks.from_hooks(measured.hooks).begin("on_loop", args):
        for measure in run.evaluations.values():
            measure(args)
        run.metrics.flush(log=True, accelerator=accelerator)
        found |= {value.name: value.value for value in run.metrics.last_values()}
    return found


def _measured(experiment: ExperimentConfig, saved: SavedWeights, sets: Sequence[str]) -> _Measured:
    described = experiment.data.evaluation
    validations = {
        name: config
        for name, config in experiment.hooks.items()
        if isinstance(config, ValidationHookConfig)
    }
    own = {name for config in validations.values() for name in config.dataloaders or ()}
    for name in sets:
        if name not in {*described, *own}:
            raise unknown_field(name, {*described, *own}, "the experiment", ("data", "evaluation"))
    wanted = {*(sets or {*described, *own})}
    loaders: dict[str, Iterable[Any]] = {}
    for name, loader in described.items():
        if name in wanted:
            with building("data", "evaluation", name):
                loaders[name] = make_loader(loader)
    found = _Measured()
    if not validations:
        if not loaders:
            raise ConfigFieldError("there are no evaluation sets; add them to data.evaluation")
        found.loaders.update(loaders)
    for name, config in validations.items():
        with building("hooks", name):
            _add_validation(found, name, config, loaders, wanted, experiment, saved)
    return found


def _add_validation(
    found: _Measured,
    name: str,
    config: ValidationHookConfig,
    loaders: Mapping[str, Iterable[Any]],
    wanted: set[str],
    experiment: ExperimentConfig,
    saved: SavedWeights,
) -> None:
    """Add a validation hook, after the hook with its weights."""
    folder = experiment.folder()
    theirs = config.dataloaders if config.dataloaders is not None else loaders
    names = [n for n in theirs if n in wanted and (config.sets is None or n in config.sets)]
    if not names:
        return
    changes: dict[str, Any] = {"sets": names}
    weights = config.weights
    if weights is not None and saved.hooks is None:
        changes["weights"] = None  # the file has the kept weights
    elif weights is not None and weights not in found.hooks:
        if weights not in experiment.hooks or weights not in (saved.hooks or {}):
            raise ConfigFieldError(
                f"{saved.path} has no weights of a hook {weights!r}", ("weights",)
            )
        keeper = make_hook(experiment.hooks[weights], folder, {})
        keeper.load_state_dict((saved.hooks or {})[weights])
        found.hooks[weights] = keeper
    found.hooks[name] = make_hook(config.replace(**changes), folder, loaders)


def _load(model: torch.nn.Module, saved: SavedWeights) -> None:
    live = model.state_dict()
    entries = {plain_name(name): name for name in live}
    state = {entries.get(name, name): value for name, value in saved.weights.items()}
    check_tensors(f"{saved.path} has the weights of another model", live, state)
    model.load_state_dict(state)
