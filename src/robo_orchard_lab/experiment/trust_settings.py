"""Whose code an experiment's file may name: the catalogue's, and what the user trusts besides.

A user says so with ``--trust``, in code, or in the pyproject.toml of the folder that the run is
started in::

    [tool.robo_orchard_lab]
    trust = ["my_team.models", "torchvision.datasets.mnist:MNIST"]

never in the file itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Self

from robo_orchard_core.utils.config import Trust
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
    shown,
    unknown_field,
)
from robo_orchard_lab.experiment.catalogue import CATALOGUED

TABLE = "tool.robo_orchard_lab"


@dataclass(frozen=True)
class ExperimentTrust:
    """What the user trusts beside the catalogue.

    >>> ExperimentTrust(("my_team.models",)).trust.covers("my_team.models.resnet", "ResNet")
    True

    Attributes:
        names: Packages, modules (``my_team.models``) and single classes or functions
            (``my_team.models:Net``).

    Raises:
        ConfigError: One is written as neither.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.trust

    @classmethod
    def of(cls, names: str | type | Iterable[str | type] = (), *, pyproject: bool = True) -> Self:
        """What is named here, and what the user's pyproject.toml says.

        Raises:
            ConfigError: A name is written wrongly; or the pyproject.toml is, which is named.
        """
        given = [names] if isinstance(names, str | type) else names
        texts = [
            name if isinstance(name, str) else f"{name.__module__}:{name.__qualname__}"
            for name in given
        ]
        return cls(tuple(dict.fromkeys([*texts, *(trusted_by_pyproject() if pyproject else ())])))

    @cached_property
    def trust(self) -> Trust:
        """The catalogue and these names, and nothing else."""
        try:
            return Trust(packages=frozenset(), classes=CATALOGUED).widened(*self.names)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def find_local_modules(self) -> None:
        """Have Python find the trusted modules that are nowhere but in the current folder.

        The folder is put at the end of ``sys.path``, where nothing in it can stand for what is
        installed, and only if a trusted module is there that can't be found otherwise.
        """
        here = str(Path.cwd())
        for name in self.names:
            top = name.partition(":")[0].partition(".")[0]
            if here in sys.path or _is_found(top):
                continue
            if PathFinder.find_spec(top, [here]) is not None:
                sys.path.append(here)


def _is_found(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ValueError:  # of a module that hides where it comes from
        return True


def trusted_by_pyproject(folder: Path | None = None) -> list[str]:
    """What the nearest pyproject.toml with our table trusts.

    Args:
        folder: Where to look, and above it up to the root of its git repository; outside of one,
            there alone. By default the current folder. Files above that are another user's don't
            count.

    Raises:
        ConfigError: It can't be read, or its table holds something else; the file is named.
    """
    for path in _pyprojects(Path.cwd() if folder is None else folder.absolute()):
        try:
            table = _table(path)
            if table is not None:
                return _names(table)
        except ConfigError as error:
            error.source = str(path)
            raise
    return []


def _pyprojects(folder: Path) -> Iterator[Path]:
    folders = [folder, *folder.parents]
    root = next((number for number, f in enumerate(folders) if (f / ".git").exists()), 0)
    for inside in folders[: root + 1]:
        file = inside / "pyproject.toml"
        if file.is_file() and (inside is folder or _is_own(file)):
            yield file


def _is_own(file: Path) -> bool:
    """Whether it is the user's or the system's: above a folder may be one that all can write to."""
    return sys.platform == "win32" or file.stat().st_uid in (os.geteuid(), 0)


def _table(path: Path) -> object:
    """Our table; None where there is none."""
    try:
        inside: object = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror or error}") from error
    except ValueError as error:  # of UTF-8 or of TOML
        raise ConfigSyntaxError(f"broken TOML: {error}") from error
    for key in TABLE.split("."):
        inside = inside.get(key) if isinstance(inside, dict) else None
    return inside


def _names(table: object) -> list[str]:
    place = tuple(TABLE.split("."))
    if not isinstance(table, dict):
        raise ConfigFieldError(f"expected a table, found {shown(table)}", place)
    for key in table:
        if key != "trust":
            raise unknown_field(key, ["trust"], TABLE, place)
    names = table.get("trust", [])
    place = (*place, "trust")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigFieldError(f"expected a list of names, found {shown(names)}", place)
    try:
        ExperimentTrust(tuple(names))
    except ConfigError as error:
        raise error.under(place) from None
    return names
