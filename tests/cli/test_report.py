"""Tests of the commands ``report`` and ``runs``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.cli.running import START, environment, run
from tests.cli.spirals import EXPERIMENT, MODULE

from robo_orchard_lab.cli.main import main
from robo_orchard_lab.report.story import read_story
from run_folders import HOSTILE, Page, record, write_metrics

LONGEST_S = 60.0


def made(folder: Path, lr: float, values: list[float], **state: object) -> Path:
    """Return a run folder with a metric by step."""
    lines = [record(step, **{"eval/val/loss": v}) for step, v in enumerate(values, start=1)]
    write_metrics(folder, lines)
    (folder / "config.yaml").write_text(json.dumps({"name": "x", "optimizer": {"lr": lr}}))
    (folder / "starts").mkdir()
    changed = ["?? new.py", *([" M a.py"] if lr == 0.1 else [])]
    start = {"git": {"commit": "abcdef0123456789", "changed": changed}}
    (folder / "starts" / "0001.json").write_text(json.dumps(start))
    progress = {"global_step_id": len(values), "epoch_id": 1}
    document = {"state": "completed", "progress": progress, **state}
    (folder / "run_state.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with three runs, the working directory next to it."""
    monkeypatch.chdir(tmp_path)
    started = [f"2026-01-0{day}T00:00:00Z" for day in (1, 2, 3)]
    made(tmp_path / "runs" / "a", 0.1, [3.0, 1.0, 2.0], started_at=started[2])
    made(tmp_path / "runs" / "deep" / "b", 0.2, [3.0, 2.5], started_at=started[0])
    made(tmp_path / "runs" / "c", 0.3, [0.5], started_at=started[1], state="failed")
    return Path("runs")


