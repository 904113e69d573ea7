"""Tests of the command ``watch``, on a run of another process and in a pseudo-terminal."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli.running import START, environment, run

from robo_orchard_lab.cli.live_view import LiveView, draw_curve
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.report.live import LiveRun
from robo_orchard_lab.report.series import Curve
from run_folders import HOSTILE, record, write_metrics
from run_in_progress import run_in_progress
from terminal import Terminal


@pytest.fixture(scope="module")
def progress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Return the folder of a run in progress, and the process of the run."""
    folder = tmp_path_factory.mktemp("runs") / "spirals"
    with run_in_progress(folder) as process:
        yield folder, process.pid


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """Return the folder of a completed run with a loss, an evaluation, hooks and events."""
    lines = [
        record(step, **{"loss/total": 1 / step, "eval/val/loss": 2 / step, "lr": 0.1})
        for step in range(1, 30)
    ]
    folder = write_metrics(tmp_path / "run", lines)
    progress = {"global_step_id": 29, "epoch_id": 2}
    state = {"state": "completed", "progress": progress, "updated_at": "2026-01-01T00:00:00Z"}
    (folder / "run_state.json").write_text(json.dumps(state))
    hooks = [{"channel": "on_step", "hook": name} for name in ("optimizer", "ema")]
    (folder / "plan.json").write_text(json.dumps({"hooks": hooks}))
    event = {"at": "2026-01-01T10:20:30Z", "event": "save", "step": 20, "text": "step_00000020"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def watching(folder: Path, columns: int, rows: int, *options: str) -> Terminal:
    command = [*START, "watch", str(folder), "--interval", "0.1", *options]
    return Terminal(command, environment(), (columns, rows))


def step_on(screen: list[str]) -> int:
    found = re.search(r"step ([\d,]+)/700,000", screen[1]) if len(screen) > 1 else None
    return int(found[1].replace(",", "")) if found else -1


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40)])
def test_a_run_in_progress_is_shown_until_ctrl_c(
    progress: tuple[Path, int], columns: int, rows: int
) -> None:
    """Stage, step, ETA, curves, events and hooks fill the screen; Ctrl-C leaves it clean."""
    folder, pid = progress
    with watching(folder, columns, rows) as terminal:
        first = terminal.wait_for(lambda screen: step_on(screen) > 0)
        screen = terminal.wait_for(lambda screen: step_on(screen) >= step_on(first) + 5)
        terminal.press("\x03")
        assert terminal.wait() == 130
    assert len(screen) == rows
    assert max(map(len, screen)) <= columns
    text = "\n".join(screen)
    assert re.match(r"spirals +(training|evaluating|saving)", text)
    assert re.search(r"epoch \d+/100,000  step \d+/700,000  0 %  ETA \d+ h \d+ min", text)
    assert re.search(r"loss/total +0\.|loss/total +[12]\.", text)
    assert "eval/val/loss" in text
    assert re.search("[\u2801-\u28ff]{3}", text)
    assert re.search(r"\d+  \d\d:\d\d:\d\d  save +checkpoints/step_", text)
    assert "log > losses > validation > checkpoint" in text
    assert terminal.output.endswith("\x1b[?25h\x1b[?1049l")  # cursor and main screen are back
    assert "Traceback" not in terminal.output
    os.kill(pid, 0)  # the run goes on


def test_the_picture_follows_the_size_of_the_terminal(progress: tuple[Path, int]) -> None:
    """After a resize, the picture has the new size, also a very small one."""
    with watching(progress[0], 100, 30) as terminal:
        terminal.wait_for(lambda screen: len(screen) == 30)
        for columns, rows in ((60, 20), (20, 5), (130, 50)):
            terminal.resize(columns, rows)
            terminal.wait_for(
                lambda screen, columns=columns, rows=rows: (  # type: ignore[misc]
                    len(screen) == rows and max(map(len, screen)) <= columns
                )
            )
        terminal.press("\x03")
        assert terminal.wait() == 130


