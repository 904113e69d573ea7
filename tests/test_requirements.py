"""The locked versions cover all requirements of the project and of its tests."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAME = canonicalize_name(PROJECT["name"])


def pins(file: str) -> dict[str, Version]:
    """Return the pinned version of each distribution in a file of `requirements`."""
    lines = (ROOT / "requirements" / file).read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: Version(pin) for name, pin in pairs}


def declared(extras: set[str]) -> list[Requirement]:
    """Return the requirements in pyproject.toml, including the extras."""
    optional = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in extras for line in optional[extra]]
    return [Requirement(line) for line in lines]


def required(requirement: Requirement) -> list[Requirement]:
    """Return the requirements of a requirement that hold on this platform."""
    if canonicalize_name(requirement.name) == NAME:
        return declared(requirement.extras)
    try:
        lines = requires(requirement.name) or []
    except PackageNotFoundError:  # another build of torch
        return []
    environments = [{"extra": extra} for extra in requirement.extras or {""}]
    found = [Requirement(line) for line in lines]
    return [
        one
        for one in found
        if one.marker is None or any(one.marker.evaluate(extra) for extra in environments)
    ]


def closure(requirement: Requirement) -> set[str]:
    """Return the names of all distributions installed with a requirement."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [requirement]
    while waiting:
        one = waiting.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key not in seen:
            seen.add(key)
            waiting += required(one)
    return {name for name, _ in seen} - {NAME}


def installed_extras(file: str) -> set[str]:
    """Return the extras that an environment of the file has."""
    extras = set(PROJECT["optional-dependencies"])
    return extras - {"interchange"} if file == "oldest.txt" else extras


@pytest.mark.parametrize("file", ["locked.txt", "oldest.txt"])
def test_each_declared_requirement_accepts_its_pin(file: str) -> None:
    """A requirement that changes without the lock fails here before pip fails."""
    pinned = pins(file)
    refused = [
        str(one)
        for one in declared(installed_extras(file))
        if canonicalize_name(one.name) != NAME
        and pinned[canonicalize_name(one.name)] not in one.specifier
    ]
    assert refused == [], "run: bash scripts/lock.sh"


@pytest.mark.parametrize("file", ["locked.txt", "oldest.txt"])
def test_every_installed_distribution_has_a_pin(file: str) -> None:
    """A file of pins names each distribution installed with all extras."""
    pinned = pins(file)
    if pinned["torch"] != Version(Version(version("torch")).public):
        pytest.skip(f"this environment is not of {file}")
    installed = closure(Requirement(f"{NAME}[{','.join(installed_extras(file))}]"))
    assert len(installed) > 50
    assert installed - set(pinned) == set(), "run: bash scripts/lock.sh"
