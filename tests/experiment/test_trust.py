"""Trust in code named by experiment files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robo_orchard_core.utils.config import ConfigError, ConfigSyntaxError
from robo_orchard_lab.experiment.catalogue import ExperimentTrust, trusted_by_pyproject

TABLE = '[tool.robo_orchard_lab]\ntrust = ["my_team.models", "other:Net"]\n'


def test_only_the_catalogue_and_the_named_are_trusted() -> None:
    """Other code of this project or of torch is not trusted."""
    trust = ExperimentTrust.of(["my_team", "other:Net", Path], pyproject=False).trust
    assert trust.covers("my_team.models", "Net")
    assert trust.covers("other", "Net")
    assert trust.covers("pathlib", "Path")
    assert trust.covers("torch.optim.sgd", "SGD")
    assert trust.covers("robo_orchard_lab.pipeline.hooks.ema", "EMA")
    assert not trust.covers("other", "Other")
    assert not trust.covers("torch.serialization", "load")
    assert not trust.covers("robo_orchard_lab.pipeline.run.durable", "remove_tree")


@pytest.mark.parametrize("name", ["", "a b", "a:b:c", "a.", "--x", "a\n", "../a", ":a"])
def test_malformed_name_is_refused(name: str) -> None:
    """The error has the expected form of a name."""
    with pytest.raises(ConfigError, match="expected the name of a package to trust"):
        ExperimentTrust.of(name, pyproject=False)


def test_the_nearest_pyproject_with_the_table_is_used(tmp_path: Path) -> None:
    """The search goes from the folder up to the repository's root."""
    (tmp_path / "pyproject.toml").write_text(TABLE.replace("other:Net", "outside"))
    inner = tmp_path / "repository" / "package" / "scripts"
    inner.mkdir(parents=True)
    assert trusted_by_pyproject(inner) == []
    (tmp_path / "repository" / ".git").mkdir()
    assert trusted_by_pyproject(inner) == []
    (tmp_path / "repository" / "pyproject.toml").write_text(TABLE)
    (tmp_path / "repository" / "package" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert trusted_by_pyproject(inner) == ["my_team.models", "other:Net"]
    (inner / "pyproject.toml").write_text("[tool.robo_orchard_lab]\n")
    assert trusted_by_pyproject(inner) == []


def test_outside_a_repository_only_the_folder_is_searched(tmp_path: Path) -> None:
    """Outside a repository, a pyproject.toml in a parent folder is ignored."""
    (tmp_path / "pyproject.toml").write_text(TABLE)
    (tmp_path / "inner").mkdir()
    assert trusted_by_pyproject(tmp_path) == ["my_team.models", "other:Net"]
    assert trusted_by_pyproject(tmp_path / "inner") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_pyproject_of_another_user_is_ignored(tmp_path: Path) -> None:
    """A pyproject.toml of another user in a shared folder grants no trust."""
    (tmp_path / ".git").mkdir()
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.robo_orchard_lab]\ntrust = ['os']\n")
    (tmp_path / "mine").mkdir()
    assert trusted_by_pyproject(tmp_path / "mine") == ["os"]
    os.chown(file, 12345, -1)
    assert trusted_by_pyproject(tmp_path / "mine") == []
    assert trusted_by_pyproject(tmp_path) == ["os"]


def test_the_pyproject_of_the_current_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder's pyproject.toml adds to the given names, unless disabled."""
    (tmp_path / "pyproject.toml").write_text(TABLE)
    monkeypatch.chdir(tmp_path)
    assert ExperimentTrust.of("mine").names == ("mine", "my_team.models", "other:Net")
    assert ExperimentTrust.of("mine", pyproject=False).names == ("mine",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[tool.robo_orchard_lab]\ntrust = 'x'", "expected a list of names, found 'x' (str)"),
        ("[tool.robo_orchard_lab]\ntrust = [1]", "expected a list of names, found [1] (list)"),
        ("[tool.robo_orchard_lab]\ntrust = ['a b']", "tool.robo_orchard_lab.trust: expected the"),
        ("[tool.robo_orchard_lab]\ntrusted = []", "did you mean 'trust'?"),
        ("[tool]\nrobo_orchard_lab = 1", "tool.robo_orchard_lab: expected a table, found 1 (int)"),
        ("[tool", "broken TOML"),
        ("x = '\xff'", "broken TOML"),
    ],
)
def test_a_broken_pyproject_is_refused_with_its_name(
    tmp_path: Path, text: str, problem: str
) -> None:
    """The error names the file and the problem."""
    path = tmp_path / "pyproject.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        trusted_by_pyproject(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert isinstance(caught.value, ConfigSyntaxError) == (problem == "broken TOML")


LOCAL = """
import sys
from robo_orchard_lab.experiment.catalogue import ExperimentTrust
before = list(sys.path)
ExperimentTrust.of(sys.argv[1:], pyproject=False).make_local_modules_importable()
assert sys.path[: len(before)] == before
print(*sys.path[len(before) :])
import json, colorsys
print(json.__file__)
"""


@pytest.mark.parametrize(
    ("names", "is_found"),
    [
        (["my_local_parts"], True),
        (["my_local_parts.inner:Net", "my_local_parts"], True),
        (["colorsys"], False),
        (["json"], False),
        (["nowhere"], False),
        ([], False),
    ],
)
def test_local_modules_are_imported_last(tmp_path: Path, names: list[str], is_found: bool) -> None:
    """The current folder is added last, for trusted modules that are not installed."""
    for name in ("my_local_parts", "json", "colorsys"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOCAL, *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    added, json_file = done.stdout.split("\n")[:2]
    assert added == (str(tmp_path) if is_found else "")
    assert not json_file.startswith(str(tmp_path))
