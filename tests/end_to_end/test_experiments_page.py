"""Files, commands and scripts of docs/how_to/experiments.md."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from launching import launch
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.experiment import ExperimentConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs/how_to/experiments.md").read_text("utf-8")
FILES = dict(re.findall(r"```yaml\n# ([\w.]+)\n(.*?)```", PAGE, re.S))
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]


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


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_succeed(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command exits with 0 and prints output."""
    words = shlex.split(line)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    assert words[0] == "robo-orchard-lab"
    assert main(words[1:]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_the_trust_table_is_valid() -> None:
    """The page's table for pyproject.toml parses to the trust setting."""
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    assert tomllib.loads(block) == {"tool": {"robo_orchard_lab": {"trust": ["my_team"]}}}


def test_the_script_runs(folder: Path) -> None:
    """The page's script trains for three epochs of ten steps."""
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (folder / "script.py").write_text(script, "utf-8")
    assert launch(folder / "script.py", processes=1).stdout == "30 MLP stats checkpoint\n"