def test_a_run_that_dies_and_a_folder_that_vanishes(tmp_path: Path) -> None:
    """The view shows kill -9, then the missing folder, then the folder that is back."""
    folder, away = tmp_path / "run", tmp_path / "away"
    with run_in_progress(folder) as process, watching(folder, 90, 30) as terminal:
        terminal.wait_for(lambda screen: step_on(screen) > 0)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        terminal.wait_for(lambda screen: "Killed: process" in screen[min(3, len(screen) - 1)])
        folder.rename(away)
        terminal.wait_for(lambda screen: "the run folder is gone" in screen[0])
        away.rename(folder)
        terminal.wait_for(lambda screen: screen[0].split()[-1] == "failed")
        shutil.rmtree(folder)
        terminal.wait_for(lambda screen: "the run folder is gone" in screen[0])
        terminal.press("\x03")
        assert terminal.wait() == 130


def test_without_a_terminal_one_picture_is_printed(ended: Path) -> None:
    """The output is plain text of at most 40 lines of 80 columns, and the command ends."""
    done = run("watch", str(ended))
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch("run +completed", lines[0])
    assert lines[1].startswith("epoch 2  step 29  last update ")
    assert "eval/val/loss" in done.out
    assert re.search(r"eval/val/loss +0\.06897", done.out)
    assert "steps 1 to 29" in lines
    assert "        20  10:20:30  save            step_00000020" in lines
    assert lines[-1].split() == ["on_step", "optimizer", ">", "ema"]
    assert "\x1b" not in done.out
    wide = run("watch", str(ended), "--metric", "eval", variables={"COLUMNS": "100"})
    assert "0.06897, best 0.06897 at 29" in wide.out
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("options", "variables"),
    [(["--once"], {}), ([], {"TERM": "dumb"}), (["--once"], {"NO_COLOR": "1"})],
)
def test_one_picture_in_a_terminal(
    ended: Path, options: list[str], variables: dict[str, str]
) -> None:
    """With --once, and in a dumb terminal, the picture stays on the screen."""
    command = [*START, "watch", str(ended), *options]
    with Terminal(command, environment(variables), (100, 50)) as terminal:
        assert terminal.wait() == 0
    assert "\x1b[?1049" not in terminal.output
    assert "steps 1 to 29" in terminal.output
    if variables:
        assert "\x1b[3" not in terminal.output


def test_measured_costs_are_shown(ended: Path) -> None:
    """Of a run with a HookProfiler, a line has the time of a step and the largest stages."""
    stages = {
        "forward": {"share": 0.25},
        "backward": {"share": 0.5},
        "x": {"share": "much"},
        "y": 3,
    }
    profile = {"version": 1, "step_seconds": 0.0125, "stages": stages}
    (ended / "profile.json").write_text(json.dumps(profile))
    assert picture(ended)[3] == "12.5 ms a step  backward 50 %  forward 25 %"
    (ended / "profile.json").write_text('{"step_seconds": "fast"}')
    assert "ms a step" not in "\n".join(picture(ended))


