"""Tests of the command ``schema``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from tests.cli.running import run

from robo_orchard_lab.cli.main import main


def test_the_schema_is_printed_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The schema is printed, or written to a file, which is replaced."""
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    output = tmp_path / "experiment.schema.json"
    output.write_text("before")
    assert main(["schema", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert json.loads(output.read_text()) == printed


def test_a_schema_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing folder and a missing class are wrong usage."""
    assert main(["schema", "--output", str(tmp_path / "no" / "x.json")]) == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
    assert main(["schema", "--trust", "json:Nothing"]) == 2
    assert "json:Nothing" in capsys.readouterr().err


def test_trusted_classes_are_in_the_schema(tmp_path: Path) -> None:
    """Classes trusted by name, here or in pyproject.toml, have their fields in the schema."""
    (tmp_path / "schema_parts.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, width: int) -> None:\n"
        "        super().__init__(2, width)\n"
    )
    (tmp_path / "pyproject.toml").write_text(
        '[tool.robo_orchard_lab]\ntrust = ["schema_parts:Net", "my_team"]\n'
    )
    done = run("schema", "--output", "schema.json", cwd=tmp_path)
    assert done.code == 0, done.err
    validator = Draft202012Validator(json.loads((tmp_path / "schema.json").read_text()))

    def admits(**model: object) -> bool:
        return bool(validator.is_valid({"base": "other.yaml", "model": model}))

    assert admits(class_type="schema_parts:Net", width=3)
    assert not admits(class_type="schema_parts:Net", width="wide")
    assert admits(class_type="my_team.models:Any", wdth="wide")
    assert not admits(class_type="other_team.models:Any")