def test_a_killed_run_has_a_report_up_to_its_last_record(tmp_path: Path) -> None:
    """After kill -9, the report says so and has each flushed value."""
    (tmp_path / "parts.py").write_text(MODULE)
    slow = '  slow: {class_type: "parts:Slow", seconds: 0.05}\n'
    text = EXPERIMENT.replace("every: 5 steps", "every: 1 step")
    text = text.replace("  preemption: {class_type: Preemption}\n", slow)
    (tmp_path / "experiment.yaml").write_text(text)
    train = [*START, "train", "experiment.yaml", "--trust", "parts", "--run_folder", "run"]
    process = subprocess.Popen(
        train, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics, ends_at = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LONGEST_S
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    flushed = [json.loads(line)["global_step_id"] for line in metrics.read_text().splitlines()]
    assert main(["report", str(tmp_path / "run")]) == 0
    story = Page((tmp_path / "run" / "report.html").read_text()).data["runs"][0]
    assert story["verdict"]["state"] == "failed"
    assert story["verdict"]["error"]["type"] == "Killed"
    assert story["verdict"]["steps"] == flushed[-1]
    assert story["name"] == "spirals"
    lr = next(item for item in story["configuration"] if item["path"] == "optimizer.lr")
    assert (lr["value"], lr["from"]) == ("0.1", "experiment.yaml:13")


def test_values_have_their_sources_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values come from base, file or command line; a resume keeps that, and lists its changes."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(EXPERIMENT)
    Path("child.yaml").write_text("base: base.yaml\nrun_folder: run\noptimizer: {lr: 0.2}\n")
    assert main(["train", "child.yaml", "--trainer.max_epoch", "1"]) == 0
    assert main(["resume", "run", "--trainer.max_epoch", "2"]) == 0
    story = read_story(Path("run"))
    found = {item["path"]: (item["value"], item["from"]) for item in story["configuration"]}
    assert found["optimizer.lr"] == ("0.2", "child.yaml:3")
    assert found["optimizer.momentum"] == ("0.9", "base.yaml:13")
    assert found["trainer.max_epoch"] == ("2", "command line: --trainer.max_epoch")
    assert found["model.hidden"] == ("[8]", "base.yaml:2")
    assert found["trainer.max_step"] == ("null", "")
    assert story["base"]["file"] == "base.yaml"
    changes = {change["path"]: change["after"] for change in story["base"]["changes"]}
    assert (changes["optimizer.lr"], changes["trainer.max_epoch"]) == ("0.2", "1")
    [change] = [each for each in story["changes"] if each["path"] == "trainer.max_epoch"]
    assert (change["start"], change["before"], change["after"]) == ("0002", "1", "2")


def test_report_compares_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several runs make one page with all curves, the differences and the sorting metric."""
    arguments = ["report", "runs/a", "runs/c", "runs/deep/b", "--sort", "eval/val/loss"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == "comparison.html"
    data = Page(Path("comparison.html").read_text()).data
    assert data["differences"] == [{"path": "optimizer.lr", "values": ["0.1", "0.3", "0.2"]}]
    assert [run["name"] for run in data["runs"]] == ["a", "c", "deep/b"]
    assert [run["series"]["eval/val/loss"]["points"] for run in data["runs"]] == [3, 1, 2]


def test_report_refuses_a_path_without_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path without a run, and a file that can't be written, are errors of one line."""
    assert main(["report", "runs/none"]) == 2
    assert "error: there is no runs/none; expected a run folder" in capsys.readouterr().err
    assert main(["report", "runs/a", "--output", "none/report.html"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: none/report.html can't be written: No such file or directory",
        "       pass --output FILE in a writable folder",
    ]


def test_runs_lists_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row has state, steps, best metric and commit of a run; the newest start is the last row."""
    assert main(["runs"]) == 0
    headings, *rows = capsys.readouterr().out.splitlines()
    assert headings.split() == ["RUN", "STATE", "STEPS", "TIME", "BEST", "COMMIT"]
    assert [row.split()[0] for row in rows] == ["deep/b", "c", "a"]
    assert rows[1].endswith(" abcdef01")
    assert rows[2].split()[1:3] == ["completed", "3"]
    assert rows[2].endswith("eval/val/loss 1 (step 2)    abcdef01+")


@pytest.mark.parametrize(
    ("options", "order"),
    [
        (["--sort", "best"], ["deep/b", "a", "c"]),
        (["--sort", "best", "--reverse"], ["c", "a", "deep/b"]),
        (["--sort", "steps"], ["c", "deep/b", "a"]),
        (["--sort", "run"], ["a", "c", "deep/b"]),
    ],
)
def test_runs_sorts(
    folder: Path, options: list[str], order: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are sorted by a column; the best run is the last one."""
    assert main(["runs", *options, "--json"]) == 0
    paths = [Path(each["path"]) for each in json.loads(capsys.readouterr().out)]
    assert [str(path.relative_to("runs")) for path in paths] == order


def test_hostile_folders_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged files, loops of links and hostile names end no list, and stay on their line."""
    (folder / "a" / "run_state.json").write_bytes(b"\xff{")
    (folder / "c" / "metrics.jsonl").unlink()
    os.mkfifo(folder / "c" / "metrics.jsonl")
    (folder / "loop").symlink_to(folder.resolve())
    hostile = write_metrics(folder / HOSTILE.replace("/", "|"), [record(1, **{HOSTILE: 1.0})])
    state = {"state": ["x"], "progress": 3, "process": {"pid": -1}, "started_at": 7}
    (hostile / "run_state.json").write_text(json.dumps(state))
    (hostile / "config.yaml").write_text("a: &a [*a]")
    shutil.copytree(hostile, folder / ("x" * 200))
    assert main(["runs", "--metric", HOSTILE]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 6
    assert "\x1b" not in printed.out + printed.err
    assert "run_state.json is damaged" in printed.err
    assert main(["runs", "nowhere"]) == 2
    assert main(["runs", str(folder / "deep" / "b" / "starts")]) == 0
    assert "there are no runs in" in capsys.readouterr().out


def test_an_unknown_metric_of_the_best_column_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column BEST of a metric that no run has is an error, not an empty column."""
    assert main(["runs", str(folder), "--metric", "eval/val/los"]) == 2
    assert "did you mean 'eval/val/loss'?" in capsys.readouterr().err


def test_runs_in_progress_have_their_newest_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run between two saves has the steps of its newest file; of another machine, its host."""
    process = {"pid": 1, "host": "other", "started_at": 0.0, "namespace": "pid:[1]"}
    started = "2026-01-04T00:00:00Z"
    run_ = made(
        folder / "now", 0.3, [0.5, 0.4], state="running", process=process, started_at=started
    )
    stage = {"stage": "saving", "step": 7, "total_steps": 9, "at": "2026-01-04T00:02:00Z"}
    (run_ / "stage.json").write_text(json.dumps(stage))
    assert main(["runs", "--metric", "eval/val/loss"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:6] == ["now", "running", "on", "other", "7", "2"]
    assert main(["runs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[-1]
    named = [found[name] for name in ("state", "stage", "host", "steps", "total_steps")]
    assert named == ["running", "saving", "other", 7, 9]
    assert found["updated_at"] == "2026-01-04T00:02:00+00:00"


def test_runs_inside_of_runs_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder inside another is listed after it; a checkpoint is none, whatever it has."""
    made(folder / "a" / "second" / "x", 0.1, [1.0])
    write_metrics(folder / "a" / "checkpoints" / "step_00000001", [record(1)])
    assert main(["runs", "--json", "--sort", "run"]) == 0
    paths = [each["path"] for each in json.loads(capsys.readouterr().out)]
    assert paths == ["runs/a", "runs/a/second/x", "runs/c", "runs/deep/b"]


def test_runs_are_filtered_and_have_columns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conditions select rows, columns replace the default ones, and runs without a field count."""
    made(folder / "other", 0.5, [])
    columns = ["--columns", "lr, eval/val/loss:best", "--columns", "time"]
    options = ["--where", "lr>0.1", "--where", "val/loss:best<3", "--sort", "lr", *columns]
    assert main(["runs", *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "RUN     LR   EVAL/VAL/LOSS:BEST  TIME",
        "deep/b  0.2  2.5",
        "c       0.3  0.5",
    ]
    assert printed.err.splitlines() == ["1 of 4 runs left out: no val/loss:best to compare with 3"]
    assert main(["runs", *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[1] == {"run": "c", "lr": 0.3, "eval/val/loss:best": 0.5, "time": None}
    assert main(["runs", "--where", "state=running"]) == 0
    assert capsys.readouterr().out == "there are no runs in runs that meet the conditions\n"


def test_runs_are_written_to_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file by its suffix has the rows; an error leaves none behind."""
    options = ["--where", "state=completed", "--columns", "lr"]
    assert main(["runs", *options, "--out", "runs.csv"]) == 0
    assert capsys.readouterr().out == "wrote runs.csv (2 runs)\n"
    assert Path("runs.csv").read_text() == "run,lr\ndeep/b,0.2\na,0.1\n"
    assert main(["runs", "--out", "runs.jsonl"]) == 0
    last = json.loads(Path("runs.jsonl").read_text().splitlines()[-1])
    assert last["best"] == 1.0
    assert last["started"] == "2026-01-03T00:00:00+00:00"
    capsys.readouterr()
    assert main(["runs", "--out", "runs.xlsx"]) == 2
    assert "expected a file ending in .csv, .jsonl or .parquet" in capsys.readouterr().err
    assert main(["runs", "--out", "none/runs.csv"]) == 1
    assert "none/runs.csv can't be written" in capsys.readouterr().err
    assert main(["runs", "--columns", "lrr"]) == 2
    assert "error: no run has a field 'lrr'; did you mean 'lr'?" in capsys.readouterr().err


def test_report_compares_the_runs_that_meet_conditions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With conditions, folders stand for the runs below them."""
    assert main(["report", "runs", "--where", "optimizer.lr>0.1", "--output", "page.html"]) == 0
    runs = Page(Path("page.html").read_text()).data["runs"]
    assert [each["name"] for each in runs] == ["deep/b", "c"]
    assert main(["report", "runs", "--where", "lr>9"]) == 2
    assert "error: no run in runs meets the conditions" in capsys.readouterr().err


def test_the_commands_do_not_import_torch(folder: Path) -> None:
    """The processes of both commands import neither torch nor packages of data frames."""
    variables = {"PYTHONPROFILEIMPORTTIME": "1"}
    query = ["runs", "--where", "lr>0", "--columns", "val/loss:best", "--out", "runs.csv"]
    for arguments in (["report", "runs/a"], ["runs"], query):
        done = run(*arguments, variables=variables)
        assert done.code == 0
        assert not re.search(r"\| +(torch|numpy|pandas|polars)$", done.err, re.MULTILINE)
