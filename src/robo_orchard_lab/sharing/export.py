"""Model of a checkpoint as a folder that `from_pretrained` or `load_policy` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robo_orchard_lab.experiment.build import with_data
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.construction import building
from robo_orchard_lab.experiment.initial_weights import SavedWeights
from robo_orchard_lab.pipeline.checkpoint.listing import Contents, read_contents
from robo_orchard_lab.pipeline.hooks import SaveModelConfig
from robo_orchard_lab.pipeline.model_card import ModelCardConfig, ModelFacts
from robo_orchard_lab.pipeline.pretrained_folder import (
    WEIGHTS_FILE,
    config_json,
    experiment_text,
    folder_writer,
    has_own_writer,
    model_facts,
    plain_usage,
)
from robo_orchard_lab.pipeline.run.durable import make_folder, replace_folder
from robo_orchard_lab.report.files import mapping, text

_WHO = "export"


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    run_folder: Path | None = None,
    experiment: ExperimentConfig | None = None,
    card: ModelCardConfig | None = None,
) -> None:
    """Write the model of a checkpoint to a folder: card, config and weights.

    Args:
        checkpoint: Checkpoint of a trainer.
        folder: Folder to write; an existing one is replaced, and other files in it stay.
        run_folder: Folder of the run.
        experiment: Experiment that builds the model; without, the weights have no config.
        card: Fields of the card; by default those of the experiment's ``SaveModel``.

    Raises:
        CheckpointError: The checkpoint is damaged, or not of a trainer.
        ConfigError: The model can't be built.
        StateError: The weights belong to another model.
    """
    contents = read_contents(checkpoint, tensors=False)
    saved = SavedWeights.from_checkpoint(checkpoint)
    model = None
    if experiment is not None and experiment.model is not None:
        with experiment.located():
            described = with_data(experiment).model
            assert described is not None
            with building("model"):
                model = described()
        saved.load_into(model)
        model.eval()
    about: dict[str, Any] = {
        "progress": {k: v for k, v in contents.progress.items() if isinstance(v, int)},
        "metrics": contents.info.metrics,
        "about": contents.info.metadata,
        "experiment": experiment_text(run_folder),
    }
    # A script's run has its checkpoints in a folder, too.
    name = (checkpoint.resolve().parents[1] if run_folder is None else run_folder.resolve()).name
    if model is None:
        facts = _facts_without_model(name, saved.weights, contents, about)
        weights, config = _tensors(saved.weights), None
    else:
        facts = model_facts(model, name, **about)
        weights = _tensors(model.state_dict())
        config = None if has_own_writer(model) else config_json(model, _WHO)
    if card is None and experiment is not None:
        card = card_of(experiment)
    write = folder_writer(
        *(folder, model, weights, facts, card),
        who=_WHO,
        config=config,
        metadata={"global_step_id": str(contents.info.step)},
    )
    make_folder(folder.absolute().parent)
    replace_folder(folder, write)


def is_evaluated_alike(model: Path, checkpoint: Path, document: Mapping[str, Any]) -> bool:
    """Return True if `evaluate` gives the same values for an exported model as for a checkpoint.

    Not for weights of hooks, such as an EMA, and not for other weights or names of weights.

    Args:
        model: Folder of the exported model.
        checkpoint: Checkpoint that `evaluate` uses before the run is shared.
        document: Experiment file of the run.
    """
    for hook in map(mapping, mapping(document.get("hooks")).values()):
        is_evaluation = text(hook.get("class_type")).endswith("ValidationHook")
        if is_evaluation and hook.get("weights") is not None:
            return False
    if not (model / WEIGHTS_FILE).is_file():
        return False
    exported = SavedWeights.from_file(model / WEIGHTS_FILE).weights
    saved = SavedWeights.from_checkpoint(checkpoint).weights
    return exported.keys() == saved.keys() and all(
        isinstance(saved[name], torch.Tensor) and torch.equal(exported[name], saved[name])
        for name in exported
    )


def card_of(experiment: ExperimentConfig) -> ModelCardConfig:
    """Return the model card of the experiment's first `SaveModel` hook, else an empty one."""
    cards = (c.card for c in experiment.hooks.values() if isinstance(c, SaveModelConfig))
    return next(cards, ModelCardConfig())


def changed_card(path: Path, fields: Mapping[str, Any]) -> bytes:
    """Return a card with other name, license, tags or language, and the same text.

    Raises:
        ConfigError: A field is invalid.
    """
    from huggingface_hub import ModelCard

    found = ModelCard.load(path)
    for name, value in ModelCardConfig.from_dict(dict(fields)).to_dict().items():
        if name in fields and name in ("license", "language"):
            found.data[name] = value
        elif name in fields and name == "tags":
            found.data.tags = list(dict.fromkeys([*(found.data.tags or []), *value]))
        elif name in fields and name == "name":
            found.data.model_name = value
    return str(found).encode()


def _facts_without_model(
    name: str, weights: Mapping[str, Any], contents: Contents, about: Mapping[str, Any]
) -> ModelFacts:
    configuration = contents.info.metadata.get("configuration")
    model = configuration.get("model") if isinstance(configuration, dict) else None
    model = model if isinstance(model, str) else ""
    return ModelFacts(
        name=name,
        model=model,
        parameters=sum(tensor.numel() for tensor in _tensors(weights).values()),
        library="pytorch",
        usage=plain_usage(model.rpartition(":")[2] or "Model"),
        **about,
    )


def _tensors(weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
