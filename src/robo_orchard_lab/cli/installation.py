"""What is installed of what this distribution needs, told without importing any of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from robo_orchard_lab.cli.output import DISTRIBUTION

_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*([^;]*?)\s*(?:;(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")
_FOR_MAKERS = "dev"  # the extra of those who change the project itself


@dataclass(frozen=True)
class Requirement:
    """A distribution that is needed, and what there is of it."""

    name: str
    needed: str
    """The versions that do, as in ``>=2.8``; empty where all do."""
    found: str | None
    """The version that is there; None where none is."""

    @property
    def is_met(self) -> bool:
        """Whether a version is there that does, as far as can be told."""
        if self.found is None:
            return False
        try:
            from packaging.specifiers import SpecifierSet
        except ImportError:  # Accelerate brings it, which may be missing, too
            return True
        return SpecifierSet(self.needed).contains(self.found, prereleases=True)

    @property
    def to_install(self) -> str:
        """As pip takes it."""
        return self.name + self.needed


def requirements() -> list[Requirement]:
    """What this distribution can't do without.

    Raises:
        PackageNotFoundError: it is not installed, so that nothing says what it needs.
    """
    return [requirement for requirement, extra in _all() if extra is None]


def extras() -> dict[str, list[Requirement]]:
    """What each of its extras consists of, by their names.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    found: dict[str, list[Requirement]] = {}
    for requirement, extra in _all():
        if extra is not None and extra != _FOR_MAKERS:
            found.setdefault(extra, []).append(requirement)
    return found


def install_command(missing: list[Requirement]) -> str:
    """What to type to have them."""
    return " ".join(["pip install", *(f'"{one.to_install}"' for one in missing)])


def _all() -> Iterator[tuple[Requirement, str | None]]:
    for line in requires(DISTRIBUTION) or ():
        name, needed, marker = _parts(line)
        extra = _EXTRA.search(marker)
        yield Requirement(name, needed, version_of(name)), extra and extra[1]


def _parts(line: str) -> tuple[str, str, str]:
    """Name, versions and marker of a requirement.

    >>> _parts("torchmetrics<2,>=1.5; extra == 'metrics'")
    ('torchmetrics', '>=1.5,<2', " extra == 'metrics'")
    """
    found = _REQUIREMENT.fullmatch(line)
    assert found is not None  # the form of what is installed is fixed
    needed = ",".join(sorted(found[2].split(","), reverse=True))  # the least version first
    return found[1], needed, found[3] or ""


def version_of(name: str) -> str | None:
    """The version of a distribution, or None where it isn't there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
