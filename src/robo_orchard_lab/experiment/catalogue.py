"""Code that experiment files may name: the catalogue, and the user's additional trust.

The sender of a file chooses among the classes and functions of ``catalogue.toml``, and all of
their arguments. An entry must therefore never, with any arguments and in any call of a run,

- run code that the file carries, or that is neither catalogued nor trusted,
- unpickle anything, or extract archives,
- download anything, except the weights published by torchvision (from their host, with a digest),
- write anywhere, except to paths that are restricted to the run folder.

Not in the catalogue are, for example: `torch.load`; `torch.utils`, except loaders, samplers and
datasets of datasets; torchvision's datasets that download or unpickle (MNIST, CIFAR10); metrics
that fetch networks or tokenizers (FID, LPIPS, BERTScore); modules for several processes. To use
them, trust them by name: ``--trust torchvision.datasets.mnist:MNIST``.

A user trusts more code with ``--trust``, in code, or in the pyproject.toml of the folder in which
the run is started, never in the experiment file::

    [tool.robo_orchard_lab]
    trust = ["my_team.models", "torchvision.datasets.mnist:MNIST"]
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Self

from robo_orchard_core.utils.config import Trust
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
    at_path,
    describe,
    unknown_field,
)
from robo_orchard_core.utils.config.formats import Plain
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_core.utils.config.references import reference_to
from robo_orchard_lab import HOOK_MODULES


def _read_catalogue() -> dict[str, str]:
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    at_top = {*tables.pop("exported_by_torchmetrics")["names"].split()}
    hooks: dict[str, str] = {}
    for hook, module in HOOK_MODULES.items():
        hooks[module] = f"{hooks.get(module, '')} {hook} {hook}Config"
    catalogue: dict[str, str] = {}
    for public, modules in {"robo_orchard_lab.pipeline.hooks": hooks, **tables}.items():
        for module, names in modules.items():
            for name in names.split():
                definition = f"{public}.{module}:{name}" if module else f"{public}:{name}"
                if public.startswith("robo_orchard_lab."):
                    catalogue[name] = definition
                catalogue[f"{public}:{name}"] = catalogue[definition] = definition
                if public.startswith("torchmetrics") and name in at_top:
                    catalogue[f"torchmetrics:{name}"] = definition
    return catalogue


CATALOGUE: dict[str, str] = _read_catalogue()
"""Definition of each class and function by every name that files may use.

