"""``schema`` writes what editors complete and check files by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robo_orchard_lab.cli.main import main


def test_the_schema_is_printed_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same schema is printed, or written to a file, which is replaced."""
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    output = tmp_path / "experiment.schema.json"
    output.write_text("before")
    assert main(["schema", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert json.loads(output.read_text()) == printed


def test_what_can_not_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that isn't there, and code that isn't, are wrong use."""
    assert main(["schema", "--output", str(tmp_path / "no" / "x.json")]) == 2
    assert "can't be written: No such file or directory" in capsys.readouterr().err
    assert main(["schema", "--trust", "json:Nothing"]) == 2
    assert "json:Nothing" in capsys.readouterr().err
