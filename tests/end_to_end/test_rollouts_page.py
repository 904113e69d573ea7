"""Script and file of docs/how_to/rollouts.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from robo_orchard_lab.experiment.catalogue import ExperimentTrust, with_definitions
from robo_orchard_lab.experiment.inspection import hook
from robo_orchard_lab.policy import RolloutEvaluationConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs/how_to/rollouts.md").read_text("utf-8")


def test_the_script_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script of at most 25 lines saves, loads and rolls out a policy."""
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.S)
    assert found is not None
    script, printed = found.groups()
    assert len(script.splitlines()) <= 25
    exec(compile(script, "script.py", "exec"), {"__name__": "script"})  # noqa: S102  # of the page
    assert capsys.readouterr().out == printed


def test_the_fields_of_the_page_exist() -> None:
    """The entry of the page is valid, and each named default is the default."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    entry = yaml.safe_load(blocks[0])["hooks"]["success"]
    entry["environment"] = {"class_type": "Reach"}
    document = with_definitions(entry)
    assert isinstance(document, dict)
    config = RolloutEvaluationConfig.from_dict(document, trust=ExperimentTrust().trust)
    assert (config.episodes, str(config.every)) == (20, "200 steps | 1 epoch")
    defaults = {field.path: field.default for field in hook("RolloutEvaluation").fields}
    assert (defaults["max_episode_steps"], defaults["step_timeout_s"]) == ("1000", "60.0")
    assert (defaults["environments"], defaults["videos"]) == ("4", "1")
