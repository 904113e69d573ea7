"""A user's installed package in experiment files."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from robo_orchard_core.utils.config import ConfigError, Format
from robo_orchard_core.utils.config.formats import read
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.catalogue import CATALOGUE
from robo_orchard_lab.experiment.schema import experiment_schema

PACKAGE = Path(__file__).parent / "user_package"
FILE = PACKAGE / "experiment.yaml"
IMPORTED = "field_team is imported"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command line of an environment with the package installed."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    (packages,) = environment.rglob("site-packages")
    ours = "; ".join(f"site.addsitedir({folder!r})" for folder in site.getsitepackages())
    (packages / "what_tests_have.pth").write_text(f"import site; {ours}\n", "utf-8")
    source = shutil.copytree(PACKAGE, tmp_path_factory.mktemp("source") / "user_package")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *offline, source],
        check=True,
        timeout=120,
    )
    assert (packages / "field_team/hooks.py").exists()
    return [str(python), "-m", "robo_orchard_lab"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with the package's experiment."""
    shutil.copy(FILE, tmp_path)
    return tmp_path


def run(program: list[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


def check_trained(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert (folder / "diary.txt").read_text("utf-8").split("\n") == ["1 sun", "3 sun", "5 sun", ""]
    assert re.search(r"\bdong\b", done.stdout)
    assert (folder / "runs/furrows/checkpoints/last/model.safetensors").exists()


def test_file_with_trusted_package_is_trained(program: list[str], folder: Path) -> None:
    """Trusted hooks, data, models and functions are parts of the run; nothing else is imported."""
    done = run(program, folder, "train", "experiment.yaml", "--trust", "field_team")
    check_trained(folder, done)
    assert done.stderr.count(IMPORTED) == 1

    saved = run(program, folder, "config", "check", "runs/furrows/config.yaml")
    assert saved.returncode == 2  # the run's own file grants no trust
    assert IMPORTED not in saved.stderr


def test_pyproject_grants_trust(program: list[str], folder: Path) -> None:
    """A pyproject.toml that trusts the package replaces the option."""
    (folder / "pyproject.toml").write_text(
        '[tool.robo_orchard_lab]\ntrust = ["field_team"]\n', "utf-8"
    )
    check_trained(folder, run(program, folder, "train", "experiment.yaml"))


@pytest.mark.parametrize("says", ["", "trust: [field_team]\n"])
def test_untrusted_package_is_not_imported(program: list[str], folder: Path, says: str) -> None:
    """Without trust from outside the file, the error has the remedy, and nothing is imported."""
    file = folder / "experiment.yaml"
    file.write_text(file.read_text("utf-8") + says, "utf-8")
    done = run(program, folder, "train", "experiment.yaml")
    assert done.returncode == 2
    assert "--trust" in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert IMPORTED not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["experiment.yaml"]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package importable in this process."""
    monkeypatch.syspath_prepend(PACKAGE / "src")


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("hooks.diary.wrds", ["a"], "did you mean 'words'?"),
        ("hooks.diary.words", [], "at least 1 item"),
        ("hooks.bell.tims", 2, "did you mean 'times'?"),
        ("hooks.bell.times", "often", "a valid integer"),
        ("hooks.diary.class_type", "field_team.models:Straight", "a subclass of"),
        ("data.train.dataset.row", 3, "did you mean 'rows'?"),
        ("model.func", "field_team.training:forward", "returns a Module"),
    ],
)
def test_fields_of_a_user_package_are_validated(place: str, value: object, problem: str) -> None:
    """A wrong name, type or kind is reported with its path, with or without a config class."""
    with pytest.raises(ConfigError, match=re.escape(problem)) as refused:
        ExperimentConfig.load(FILE, trust="field_team", overrides={place: value})
    assert place in str(refused.value)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("format_", ["yaml", "toml", "json"])
def test_user_package_round_trips_through_files(format_: Format) -> None:
    """An experiment with parts of the package is equal in each format."""
    whole = ExperimentConfig.load(FILE, trust="field_team")
    written = whole.to_str(format_)
    assert ExperimentConfig.from_str(written, format_, trust="field_team") == whole


@pytest.mark.usefixtures("importable")
def test_schema_has_the_fields_of_named_user_classes() -> None:
    """The schema accepts the package's file, and checks fields of classes trusted by name."""
    document: Any = read(FILE.read_text("utf-8"), "yaml")
    ours = {name: CATALOGUE[name] for name in ("ValidationHook", "torch.optim:SGD")}
    assert Draft202012Validator(experiment_schema(ours)).is_valid(document)
    classes = ["hooks:Diary", "hooks:Bell", "models:Straight", "data:Furrows", "training:forward"]
    schema = experiment_schema(ours, [f"field_team.{name}" for name in classes])
    validator = Draft202012Validator(schema)
    assert validator.is_valid(document)
    for name, field, value in (("diary", "words", [3]), ("bell", "tims", 2), ("bell", "sound", 3)):
        hooks = document["hooks"] | {name: document["hooks"][name] | {field: value}}
        assert not validator.is_valid({**document, "hooks": hooks})
