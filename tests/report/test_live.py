"""A run that is followed while its files change."""

from __future__ import annotations

import json
import os
from pathlib import Path

from robo_orchard_lab.report import live
from robo_orchard_lab.report.live import LiveRun
from run_folders import record, write_metrics


def append(folder: Path, *lines: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(lines)


def test_updates_add_what_is_new(tmp_path: Path) -> None:
    """Each update adds new records, events and hooks; a replaced file replaces its values."""
    folder = write_metrics(tmp_path, [record(1, a=1.0)])
    run = LiveRun(folder)
    run.update()
    assert [*run.metrics.curves["a"].values] == [1.0]
    append(folder, record(2, a=2.0), '{"epoch_id"')
    (folder / "events.jsonl").write_text('{"event": "save", "step": 2}\n')
    (folder / "plan.json").write_text('{"hooks": [{"channel": "on_step", "hook": "x"}]}')
    run.update()
    assert [*run.metrics.curves["a"].steps] == [1, 2]
    assert [event["event"] for event in run.events] == ["save"]
    assert run.hooks == {"on_step": ["x"]}
    os.replace(
        write_metrics(tmp_path / "b", [record(1, b=1.0)]) / "metrics.jsonl",
        folder / "metrics.jsonl",
    )
    run.update()
    assert list(run.metrics.curves) == ["b"]


def test_a_folder_that_is_back_is_read_again(tmp_path: Path) -> None:
    """A folder that is gone keeps its last values; another run at its place has its own."""
    folder = write_metrics(tmp_path / "run", [record(1, a=1.0)])
    run = LiveRun(folder)
    run.update()
    folder.rename(tmp_path / "away")
    run.update()
    assert (run.is_gone, list(run.metrics.curves)) == (True, ["a"])
    write_metrics(folder, [record(1, b=1.0)])
    run.update()
    assert (run.is_gone, list(run.metrics.curves)) == (False, ["b"])


def test_the_metrics_file_and_directions_are_those_of_the_configuration(tmp_path: Path) -> None:
    """A configuration that names another metrics file and a direction is followed."""
    write_metrics(tmp_path / "logs", [record(1, x=1.0)])
    (tmp_path / "logs" / "metrics.jsonl").rename(tmp_path / "m.jsonl")
    run = LiveRun(tmp_path)
    run.update()
    assert run.metrics.curves == {}
    sink = {"class_type": "JsonLinesSink", "path": "m.jsonl"}
    hooks = {"log": {"sinks": [sink]}, "best": {"monitor": "x", "mode": "max"}}
    (tmp_path / "config.yaml").write_text(json.dumps({"name": "named", "hooks": hooks}))
    run.update()
    assert (run.name, list(run.metrics.curves), run.mode("x")) == ("named", ["x"], "max")


def test_a_long_file_is_read_in_parts_and_thinned_out(tmp_path: Path) -> None:
    """An update ends at its time; memory is bounded, and the extremes stay."""
    lines = [record(step, a=float(step % 7)) for step in range(1, 20_001)]
    lines[9_999] = record(10_000, a=-50.0)
    run = LiveRun(write_metrics(tmp_path, lines))
    run.update(0.0)
    first = len(run.metrics.curves["a"].steps)
    assert 0 < first < 20_000
    behind = [run.is_behind]
    while behind[-1]:
        run.update(0.0)
        behind.append(run.is_behind)
    curve = run.metrics.curves["a"]
    assert len(behind) > 3
    assert len(curve.steps) <= live._MAX_POINTS
    assert (curve.best("min"), curve.steps[0], curve.steps[-1]) == ((10_000, -50.0), 1, 20_000)
    assert [*curve.steps] == sorted(set(curve.steps))
    assert run.position.steps == 20_000
