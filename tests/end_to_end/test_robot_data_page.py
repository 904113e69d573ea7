"""Scripts and file of docs/how_to/robot_data.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.pipeline.sinks.jsonl import read_metrics

PAGE = (Path(__file__).resolve().parents[2] / "docs/how_to/robot_data.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def test_the_page_records_reads_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scripts print what the page shows, and the file trains on their dataset."""
    monkeypatch.chdir(tmp_path)
    record, read = blocks("python")
    exec(record, {})  # noqa: S102  # the page's own script
    exec(read, {})  # noqa: S102
    assert capsys.readouterr().out == blocks("text")[0]
    document = yaml.safe_load(blocks("yaml")[0])
    document["trainer"]["max_step"] = 4
    document["data"]["train"].update(num_workers=0, batch_size=16)
    document["hooks"]["log"] = {
        "class_type": "MetricsLogger",
        "sinks": [{"class_type": "JsonLinesSink", "path": "metrics.jsonl"}],
    }
    ExperimentConfig.from_dict(document).build(run_folder="run").trainer()
    names = {each.name for record in read_metrics("run/metrics.jsonl") for each in record.values}
    assert {"loss/total", "eval/val/loss"} <= names
