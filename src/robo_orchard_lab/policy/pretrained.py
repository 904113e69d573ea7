"""Policies saved for use without a trainer and a dataset: `save_policy`, `load_policy`.

The folder is that of `SaveModel`: ``config.json`` with ``class_type`` and the arguments of the
policy's class, ``model.safetensors`` with the weights, the statistics of normalizers included, and
the model card ``README.md``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robo_orchard_core.utils.config import Config, ConfigError, Trust, TrustLike
from robo_orchard_core.utils.config.formats import decode_utf8, read
from robo_orchard_lab.experiment.catalogue import ExperimentTrust, with_definitions
from robo_orchard_lab.experiment.initial_weights import SavedWeights
from robo_orchard_lab.experiment.parts import ModelPart
from robo_orchard_lab.pipeline.checkpoint import non_finite_names
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.model_card import ModelCardConfig
from robo_orchard_lab.pipeline.pretrained_folder import (
    CONFIG_FILE,
    MODEL_FOLDER,
    WEIGHTS_FILE,
    config_json,
    folder_writer,
    model_facts,
)
from robo_orchard_lab.pipeline.run.durable import make_folder, replace_folder
from robo_orchard_lab.pipeline.run.run_info import versions
from robo_orchard_lab.pipeline.trainer.rank_state import check_tensors
from robo_orchard_lab.policy.rollouts import check_policy

_MAX_CONFIG_BYTES = 16 << 20


class _PolicyFile(Config):
    policy: ModelPart


def save_policy(
    policy: torch.nn.Module,
    folder: str | os.PathLike[str],
    card: ModelCardConfig | None = None,
) -> None:
    """Write a policy and its model card to a folder, which `load_policy` reads.

    The folder is replaced atomically.

    Args:
        policy: with ``config``, a mapping of ``class_type`` and the arguments of its class.
        folder: created if it does not exist; other files in it, and an edited card, stay.
        card: license, name, tags and language in the card.

    Raises:
        PipelineConfigError: the config can't be written as JSON.
        ValueError: the policy has no config with ``class_type``, or a weight is not finite.
    """
    config = getattr(policy, "config", None)
    if not isinstance(config, Mapping) or "class_type" not in config:
        raise ValueError(
            f"expected a policy with config = {{'class_type': 'module:Class', ...}}, found "
            f"{type(policy).__name__}; set policy.config to its class and arguments"
        )
    weights = policy.state_dict()
    if names := non_finite_names(weights):
        raise ValueError(f"expected finite weights, found NaN or infinity in {names[0]}")
    path, text = Path(folder), config_json(policy, "save_policy")
    facts = model_facts(policy, type(policy).__name__, about={"versions": versions()})
    write = folder_writer(path, policy, weights, facts, card, who="save_policy", config=text)
    make_folder(path.parent)
    replace_folder(path, write)


def load_policy(path: str | os.PathLike[str], trust: TrustLike = ()) -> Any:
    """Load a policy in evaluation mode on the CPU; a stranger's folder is safe.

    No code runs but that of the classes in the catalogue of experiment files and of trusted ones.
    The class is built on torch's meta device first, so its constructor must not read tensors.

    Args:
        path: folder of `save_policy` or `SaveModel`, or a run folder with ``pretrained_model/``.
        trust: packages, modules, or classes such as ``my_team.policies:Mine``, whose classes the
            folder may name.

    Raises:
        ConfigError: there is no config, or it is invalid or names code that is not trusted.
        CheckpointError: the weights can't be read.
        StateError: the weights belong to another policy.
    """
    folder = policy_folder(path)
    if folder is None:
        raise ConfigError(
            f"expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or a run folder with "
            f"{MODEL_FOLDER}/, found {os.fspath(path)}"
        )
    file = folder / CONFIG_FILE
    try:
        make = _read_config(file, trust).policy
    except ConfigError as error:
        error.source = error.source or str(file)
        raise
    saved = SavedWeights.from_file(folder / WEIGHTS_FILE)
    try:
        # Without memory at first: the sizes in a stranger's config may be those of no weights.
        with torch.device("meta"):
            described = make()
        if problem := check_policy(described):
            raise ConfigError(f"{file}: {problem}")
        what = f"{saved.path} has the weights of another policy than {CONFIG_FILE}"
        check_tensors(what, described.state_dict(), saved.weights)
        policy = make()
    except (ConfigError, StateError):
        raise
    except Exception as error:  # of any constructor
        raise ConfigError(f"{file}: can't build the policy: {error}") from error
    saved.load_into(policy)
    return policy.eval()


def policy_folder(path: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a saved policy: the path, or ``pretrained_model/`` in it; or None."""
    candidates = (Path(path), Path(path) / MODEL_FOLDER)
    return next((folder for folder in candidates if (folder / CONFIG_FILE).is_file()), None)


def _read_config(file: Path, trust: TrustLike) -> Any:
    with file.open("rb") as opened:
        data = opened.read(_MAX_CONFIG_BYTES + 1)
    if len(data) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"expected at most {_MAX_CONFIG_BYTES} bytes")
    document = with_definitions(read(decode_utf8(data), "json"))
    if not isinstance(document, dict) or "class_type" not in document:
        found = ", ".join(document) if isinstance(document, dict) else "no mapping"
        raise ConfigError(f"expected 'class_type' and the arguments of a policy, found {found}")
    if not isinstance(trust, Trust):
        trust = ExperimentTrust.of(trust, pyproject=False).trust
    return _PolicyFile.from_dict({"policy": document}, trust=trust)


def export_policy(
    policy: torch.nn.Module,
    path: str | os.PathLike[str],
    observation: Mapping[str, torch.Tensor],
) -> None:
    """Write ``predict_actions`` as a program of torch.export, which needs none of this package.

    ``torch.export.load(path).module()(observation)`` returns the same actions, for any batch size.
    A policy whose predictions draw random numbers draws them from torch's RNG there as well.

    Args:
        policy: in evaluation mode, on the CPU.
        path: file to write, ``*.pt2``.
        observation: example, with two rows or more.
    """
    batch = torch.export.Dim("batch", min=1)
    dynamic = {"observation": {name: {0: batch} for name in observation}}
    program = torch.export.export(
        _Actions(policy), (dict(observation),), dynamic_shapes=dynamic, strict=False
    )
    torch.export.save(program, os.fspath(path))


class _Actions(torch.nn.Module):
    """Module whose forward pass predicts actions."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        actions: torch.Tensor = self.policy.predict_actions(observation)
        return actions
