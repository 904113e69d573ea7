"""Files with weights that other programs write, on disk or on the Hugging Face Hub.

Safetensors files are found by the names that Accelerate, Transformers and Diffusers give them.
Pickle is refused with the command that converts it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

from robo_orchard_lab.pipeline.checkpoint.manifest import MANIFEST_FILE
from robo_orchard_lab.pipeline.errors import CheckpointError

HUB = "hub:"
INDEX_SUFFIX = ".index.json"
_INDEX = ".safetensors.index.json"
_NAMES = ("model", "diffusion_pytorch_model")  # of Transformers, Accelerate, LeRobot; of Diffusers
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_ADAPTER = "adapter_model.safetensors"

_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    'load = lambda file: torch.load(file, map_location="cpu", weights_only=True); '
    'names = ("state_dict", "model_state_dict", "model", "module"); '
    "inner = lambda d: next((d[n] for n in names if isinstance(d.get(n), dict)), d); "
    "save_file({n: t.clone().contiguous() for file in sys.argv[2:] for n, t in "
    "inner(load(file)).items() if torch.is_tensor(t)}, sys.argv[1])"
)
"""Python code that converts pickled files to a safetensors file. It runs outside this package."""


def weights_file(path: Path) -> Path | None:
    """Return the safetensors file, or its index, of a file or a folder; None for another path.

    Raises:
        CheckpointError: the weights are pickled, sharded by another format, in one of several
            folders or files, or those of an adapter; the message has the remedy.
    """
    if not path.is_dir():
        if path.name == _PICKLED_INDEX:
            _refuse_pickles(path.parent, os.listdir(path.parent))
        if path.suffix in _PICKLES:
            raise _pickled(path, [path], path.with_suffix(".safetensors"))
        is_read = path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX)
        return path if is_read else None
    names = sorted(os.listdir(path))
    known = [f"{stem}{end}" for stem in _NAMES for end in (_INDEX, ".safetensors")]
    if found := next((name for name in known if name in names), None):
        return path / found
    files = [name for name in names if name.endswith(".safetensors")]
    if files == [_ADAPTER]:
        raise CheckpointError(
            f"{path} has the weights of an adapter of PEFT, not of a model; merge them by "
            "merge_and_unload(), save the model by save_pretrained(), and name its folder"
        )
    indices = [name for name in names if name.endswith(_INDEX)]
    if len(indices or files) == 1:
        return path / (indices or files)[0]
    if files:
        raise CheckpointError(f"{path} has several files with weights; name one: {_listed(files)}")
    _refuse_pickles(path, names)
    inner = [each for each in path.iterdir() if each.is_dir() and _has_weights(each)]
    if inner:
        found_in = sorted((f"{path / each.name}" for each in inner), key=_by_number)
        raise CheckpointError(
            f"{path} has weights in its folders; name one: {_listed(found_in[::-1])}"
        )
    return None


def _refuse_pickles(path: Path, names: Collection[str]) -> None:
    """Refuse a folder with pickled weights, with the command that converts them in place."""
    target = path / "model.safetensors"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        joined = path / "joined.pt"
        module = "torch.distributed.checkpoint.format_utils"
        join = shlex.join(["python", "-m", module, "dcp_to_torch", str(path), str(joined)])
        raise CheckpointError(
            f"{path} is a distributed checkpoint of torch, whose metadata is pickled; pickle may "
            f"run code and is not read. If you trust it, convert it: {join} && "
            f"{_conversion([joined], target)}"
        )
    if "zero_to_fp32.py" in names:
        module = "deepspeed.utils.zero_to_fp32"
        join = shlex.join(["python", "-m", module, str(path), str(path), "--safe_serialization"])
        raise CheckpointError(
            f"{path} is a checkpoint of DeepSpeed, which is pickled; pickle may run code and is "
            f"not read. If you trust it, convert it: {join}"
        )
    if _PICKLED_INDEX in names:
        shards = [path / n for n in names if re.fullmatch(r"pytorch_model-.*\.bin", n)]
        raise _pickled(path, shards, target)
    for name in ("pytorch_model.bin", "pytorch_model_fsdp.bin"):
        if name in names:
            raise _pickled(path, [path / name], target)
    if checkpoints := [path / name for name in names if name.endswith(".ckpt")]:
        newest = max(checkpoints, key=lambda file: file.stat().st_mtime)
        if newest.is_dir():
            weights_file(newest)
        raise _pickled(newest, [newest], newest.with_suffix(".safetensors"))


def _pickled(path: Path, files: Iterable[Path], target: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a *.safetensors file, found pickled weights; pickle may run code and is "
        f"not read. If you trust the file, convert it, and name {target}: "
        f"{_conversion(files, target)}"
    )


def _conversion(files: Iterable[Path], target: Path) -> str:
    return shlex.join(["python", "-c", _CONVERT, str(target), *map(str, files)])


def _has_weights(folder: Path) -> bool:
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    ends = (".safetensors", ".distcp", *_PICKLES)
    is_own = MANIFEST_FILE in names or folder.name.startswith("optimizer")
    return not is_own and any(name.endswith(ends) for name in names)


def _by_number(name: str) -> list[str | int]:
    """Return the key that sorts checkpoint-9 before checkpoint-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# --- Hugging Face Hub ------------------------------------------------------------------------


def download_weights(reference: str) -> Path:
    """Download the weights of ``hub:OWNER/NAME[/FOLDER_OR_FILE][@REVISION]``; return their path.

    Only safetensors files and their index are downloaded, to the cache of ``huggingface_hub``; a
    cached revision needs no network. The path contains the commit.

    Raises:
        CheckpointError: the repository has no such weights, or can't be reached.
    """
    from huggingface_hub import errors, snapshot_download  # costs 0.3 s

    name, _, revision = reference.removeprefix(HUB).partition("@")
    owner, _, rest = name.partition("/")
    repository, _, inner = rest.partition("/")
    if not owner or not repository or ".." in inner.split("/"):
        raise CheckpointError(
            f"expected {HUB}OWNER/NAME[/FOLDER][@REVISION], such as "
            f"{HUB}openai-community/gpt2@main, found {reference!r}"
        )
    inside = f"{inner}/" if inner else ""
    wanted = [
        f"{inside}{stem}{end}"
        for stem in _NAMES
        for end in (".safetensors", _INDEX, "-*-of-*.safetensors")
    ]
    is_file = inner.endswith(".safetensors")
    try:
        folder = snapshot_download(
            f"{owner}/{repository}",
            revision=revision or None,
            endpoint=os.environ.get("HF_ENDPOINT"),
            allow_patterns=[inner] if is_file else wanted,
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{reference} can't be downloaded: {problem}; check the name, the revision and the "
            "network, and log in to a private or gated repository by `hf auth login`"
        ) from error
    found = Path(folder) / inner
    is_known = found.is_file() if is_file else found.is_dir() and weights_file(found) is not None
    if not is_known:
        raise CheckpointError(
            f"{reference} has no {inner if is_file else f'{inside}model.safetensors'}; pickled "
            f"weights are not read. Name a file, such as {HUB}{owner}/{repository}/"
            "FILE.safetensors, or a folder of the repository"
        )
    return found
