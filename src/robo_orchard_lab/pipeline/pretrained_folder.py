"""Folder of an exported model, in the layout of the Hugging Face Hub: card, config, weights.

A model with ``save_pretrained`` writes config and weights itself, such as those of Transformers,
Diffusers and LeRobot; ``from_pretrained`` of its class reads the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError

from robo_orchard_lab.pipeline.checkpoint import pack_weights
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import plain_model, plain_name
from robo_orchard_lab.pipeline.model_card import CARD_FILE as CARD_FILE
from robo_orchard_lab.pipeline.model_card import (
    PROJECT,
    ModelCardConfig,
    ModelFacts,
    is_own_card,
    model_card,
)
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.run.durable import write_file
from robo_orchard_lab.pipeline.sharding import plain_class

logger = job_logger(__name__)

MODEL_FOLDER = "pretrained_model"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_LIBRARIES = ("lerobot", "transformers", "diffusers")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_WEIGHTS = re.compile(r"(?P<base>.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_MAX_CARD_BYTES = 4 << 20
_MAX_EXPERIMENT_BYTES = 1 << 20


def model_facts(model: torch.nn.Module, name: str, **facts: Any) -> ModelFacts:
    """Return the facts of a model's card; ``facts`` are further fields of `ModelFacts`."""
    kind = plain_class(model)
    is_of_script = kind.__module__ == "__main__"
    reference = kind.__qualname__ if is_of_script else f"{kind.__module__}:{kind.__qualname__}"
    roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
    library = next((each for each in _LIBRARIES if each in roots), "pytorch")
    if has_own_writer(model):
        usage = f'model = {kind.__qualname__}.from_pretrained("FOLDER_OR_REPOSITORY")'
        if not is_of_script:
            usage = f"from {kind.__module__} import {kind.__qualname__}\n\n{usage}"
    elif callable(getattr(model, "predict_actions", None)):
        library = PROJECT
        usage = (
            "from robo_orchard_lab.policy import load_policy\n\n"
            'policy = load_policy("FOLDER")\nactions = policy.predict_actions(observation)'
        )
    else:
        usage = plain_usage(kind.__qualname__)
    count = sum(parameter.numel() for parameter in model.parameters())
    return ModelFacts(
        name=name, model=reference, parameters=count, library=library, usage=usage, **facts
    )


def plain_usage(kind: str) -> str:
    """Return Python code that loads a plain model's weights."""
    return (
        "from safetensors.torch import load_file\n\n"
        f"model = {kind}(...)\n"
        f'model.load_state_dict(load_file("{WEIGHTS_FILE}"))'
    )


def facts_of_run(run: PipelineRun) -> ModelFacts:
    """Return the facts of the model of a run at a commit point."""
    model = plain_model(run)
    return model_facts(
        model,
        plain_class(model).__name__ if run.folder is None else run.folder.resolve().name,
        progress=run.progress.state_dict(),
        metrics=run.metrics.values_at(run.progress.global_step_id),
        about=run.describe(),
        experiment=experiment_text(run.folder),
    )


def card_to_write(
    path: Path, facts: ModelFacts, card: ModelCardConfig | None = None
) -> bytes | None:
    """Return the card for a file; None if the file is a card that its author edited."""
    return None if _is_edited(path) else model_card(facts, card).encode()


