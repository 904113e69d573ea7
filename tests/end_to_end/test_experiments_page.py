"""Files, commands and scripts of docs/how_to/experiments.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from robo_orchard_lab.experiment import ExperimentConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs/how_to/experiments.md").read_text("utf-8")
FILES = dict(re.findall(r"```yaml\n# ([\w.]+)\n(.*?)```", PAGE, re.S))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, "utf-8")
    return tmp_path


def test_the_files_are_experiments() -> None:
    """The file and its variant load, with the differences described on the page."""
    digits, wide = (ExperimentConfig.load(name) for name in FILES)
    assert [*wide.hooks] == [*(name for name in digits.hooks if name != "stats"), "clip"]
    assert wide.to_dict()["model"] == digits.to_dict()["model"] | {"zero_init_residual": True}
    assert wide.to_dict()["optimizer"].keys() == {"class_type", "lr"}
    assert wide.lr_scheduler is None
    assert str(wide.folder()) == "runs/wide"


def test_the_files_are_built() -> None:
    """Models, data, parameter groups and LR schedulers of the files fit together."""
    ExperimentConfig.load("wide.yaml").build()
    run = ExperimentConfig.load("digits.yaml").build()
    assert run.optimizer is not None
    rest, no_decay, head = run.optimizer.param_groups
    assert (rest["max_lr"], head["max_lr"]) == (0.05, 0.5)
    assert no_decay["weight_decay"] == 0
    assert len(head["params"]) == 1  # the bias is in no_decay


def test_named_optimizers_and_lr_schedulers_are_fields() -> None:
    """The page's block with several optimizers replaces those of the file."""
    (block,) = re.findall(r"```yaml\n(optimizer:.*?)```", PAGE, re.S)
    Path("several.yaml").write_text(f"base: digits.yaml\n{block}", "utf-8")
    several = ExperimentConfig.load("several.yaml")
    assert list(several.optimizer or ()) == ["g", "d"]
    assert list(several.lr_scheduler or ()) == ["g"]


def test_the_trust_table_is_valid() -> None:
    """The page's table for pyproject.toml parses to the trust setting."""
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    assert tomllib.loads(block) == {"tool": {"robo_orchard_lab": {"trust": ["my_team"]}}}
