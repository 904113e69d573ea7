"""Measuring what a run has saved, on the evaluation sets of its experiment."""

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
from robo_orchard_lab.pipeline.distributed.sections import fail_together
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import KeepBestConfig, ValidationHookConfig
from robo_orchard_lab.pipeline.model import plain_name
from robo_orchard_lab.pipeline.run.run_path import in_run_folder
from robo_orchard_lab.pipeline.trainer.rank_state import check_tensors


@dataclass(frozen=True, slots=True)
class SavedWeights:
    """The weights of a model, and what hooks kept beside them."""

    path: Path
    """Where they are from."""
    weights: Mapping[str, Any]
    """By the names of the plain model, with what else its state has."""
    hooks: Mapping[str, Any] | None = None
    """The states of hooks by name; None where only the weights were saved."""
    step: int | None = None
    """How many steps were done, where that is known."""

    @classmethod
    def from_checkpoint(cls, path: Path) -> SavedWeights:
        """Those of a checkpoint that a trainer has saved; the optimizer's state is not read.

        Raises:
            CheckpointError: it is no such checkpoint, or not as it was written.
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
        """Those of a safetensors file."""
        return cls(path, load_file(path))


def best_weights(
    experiment: ExperimentConfig, run_folder: Path, checkpoints: RunCheckpoints
) -> SavedWeights:
    """The best weights of a run: what a `KeepBest` has written, or the best checkpoint.

    Raises:
        NoRunError: nothing says which are the best.
        CheckpointError: the best checkpoint is not as it was written.
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
            f"nothing says which weights of {run_folder} are the best: it has no KeepBest that has "
            "written any, and no checkpoint.monitor"
        ) from None


@dataclass(frozen=True, slots=True)
class _Measured:
    """What is measured together: loaders by name, and the hooks that say how."""

    hooks: dict[str, PipelineHooks] = field(default_factory=dict)
    loaders: dict[str, Iterable[Any]] = field(default_factory=dict)
    """What no hook evaluates on, for the loss alone."""


def evaluate(
    experiment: ExperimentConfig, saved: SavedWeights, sets: Sequence[str] = ()
) -> dict[str, float]:
    """The losses and metrics of saved weights, as the run's `ValidationHook` measure them.

    Each evaluates on its sets, with its metrics, and with the weights that it is told to, such as
    a moving average. Without such a hook, it is the mean loss on each set.

    Args:
        experiment: of the run.
        saved: what to measure.
        sets: names of the evaluation sets to measure on; by default all.

    Returns:
        The values by their names, such as ``eval/val/loss``.

    Raises:
        ConfigError: there is no such set, or a part can't be built.
        StateError: the weights are those of another model.
    """
    for part in ("model", "batch_processor"):
        if getattr(experiment, part) is None:
            raise ConfigFieldError(
                "is null, so that only the script that has it can measure", (part,)
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
            raise ConfigFieldError(
                "there is nothing to evaluate on; describe sets in data.evaluation"
            )
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
    """A hook that evaluates, and ahead of it the one whose weights it evaluates with."""
    folder = experiment.folder()
    theirs = config.dataloaders if config.dataloaders is not None else loaders
    names = [n for n in theirs if n in wanted and (config.sets is None or n in config.sets)]
    if not names:
        return
    changes: dict[str, Any] = {"sets": names}
    weights = config.weights
    if weights is not None and saved.hooks is None:
        changes["weights"] = None  # the file has those that were to be kept
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
