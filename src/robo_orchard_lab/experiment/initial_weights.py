"""Saved weights: read from checkpoints and safetensors files, and loaded into a model.

Every source is data: safetensors and JSON, read with the limits of a checkpoint. Pickle is refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch.nn.parameter import is_lazy

from robo_orchard_core.utils.config.errors import (
    ConfigFieldError,
    did_you_mean,
    suggest_name,
)
from robo_orchard_core.utils.logging import visible
from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
from robo_orchard_lab.experiment.run_folder import (
    CONFIG_FILE,
    RUN_STATE,
    NoRunError,
    run_config_file,
)
from robo_orchard_lab.experiment.weight_sources import (
    HUB,
    INDEX_SUFFIX,
    download_weights,
    weights_file,
)
from robo_orchard_lab.pipeline.checkpoint import ReadLimits, non_finite_names
from robo_orchard_lab.pipeline.checkpoint.manifest import MANIFEST_FILE
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint, read_tensor_file
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.hooks.ema import averaged_weights
from robo_orchard_lab.pipeline.job_log import announce, job_logger
from robo_orchard_lab.pipeline.model import plain_name
from robo_orchard_lab.pipeline.pretrained_folder import MODEL_FOLDER
from robo_orchard_lab.pipeline.pretrained_folder import WEIGHTS_FILE as _FILE
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded
from robo_orchard_lab.pipeline.sharding import shard_like
from robo_orchard_lab.pipeline.trainer.rank_state import check_tensors

logger = job_logger(__name__)

OnMismatch: TypeAlias = Literal["skip", "overlap", "interpolate"]
"""Rule for weights of another shape: leave the model's; copy the common leading part; or
interpolate linearly along the axes that differ."""

_SHOWN = 4  # names in a row of the report
_LISTED = 10  # entries in an error


@dataclass(frozen=True, slots=True)
class SavedWeights:
    """Weights of a model, with the states of hooks.

    Attributes:
        path: Checkpoint or file of the weights.
        weights: State dict with the names of the unwrapped model.
        hooks: States of hooks by name; None if only the weights were saved.
        step: Number of completed steps, if known.
        digests: Digests of the files with weights, by name.
    """

    path: Path
    weights: Mapping[str, Any]
    hooks: Mapping[str, Any] | None = None
    step: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_checkpoint(cls, path: Path) -> SavedWeights:
        """Read the weights of a trainer's checkpoint, without the optimizer state.

        Raises:
            CheckpointError: The checkpoint is damaged, or was not saved by a trainer.
        """
        with OpenCheckpoint(path, ReadLimits()) as opened:
            manifest = opened.manifest
            parts = {part: opened.load(0, only=part) for part in ("model", "trainer", "state")}
        try:
            weights = {
                **parts["model"].parts["model"],
                **parts["trainer"].parts["trainer"]["model_extra"],
            }
            hooks = parts["state"].rank_parts["state"]["hooks"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of a trainer: no {error}") from None
        digests = {n: f.digest for n, f in manifest.files.items() if n.startswith("model.")}
        return cls(path, weights, hooks, manifest.step, digests)

    @classmethod
    def from_file(cls, path: Path) -> SavedWeights:
        """Read the weights of a safetensors file.

        Raises:
            CheckpointError: The file can't be read.
        """
        weights, digest = read_tensor_file(path)
        return cls(path, weights, digests={path.name: digest})

    @classmethod
    def from_index(cls, path: Path) -> SavedWeights:
        """Read the weights of sharded safetensors files, as of Transformers, by their index.

        Raises:
            CheckpointError: A file can't be read, or differs from the index.
        """
        try:
            if path.stat().st_size > ReadLimits().max_json_bytes:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too many")
            found = parse_json(path.read_bytes(), max_depth=4)
        except (OSError, JsonError) as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        files = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise CheckpointError(f"{path}: expected weight_map, a mapping of names to files")
        weights: dict[str, Any] = {}
        digests = {}
        for file in dict.fromkeys(files.values()):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path}: expected *.safetensors files in its folder, found {file!r}"
                )
            tensors, digests[file] = read_tensor_file(path.with_name(file))
            named = {name for name, of in files.items() if of == file}
            if missing := sorted(named - tensors.keys()):
                raise CheckpointError(f"{path.with_name(file)} lacks {missing[0]!r} of the index")
            weights |= {name: tensors[name] for name in tensors if name in named}
        return cls(path, weights, digests=digests)

    @classmethod
    def find(cls, path: str | os.PathLike[str], *, best: bool = False) -> SavedWeights:
        """Read weights of a run, a checkpoint, safetensors files, or a repository of the Hub.

        Args:
            path: Folder of a run or of checkpoints, a checkpoint, or a source of
                `weights_file` or `download_weights`.
            best: Use the best checkpoint of a run instead of the newest.

        Raises:
            CheckpointError: There are no weights, or they can't be read.
            ConfigError: The run has no checkpoint, or none is known as the best.
        """
        text = os.fspath(path)
        path = download_weights(text) if text.startswith(HUB) else Path(path)
        if not path.exists():
            raise CheckpointError(
                f"expected a run folder, a checkpoint or a *.safetensors file; there is no {path}"
            )
        is_own = _is_own(path)
        file = None if is_own else weights_file(path)
        if file is None and path.is_dir():
            try:
                return cls.from_checkpoint(find_checkpoints(path).pick(best=best))
            except NoRunError as error:
                if best:
                    error.problem += "; name the file of a KeepBest, or the newest checkpoint"
                elif not is_own:
                    error.problem += ", or a folder with *.safetensors files"
                raise
        if file is None:
            folder = f", found a run's configuration; name its folder, {path.parent}"
            raise CheckpointError(
                f"{path}: expected a *.safetensors file or a folder with one"
                + (folder if path.name == CONFIG_FILE else "")
            )
        if best:
            raise CheckpointError(f"{path} holds weights of one step; leave out the best")
        return (cls.from_index if file.name.endswith(INDEX_SUFFIX) else cls.from_file)(file)

    def of_hook(self, name: str) -> SavedWeights:
        """Return the weights that a hook kept, such as a moving average.

        Raises:
            CheckpointError: The checkpoint has no weights of this hook.
        """
        if self.hooks is None:
            raise CheckpointError(
                f"{self.path} has weights only, none of a hook {name!r}; leave the name out"
            )
        kept = {hook: averaged_weights(state) for hook, state in self.hooks.items()}
        known = {hook: weights for hook, weights in kept.items() if weights}
        if name not in known:
            advice = suggest_name(name, [*known], "hooks with weights:")
            raise CheckpointError(f"{self.path} has no weights of a hook {name!r}; {advice}")
        others = {n: value for n, value in self.weights.items() if n not in known[name]}
        return replace(self, weights={**others, **known[name]})

    def load_into(self, model: torch.nn.Module) -> None:
        """Load exactly the weights of a model of any wrapping."""
        live = model.state_dict()
        entries = {plain_name(name): name for name in live}
        state = {entries.get(name, name): value for name, value in self.weights.items()}
        check_tensors(f"{self.path} has the weights of another model", live, state)
        model.load_state_dict(state)


def exported_weights(run_folder: Path) -> SavedWeights | None:
    """Read the weights of a run's exported model, as of a run without checkpoints, or None.

    The model is in ``pretrained_model/``, or, in a run pulled from the Hub, in the run folder.

    Raises:
        CheckpointError: The file can't be read.
    """
    files = (run_folder / _FILE, run_folder / MODEL_FOLDER / _FILE)
    return next((SavedWeights.from_file(file) for file in files if file.is_file()), None)


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """Result of `load_weights`: the model's entries by their names, and the source.

    Attributes:
        source: File or checkpoint.
        step: Completed steps of the run that saved the weights, if known.
        weights: Name of the hook whose weights were loaded, or None.
        loaded: Entries with values of the source.
        resized: Entries of another shape in the source, and how they were changed.
        skipped: Entries that keep their values, and the reason.
        missing: Entries that the source lacks; they keep their values.
        unused: Names in the source, after renaming, that the model lacks.
        digests: Digests of the source's files.
    """

    source: str
    step: int | None
    weights: str | None
    loaded: tuple[str, ...]
    resized: Mapping[str, str]
    skipped: Mapping[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    digests: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a short table.

        >>> print(WeightsReport("a.safetensors", None, None, ("w", "b"), {}, {}, ("head",), (), {}))
        weights from a.safetensors
          loaded      2  w, b
          missing     1  head
        """
        about = [] if self.weights is None else [self.weights]
        about += [] if self.step is None else [f"step {self.step}"]
        lines = [f"weights from {self.source}" + (f" ({', '.join(about)})" if about else "")]
        for row in ("loaded", "resized", "skipped", "missing", "unused"):
            entries: Any = getattr(self, row)
            if entries:
                named = (
                    entries.items() if isinstance(entries, Mapping) else ((e, "") for e in entries)
                )
                texts = [f"{name}{f' ({why})' if why else ''}" for name, why in named]
                more = f", and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
                lines.append(f"  {row:<8}{len(texts):>5}  {', '.join(texts[:_SHOWN])}{more}")
        return "\n".join(map(visible, lines))