def test_a_word_of_no_metric_lists_the_metrics(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture of a run with metrics names those, if no name contains the word."""
    assert main(["watch", str(ended), "--metric", "nothing"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no metric contains nothing; there are " in shown
    assert "loss" in shown.partition("there are ")[2]


def test_metrics_are_selected_by_words(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--metric shows the metrics whose names contain one of the words."""
    assert main(["watch", str(ended), "--metric", "val", "--metric", "lr"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"eval/val/loss +0\.06897", printed)
    assert re.search(r"lr +0\.1$", printed, re.MULTILINE)
    assert "loss/total" not in printed


def test_watch_refuses_a_path_without_a_run_and_a_missing_rich(
    ended: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are errors of two lines at most, with the remedy."""
    assert main(["watch", str(ended.parent / "none")]) == 2
    assert "expected a run folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["watch", str(ended)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: watch needs rich",
        '       pip install "robo-orchard-hooks[terminal]"',
    ]


def test_watch_starts_without_torch(ended: Path) -> None:
    """The process of the command has not imported torch."""
    done = run("watch", str(ended), variables={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.code == 0
    assert "| torch" not in done.err


def picture(folder: Path, width: int = 80, encoding: str = "utf-8") -> list[str]:
    followed = LiveRun(folder)
    followed.update()
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, highlight=False).print(LiveView(followed))
    file.seek(0)
    return file.read().splitlines()


def hostile_run(folder: Path) -> Path:
    names = {HOSTILE: 1.0, "表" * 50: 1e308, "eval/x\n/loss": "NaN", "\x1b[31m": "Infinity"}
    lines = [record(step, **names) for step in (5, 1, 3)]
    lines += ["broken\n", record(9, **{"表" * 50: -1e308, "a": 10**400}), '{"global_st']
    write_metrics(folder, lines)
    error = {"type": HOSTILE, "message": HOSTILE * 20, "hook": HOSTILE}
    state = {"state": "failed", "error": error, "progress": {"global_step_id": -4}}
    (folder / "run_state.json").write_text(json.dumps(state))
    (folder / "events.jsonl").write_text(json.dumps({"event": HOSTILE, "text": [HOSTILE]}))
    (folder / "plan.json").write_text(json.dumps({"hooks": [{"hook": HOSTILE}, 3, {}]}))
    return folder


@pytest.mark.parametrize("width", [10, 30, 80, 200])
def test_hostile_files_stay_on_their_lines(tmp_path: Path, width: int) -> None:
    """Names without width, control codes, huge and non-finite values break no line."""
    folder = hostile_run(tmp_path / "run")
    process = {"pid": 1, "host": HOSTILE, "started_at": 0.0, "namespace": HOSTILE}
    for state in (None, {"state": "running", "process": process}):
        if state is not None:
            (folder / "run_state.json").write_text(json.dumps(state))
            (folder / "stage.json").write_text(json.dumps({"stage": HOSTILE, "detail": HOSTILE}))
        lines = picture(folder, width)
        assert len(lines) <= 40
        assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    "content", [None, "", "\n\n", "{", "[]\n", '{"metrics": 3}\n', "\x00" * 99]
)
def test_a_folder_with_next_to_nothing_is_shown(tmp_path: Path, content: str | None) -> None:
    """Files that are missing, empty or cut leave their part of the picture out."""
    (tmp_path / "run_state.json").write_text("{}")
    if content is not None:
        for name in ("metrics.jsonl", "events.jsonl", "plan.json", "stage.json"):
            (tmp_path / name).write_text(content)
    text = "\n".join(picture(tmp_path))
    assert "no metrics yet" in text
    assert "no step yet" in text


def test_a_terminal_without_braille_gets_ascii(ended: Path) -> None:
    """In an encoding without braille, curves and bars are of ASCII characters."""
    text = "\n".join(picture(ended, encoding="ascii"))
    assert text.isascii()
    assert "**" in text


def test_a_curve_spans_its_rows() -> None:
    """The largest value is on the top line, the smallest on the last, at their columns."""
    curve = Curve()
    for step, value in enumerate([0.0, 5.0, 1.0, -5.0, 0.0]):
        curve.add(step, value)
    lines = draw_curve(curve, (0, 4), 20, 5)
    assert {len(line) for line in lines} == {20}
    columns = [[x for x, cell in enumerate(line) if cell != " "] for line in lines]
    assert 5 in columns[0]
    assert max(columns[0]) < 8
    assert 14 in columns[-1]
    assert min(columns[-1]) > 11
    assert all(columns)


def test_curves_of_extreme_values_are_drawn() -> None:
    """One point, equal values, infinite spans and NaN alone have a picture of the same size."""
    for values in ([1.0], [2.0, 2.0], [-1.7e308, 1.7e308], [math.nan], [math.inf, 1.0], []):
        curve = Curve()
        for step, value in enumerate(values):
            curve.add(step, value)
        lines = draw_curve(curve, (0, max(1, len(values) - 1)), 12, 3)
        assert [len(line) for line in lines] == [12, 12, 12]
        is_drawn = any(line.strip() for line in lines)
        assert is_drawn is any(map(math.isfinite, values))


def test_the_command_ends_with_its_reader(ended: Path) -> None:
    """A reader that ends early, as `head` does, causes no error."""
    shell = f"{' '.join(map(repr, START))} watch {ended} | head -1"
    done = subprocess.run(
        ["bash", "-c", shell],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout.split(), done.stderr) == (["run", "completed"], "")