Names are short (``StatsMonitor``, only for this project), public (``torch.optim:SGD``), or the
definition itself (``torch.optim.sgd:SGD``).
"""

DEFINITIONS = frozenset(CATALOGUE.values())
"""Definitions of all catalogued classes and functions."""

_KINDS = {
    "robo_orchard_lab.pipeline.hooks": "a hook",
    "robo_orchard_lab.search": "a hook",
    "robo_orchard_lab.pipeline.sinks": "a sink",
    "robo_orchard_lab.pipeline": "a batch processor",
    "robo_orchard_lab.policy": "a module",
    "robo_orchard_lab.policy.policy:PolicyProcessor": "a batch processor",
    "robo_orchard_lab.policy.rollout_evaluation": "a hook",
    "robo_orchard_lab.policy:RolloutEvaluation": "a hook",
    "robo_orchard_lab.policy:RolloutEvaluationConfig": "a hook",
    "robo_orchard_lab.policy.samples": "an environment",
    "robo_orchard_lab.policy:Reach": "an environment",
    "robo_orchard_lab.experiment.samples:MLP": "a module",
    "robo_orchard_lab.experiment.samples:Spirals": "a dataset",
    "robo_orchard_lab.data": "a dataset",
    "torch.optim": "an optimizer",
    "torch.optim.lr_scheduler": "an LR scheduler",
    "torch.optim.swa_utils": "an LR scheduler",
    "torch.nn": "a module",
    "torch.utils.data.dataloader": "a loader",
    "torch.utils.data.dataset": "a dataset",
    "torch.utils.data.sampler": "a sampler",
    "torchvision": "a module",
    "torchvision.datasets": "a dataset",
    "torchmetrics": "a module",  # a metric is a module
}

_PUBLIC = {name.rpartition(":")[2]: name for name in reversed(CATALOGUE)}


def kind_of(definition: str) -> str | None:
    """Return the kind of a catalogued class or function; None for other code.

    >>> kind_of("torch.optim.sgd:SGD"), kind_of("torchvision.models.resnet:resnet18")
    ('an optimizer', 'a module')
    """
    if definition not in DEFINITIONS:
        return None
    prefix = definition
    while prefix not in _KINDS:
        prefix = prefix.rpartition(":" if ":" in prefix else ".")[0]
    return _KINDS[prefix]


def definition_of(name: str) -> str:
    """Return the definition of a catalogued name; other names are returned unchanged.

    >>> definition_of("StatsMonitor")
    'robo_orchard_lab.pipeline.hooks.stats_monitor:StatsMonitor'
    >>> definition_of("torch.optim:SGD"), definition_of("my_team.models:Net")
    ('torch.optim.sgd:SGD', 'my_team.models:Net')
    """
    return CATALOGUE.get(name, name)


def suggest(reference: str) -> str | None:
    """Return the most similar name of the catalogue, or None without a close match.

    >>> suggest("StatMonitor"), suggest("torch.optim:SDG"), suggest("AdmW"), suggest("os:system")
    ('StatsMonitor', 'torch.optim:SGD', 'torch.optim:AdamW', None)
    """
    # A name without a module is compared with the names in all modules.
    known = CATALOGUE if ":" in reference else _PUBLIC
    near = difflib.get_close_matches(reference, known, n=1, cutoff=0.85)
    return (near[0] if ":" in reference else _PUBLIC[near[0]]) if near else None


def with_definitions(value: Plain, path: tuple[str | int, ...] = ()) -> Plain:
    """Replace short and public names of code in a document by definitions.

    Short names are replaced only at ``class_type``, ``func`` and ``config_type``.
    """
    if isinstance(value, dict):
        return {key: with_definitions(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [with_definitions(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, str) and (":" in value or (path and path[-1] in PART_KEYS)):
        return definition_of(value)
    return value


TABLE = "tool.robo_orchard_lab"


@dataclass(frozen=True)
class ExperimentTrust:
    """Trust of the user in addition to the catalogue.

    >>> ExperimentTrust(("my_team.models",)).trust.covers("my_team.models.resnet", "ResNet")
    True

    Attributes:
        names: Packages, modules (``my_team.models``), and single classes or functions
            (``my_team.models:Net``). A malformed name raises ConfigError.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.trust

    @classmethod
    def of(cls, names: str | type | Iterable[str | type] = (), *, pyproject: bool = True) -> Self:
        """Combine names with the trust table of the user's pyproject.toml."""
        given = [names] if isinstance(names, str | type) else names
        texts = [name if isinstance(name, str) else reference_to(name) for name in given]
        return cls(tuple(dict.fromkeys([*texts, *(trusted_by_pyproject() if pyproject else ())])))

    @cached_property
    def trust(self) -> Trust:
        """Trust in the catalogue and these names, and in nothing else."""
        try:
            return Trust(packages=frozenset(), classes=DEFINITIONS).widened(*self.names)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def make_local_modules_importable(self) -> None:
        """Append the current folder to ``sys.path`` if only this folder has a trusted module.

        At the end of ``sys.path``, local modules can't shadow installed ones.
        """
        here = str(Path.cwd())
        for name in self.names:
            top = name.partition(":")[0].partition(".")[0]
            if here in sys.path or _is_importable(top):
                continue
            if PathFinder.find_spec(top, [here]) is not None:
                sys.path.append(here)


def _is_importable(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a spec
        return True


def trusted_by_pyproject(folder: Path | None = None) -> list[str]:
    """Return the trusted names of the nearest pyproject.toml with a trust table.

    Args:
        folder: Where to search, and its parents up to the root of the git repository; outside of
            a repository only this folder. Default: the current folder. Files of other users in
            parent folders are ignored.

    Raises:
        ConfigError: The file can't be read or its table is invalid; the error names the file.
    """
    for path in _pyprojects(Path.cwd() if folder is None else folder.absolute()):
        try:
            table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
            for key in TABLE.split("."):
                table = table.get(key) if isinstance(table, dict) else None
            if table is not None:
                return _trusted_names(table)
        except ConfigError as error:
            error.source = str(path)
            raise error.under(tuple(TABLE.split("."))) from error.__cause__
        except OSError as error:
            raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from error
        except ValueError as error:  # of UTF-8 or of TOML
            raise ConfigSyntaxError(f"{path}: broken TOML: {error}") from error
    return []


def _trusted_names(table: Any) -> list[str]:
    if not isinstance(table, dict):
        raise ConfigFieldError(f"expected a table, found {describe(table)}")
    for key in table:
        if key != "trust":
            raise unknown_field(key, ["trust"], TABLE)
    names: list[str] = table.get("trust", [])
    with at_path("trust"):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigFieldError(f"expected a list of names, found {describe(names)}")
        ExperimentTrust(tuple(names))
    return names


def _pyprojects(folder: Path) -> Iterator[Path]:
    folders = [folder, *folder.parents]
    root = next((number for number, f in enumerate(folders) if (f / ".git").exists()), 0)
    for parent in folders[: root + 1]:
        file = parent / "pyproject.toml"
        if not file.is_file():
            continue
        # A parent folder may be world-writable: only the user's and the system's files count.
        is_posix = sys.platform != "win32"
        if parent is folder or not is_posix or file.stat().st_uid in (os.geteuid(), 0):
            yield file