def _is_own(path: Path) -> bool:
    """Return True for a checkpoint, or a run folder without weights of another program."""
    if (path / MANIFEST_FILE).exists():
        return True
    is_run = run_config_file(path) is not None or (path / RUN_STATE).exists()
    return is_run and not any((path / f"{_FILE}{end}").exists() for end in ("", INDEX_SUFFIX))


def load_weights(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    checkpoint: Literal["newest", "best"] = "newest",
    weights: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    on_mismatch: Mapping[str, OnMismatch] | None = None,
) -> WeightsReport:
    """Load weights to begin with into a model; log and return a report.

    Entries of the model without a counterpart keep their values, such as a new head. Values of
    another floating-point type are converted. ``requires_grad`` stays as it is. All checks precede
    the first change. Call it on all ranks, before the trainer is created.

    Args:
        model: Model, compiled or not, also sharded by FSDP2.
        path: Run folder, checkpoint, ``*.safetensors`` file, index of sharded files, folder with
            such files, or ``hub:OWNER/NAME``; see :meth:`SavedWeights.find`.
        checkpoint: Checkpoint of a run folder.
        weights: Name of the run's hook whose weights to load, such as an ``EMA``.
        include: Patterns of names in the model (``*`` matches any text, dots included).
        exclude: Patterns of names in the model that keep their values.
        rename: New prefixes by prefixes of names in the source; the first match counts.
        on_mismatch: Rules for entries of another shape, by patterns of names in the model.

    Raises:
        CheckpointError: The weights can't be read.
        StateError: Nothing matches, or a shape or kind of number differs without a rule; the
            message lists the entries.
        ConfigError: A pattern or prefix matches nothing, two names become one, the run has no
            checkpoint, or none is known as the best.
    """
    saved = SavedWeights.find(path, best=checkpoint == "best")
    if weights is not None:
        saved = saved.of_hook(weights)
    source = _renamed(
        {plain_name(n): v for n, v in saved.weights.items()}, rename or {}, saved.path
    )
    live = {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    if lazy := [name for name, value in live.items() if is_lazy(value)]:
        raise StateError(f"{lazy[0]} has no shape yet; run the model once before loading weights")
    rules = on_mismatch or {}
    for option, patterns in (("include", include), ("exclude", exclude), ("on_mismatch", rules)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in live):
                advice = did_you_mean(pattern, live) or f"it has {', '.join([*live][:20])}"
                unmatched = f"{pattern!r} matches no name in the model; {advice}"
                raise ConfigFieldError(unmatched, (option,))
    loaded: dict[str, Any] = {}
    resized: dict[str, str] = {}
    skipped: dict[str, str] = {}
    missing: list[str] = []
    problems: list[str] = []
    for name, value in live.items():
        if _matches(name, exclude) or not _matches(name, include):
            skipped[name] = "excluded"
        elif name not in source:
            missing.append(name)
        elif (problem := _difference(source[name], value)) is None:
            loaded[name] = source[name]
        elif (rule := _rule(name, rules)) is None or not problem.startswith("shape"):
            problems.append(f"{name} ({problem})")
        elif rule == "skip":
            skipped[name] = problem
        elif source[name].dim() != value.dim():
            problems.append(f"{name} ({problem}: {rule} needs as many dimensions)")
        else:
            loaded[name] = _resized(source[name], value, rule)
            resized[name] = f"{rule}, {problem}"
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise StateError(
            f"{saved.path} has weights of another model: {'; '.join(problems[:_LISTED])}{more}; "
            "exclude them, or name a rule, such as on_mismatch: {'head.*': skip}"
        )
    if not loaded:
        raise StateError(
            f"nothing in {saved.path} matches the model: it has {_names(source)}, the model "
            f"{_names(live)}; {_suggest_prefix(source, live)}"
        )
    # In the order of the source, which decides between different values of tied entries.
    tied = _load(model, live, {name: loaded[name] for name in source if name in loaded})
    report = WeightsReport(
        source=str(saved.path),
        step=saved.step,
        weights=weights,
        loaded=tuple(name for name in loaded if name not in resized),
        resized=resized,
        skipped=skipped,
        missing=tuple(name for name in missing if name not in tied),
        unused=tuple(name for name in source if name not in live),
        digests=saved.digests,
    )
    for line in str(report).splitlines():
        announce(logger, line)
    if report.missing and report.unused:
        advice = _suggest_prefix(report.unused, report.missing)
        if advice.startswith("write"):
            logger.warning("missing entries have counterparts in %s; %s", saved.path, advice)
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if non_finite := non_finite_names(tensors):
        logger.warning("%s: %s of the loaded weights is not finite", saved.path, non_finite[0])
    return report


def _renamed(weights: Mapping[str, Any], prefixes: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Replace the first matching prefix of each name."""
    found: dict[str, Any] = {}
    used = set()
    for name, value in weights.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        new = name if prefix is None else prefixes[prefix] + name[len(prefix) :]
        used.add(prefix)
        if new in found:
            problem = f"two entries of {path} become {new!r}; change the prefixes"
            raise ConfigFieldError(problem, ("rename",))
        found[new] = value
    for prefix in prefixes:
        if prefix not in used:
            problem = f"no name in {path} begins with {prefix!r}; it has {_names(weights)}"
            raise ConfigFieldError(problem, ("rename",))
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _rule(name: str, rules: Mapping[str, OnMismatch]) -> OnMismatch | None:
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def _difference(saved: Any, live: Any) -> str | None:
    """Return why a saved value can't be copied into an entry of the model, or None."""
    if not (isinstance(saved, torch.Tensor) and isinstance(live, torch.Tensor)):
        is_same = type(saved) is type(live)
        return None if is_same else f"a {type(saved).__name__}, expected a {type(live).__name__}"
    if saved.shape != live.shape:
        return f"shape {_shape(saved)}, expected {_shape(live)}"
    if saved.dtype == live.dtype or (saved.is_floating_point() and live.is_floating_point()):
        return None
    return f"{saved.dtype}, expected {live.dtype}"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"


def _resized(saved: torch.Tensor, live: torch.Tensor, rule: OnMismatch) -> torch.Tensor:
    """Return saved values in the shape of an entry of the model."""
    if rule == "overlap":
        full = live.full_tensor() if is_sharded(live) else live  # a collective for shards
        made = full.detach().to("cpu", saved.dtype, copy=True)
        common = tuple(slice(min(a, b)) for a, b in zip(saved.shape, live.shape, strict=True))
        made[common] = saved[common]
        return made
    made = saved.double()
    for axis, size in enumerate(live.shape):
        if made.shape[axis] != size:
            # Of any rank: the axis becomes the last of three.
            rows = made.movedim(axis, -1)
            flat = rows.reshape(1, -1, rows.shape[-1])
            made = torch.nn.functional.interpolate(flat, size, mode="linear", align_corners=True)
            made = made.reshape(*rows.shape[:-1], size).movedim(-1, axis)
    return made.to(saved.dtype)


@torch.no_grad()
def _load(model: torch.nn.Module, live: Mapping[str, Any], loaded: Mapping[str, Any]) -> set[str]:
    """Load values by plain name; return the other names of tied entries."""
    names_of: dict[int, list[str]] = {}
    for name, value in live.items():
        if isinstance(value, torch.Tensor):
            names_of.setdefault(id(value), []).append(name)
    entries = {plain_name(name): name for name in model.state_dict()}
    tied: set[str] = set()
    state: dict[str, Any] = {}
    for name, value in loaded.items():
        aliases = names_of.get(id(live[name]), [name])
        tied |= {*aliases}
        if isinstance(value, torch.Tensor):
            value = shard_like(live[name].detach(), value.to(live[name].dtype))
        state |= {entries[alias]: value for alias in aliases}
    model.load_state_dict(state, strict=False)
    return tied


def _names(names: Iterable[str]) -> str:
    found = [*names]
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "") or "none"


def _suggest_prefix(source: Iterable[str], live: Iterable[str]) -> str:
    """Return the remedy if names differ by a prefix: the one that matches the most names."""
    names = [*live]
    found: Counter[tuple[str, str]] = Counter()
    for saved in source:
        for name in names:
            if saved.endswith(f".{name}"):
                found[saved[: -len(name)], ""] += 1
            elif name.endswith(f".{saved}"):
                found["", name[: -len(saved)]] += 1
    if not found:
        return "map prefixes by rename: {'old.': 'new.'}"
    [((old, new), _)] = found.most_common(1)
    return f"write rename: {{{old!r}: {new!r}}}"
