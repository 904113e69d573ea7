"""Evaluation of saved weights on the evaluation sets of an experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from robo_orchard_lab.experiment.run_checkpoints import RunCheckpoints
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
    """Weights of a model, with the states of hooks.

    Attributes:
        path: Checkpoint or file of the weights.
        weights: State dict with the names of the unwrapped model.
        hooks: States of hooks by name; None if only the weights were saved.
        step: Number of completed steps, if known.
    """

    path: Path
    weights: Mapping[str, Any]
    hooks: Mapping[str, Any] | None = None
    step: int | None = None

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

    def load_into(self, model: torch.nn.Module) -> None:
        """Load the weights into a model of any wrapping."""
        live = model.state_dict()
        entries = {plain_name(name): name for name in live}
        state = {entries.get(name, name): value for name, value in self.weights.items()}
        check_tensors(f"{self.path} has the weights of another model", live, state)
        model.load_state_dict(state)


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
    validations = {
        name: config
        for name, config in experiment.hooks.items()
        if isinstance(config, ValidationHookConfig)
    }
    loaders = _loaders(experiment, validations.values(), sets)
    if not (loaders or validations):
        raise ConfigFieldError("there are no evaluation sets; add them to data.evaluation")
    hooks: dict[str, PipelineHooks] = {}
    for name, config in validations.items():
        theirs = config.dataloaders if config.dataloaders is not None else loaders
        own = theirs if config.sets is None else config.sets
        names = [each for each in theirs if each in own and each in (sets or theirs)]
        if names:
            with building("hooks", name):
                weights = config.weights if saved.hooks is not None else None  # a file has them
                if weights is not None and weights not in hooks:
                    hooks[weights] = _keeper(weights, experiment, saved)
                config = config.replace(sets=names, weights=weights)
                hooks[name] = make_hook(config, experiment.folder(), loaders)
    with building("model"):
        assert experiment.model is not None
        model = experiment.model()
    saved.load_into(model)
    with building("batch_processor"):
        processor = make_processor(experiment.batch_processor)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    if not validations:
        evaluator = Evaluator(model, processor, loaders, accelerator=accelerator)
        return {f"eval/{name}": value for name, value in evaluator.evaluate().items()}
    run = PipelineRun.standalone(batch_processor=processor, accelerator=accelerator, model=model)
    args = PipelineHookArgs(run)
    with PipelineHooks.from_hooks(hooks).begin("on_loop", args):
        for measure in run.evaluations.values():
            measure(args)
        run.metrics.flush(log=True, accelerator=accelerator)
        return {value.name: value.value for value in run.metrics.last_values()}


def _loaders(
    experiment: ExperimentConfig,
    validations: Iterable[ValidationHookConfig],
    sets: Sequence[str],
) -> dict[str, Iterable[Any]]:
    """Build the wanted loaders of the experiment; hooks may have others."""
    described = experiment.data.evaluation
    known = {*described, *(name for config in validations for name in config.dataloaders or ())}
    for name in sets:
        if name not in known:
            raise unknown_field(name, known, "the experiment", ("data", "evaluation"))
    loaders: dict[str, Iterable[Any]] = {}
    for name, loader in described.items():
        if name in (sets or described):
            with building("data", "evaluation", name):
                loaders[name] = make_loader(loader)
    return loaders


def _keeper(name: str, experiment: ExperimentConfig, saved: SavedWeights) -> PipelineHooks:
    """Build the hook that keeps weights, with its saved state."""
    states = saved.hooks or {}
    if name not in experiment.hooks or name not in states:
        raise ConfigFieldError(f"{saved.path} has no weights of a hook {name!r}", ("weights",))
    keeper = make_hook(experiment.hooks[name], experiment.folder(), {})
    keeper.load_state_dict(states[name])
    return keeper
