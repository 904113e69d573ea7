"""A state in a folder of files."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from robo_orchard_lab.pipeline.checkpoint.state_tree import decode_state, encode_state
from robo_orchard_lab.pipeline.errors import StateError

FORMAT_VERSION = 1
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
TENSOR_FILE = "tensors.safetensors"


def write_checkpoint(
    folder: str | os.PathLike[str], model: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Write a folder with the model's weights and everything else.

    ``model.safetensors`` loads into a plain model by itself; ``state.json`` and
    ``tensors.safetensors`` hold the rest. The folder appears when all of it is on the disk.

    Raises:
        FileExistsError: there is something by that name; it is left as it is.
        StateError: the state holds something that can't be saved.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; name a folder that doesn't")
    document, tensors = encode_state(state)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        save_file(_portable(model), temporary / MODEL_FILE)
        save_file(_portable(tensors), temporary / TENSOR_FILE)
        text = json.dumps({"version": FORMAT_VERSION, "state": document}, allow_nan=False)
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        for file in (*temporary.iterdir(), temporary):
            _flush(file)
        temporary.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_weights(
    path: str | os.PathLike[str], weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file, which replaces what is there when it is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        save_file(_portable(weights), temporary, metadata=dict(metadata))
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(folder: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], Any]:
    """The weights and the state that :func:`write_checkpoint` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        StateError: a file is missing or damaged, or of another version; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {folder}")
    try:
        document = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        model = load_file(folder / MODEL_FILE)
        tensors = load_file(folder / TENSOR_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise StateError(f"{folder} can't be read: {error}") from error
    version = document.get("version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise StateError(
            f"{folder / STATE_FILE}: expected version {FORMAT_VERSION}, found {version!r}"
        )
    return model, decode_state(document.get("state"), tensors)


def _portable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU that share no memory, which safetensors asks for."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _flush(path: Path) -> None:
    """Have the system write a file's contents, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