def experiment_text(run_folder: Path | None) -> str:
    """Return the experiment file of a run, or nothing for the run of a script."""
    if run_folder is None or not (run_folder / "starts").is_dir():
        return ""
    try:
        with (run_folder / "config.yaml").open("rb") as file:
            return file.read(_MAX_EXPERIMENT_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def has_own_writer(model: torch.nn.Module) -> bool:
    """Return True for a model with ``save_pretrained``."""
    return callable(getattr(model, "save_pretrained", None))


def folder_writer(
    folder: Path,
    model: torch.nn.Module | None,
    weights: Mapping[str, torch.Tensor],
    facts: ModelFacts,
    card: ModelCardConfig | None = None,
    *,
    who: str,
    config: str | None,
    metadata: Mapping[str, str] | None = None,
) -> Callable[[Path], None]:
    """Return a function that fills an empty folder, from copies of the weights in host memory.

    Files of ``folder`` that an export does not write are kept, and so is a card that its author
    edited.

    Args:
        folder: Folder that the result will replace.
        model: Plain model; None if only its weights are known.
        weights: Complete weights by plain names.
        facts: Content of the card.
        card: Fields of the card that its author set.
        who: Name of the writer, for errors.
        config: `config_json` of the model, for a model without ``save_pretrained``.
        metadata: Metadata of a plain model's weights file.
    """
    text = model_card(facts, card).encode()
    write: Callable[[Path], None]
    if model is not None and has_own_writer(model):
        copies = _host_copies(model, weights)

        def write(new: Path) -> None:
            try:
                # In place of the model's own weights, which may be sharded, or not those of an EMA.
                torch.func.functional_call(_Saver(model), dict(copies), (new,))
            except SafetensorError as error:  # as on a full disk
                raise OSError(str(error)) from error
            _check_files(new, model, who)
    else:
        # "format" is required by transformers.
        packed = pack_weights(weights, {"format": "pt", **(metadata or {})})

        def write(new: Path) -> None:
            if config is not None:
                write_file(new / CONFIG_FILE, config.encode())
            write_file(new / WEIGHTS_FILE, packed)

    def fill(new: Path) -> None:
        write(new)
        (new / CARD_FILE).unlink(missing_ok=True)  # of PyTorchModelHubMixin
        write_file(new / CARD_FILE, text)
        _keep_others(folder, new)

    return fill


class _Saver(torch.nn.Module):
    """Module whose forward pass is ``save_pretrained`` of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]  # no tensor


def _host_copies(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Copy weights to host memory, by the names in `_Saver`; tied ones are one tensor."""
    copies: dict[str, torch.Tensor] = {}
    by_tensor: dict[int, torch.Tensor] = {}
    for name, live in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        saved = weights.get(plain_name(name))
        if saved is None:  # a buffer that is not saved
            continue
        if id(live) not in by_tensor:
            by_tensor[id(live)] = saved.detach().to("cpu", copy=True)
        copies[f"model.{name}"] = by_tensor[id(live)]
    return copies


def _check_files(folder: Path, model: torch.nn.Module, who: str) -> None:
    names = sorted(path.name for path in folder.rglob("*"))
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles or not any(name.endswith(".safetensors") for name in names):
        raise PipelineConfigError(
            f"{who}: expected safetensors from {type(model).__qualname__}.save_pretrained, found "
            f"{', '.join(pickles or names) or 'no file'}; write safetensors in save_pretrained"
        )


def _keep_others(old: Path, new: Path) -> None:
    """Add the other files of the old folder to the new one, as hard links where possible."""
    try:
        entries = [*os.scandir(old)]
    except FileNotFoundError:
        return
    written = {found["base"] for name in os.listdir(new) if (found := _WEIGHTS.fullmatch(name))}
    for entry in entries:
        found = _WEIGHTS.fullmatch(entry.name)
        target = new / entry.name
        if entry.name.endswith(".tmp") or (found and found["base"] in written):
            continue
        if entry.name == CARD_FILE and _is_edited(Path(entry.path)):
            target.unlink(missing_ok=True)
        if os.path.lexists(target):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, target, symlinks=True, copy_function=_link)
        elif entry.is_symlink():
            os.symlink(os.readlink(entry.path), target)
        else:
            _link(entry.path, target)


def _link(source: str, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)


def _is_edited(card: Path) -> bool:
    try:
        with card.open("rb") as file:
            return not is_own_card(file.read(_MAX_CARD_BYTES).decode("utf-8", "replace"))
    except OSError:
        return False


def config_json(model: torch.nn.Module, who: str) -> str | None:
    """Return the model's ``config`` as JSON; None without a config of a supported type.

    Raises:
        PipelineConfigError: the config contains a value that JSON can't represent.
    """
    # Hugging Face's ModelHubMixin keeps the constructor's arguments in _hub_mixin_config.
    config = getattr(model, "config", None) or getattr(model, "_hub_mixin_config", None)
    if config is None:
        is_mixin = any(kind.__name__ == "ModelHubMixin" for kind in type(model).__mro__)
        if is_mixin and not hasattr(model, "_hub_mixin_config"):
            logger.warning(
                "%s: expected the arguments of the model's constructor in _hub_mixin_config, as of "
                "huggingface_hub 2.4, found no such attribute; not writing %s: set model.config",
                *(who, CONFIG_FILE),
            )
        return None
    fields: Any
    if callable(getattr(config, "to_dict", None)):
        fields = config.to_dict()
    elif isinstance(config, pydantic.BaseModel):
        fields = config.model_dump(mode="json")
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.asdict(config)
    elif isinstance(config, Mapping):
        fields = dict(config)
    else:
        logger.warning(
            "%s: expected a model config with to_dict, or a dataclass, pydantic model or mapping, "
            "found %s; not writing %s",
            *(who, type(config).__qualname__, CONFIG_FILE),
        )
        return None
    try:
        return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise PipelineConfigError(
            f"{who}: the model's config can't be written as JSON: {error}; add a to_dict that "
            "returns only numbers, strings, lists and mappings"
        ) from error
