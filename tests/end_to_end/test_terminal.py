"""Sessions of the command line in terminals of several sizes, as a person sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from launching import launch
from robo_orchard_lab.cli.main import main

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "terminal_session.py"
SHORT = ["--data.train.dataset.size", "300", "--data.evaluation.val.dataset.size", "100"]
NO_REPORT = "--hooks.report=null"


@dataclass(frozen=True)
class Session:
    """What a command wrote to a terminal."""

    code: int
    lines: list[str]
    """Lines at the end, also those that scrolled out."""
    found: list[str]
    """Lines when the awaited text was on the screen."""
    written: str


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """Return a function that runs a command in a terminal, next to a new experiment.yaml."""
    monkeypatch.chdir(tmp_path)
    assert main(["config", "init"]) == 0

    def run(*arguments: str, columns: int = 80, rows: int = 24, **order: object) -> Session:
        order = {"variables": {}, **order, "columns": columns, "rows": rows}
        done = launch(SCRIPT, json.dumps({**order, "arguments": arguments}), processes=1)
        return Session(**json.loads(done.stdout))

    return run


def masked(lines: list[str], masks: Mapping[str, str]) -> list[str]:
    for pattern, text in masks.items():
        lines = [re.sub(pattern, text, line) for line in lines]
    return lines


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40)])
def test_a_run_of_20_epochs(session: Callable[..., Session], columns: int, rows: int) -> None:
    """A run has header, live bar, ten aligned lines and the result, in under 25 lines."""
    until = r"loss \d.*ETA"
    done = session("train", "experiment.yaml", *SHORT, columns=columns, rows=rows, until=until)
    assert re.match(r"epoch +\d+/20  step +\d+/60  [━╸╺]+ +loss \d\.\d{4}  ", done.found[-1])
    assert done.code == 0
    assert len(done.lines) < 25
    numbers = {r"\d+\.\d{4}": "N.NNNN", r"\d\.\d\de-\d\d": "N.NNe-NN", r"  +[\d,]+$": "  SPEED"}
    assert masked(done.lines[:16], numbers) == [
        "spirals",
        "model  MLP, 4,547 parameters, on cpu",
        "data   Spirals, 300 samples, 3 steps an epoch",
        "run    20 epochs, 60 steps, in runs/spirals, new",
        "",
        "epoch  step       loss   val/loss         lr  samples/s",
        *(
            f"{epoch:5}  {epoch * 3:4}     N.NNNN     N.NNNN   N.NNe-NN  SPEED"
            for epoch in range(2, 21, 2)
        ),
    ]
    assert len({len(line) for line in done.lines[5:16]}) == 1  # right-aligned
    result = {
        **numbers,
        r"0:00:\d\d, [\d,]+": "TIME, SPEED",
        r"[▁-█]{20,}": "CURVE",
        r"step \d+$": "step N",
    }
    assert masked(done.lines[16:], result) == [
        "",
        "runs/spirals: completed after 60 steps in TIME, SPEED samples/s",
        "  loss           N.NNNN  CURVE",
        "  eval/val/loss  N.NNNN  best N.NNNN at step N",
        "  checkpoint  runs/spirals/checkpoints/step_00000060",
        "  report      runs/spirals/report.html",
        "  next        robo-orchard-lab evaluate runs/spirals",
    ]


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40)])
def test_ctrl_c_leaves_a_clean_screen(
    session: Callable[..., Session], columns: int, rows: int
) -> None:
    """Ctrl-C removes the bar, and leaves the outcome and the command to resume, which continues."""
    endless = ["experiment.yaml", NO_REPORT, "--trainer.max_epoch", "100000", "--lr_scheduler=null"]
    keys = {"until": r"loss \d.*ETA", "press": "\x03"}
    done = session("train", *endless, columns=columns, rows=rows, **keys)
    assert done.code == 130
    assert "stopping after this step ... (Ctrl-C again to stop now)" in done.written
    shown = "".join(done.lines)
    assert "^C" not in shown
    assert "━" not in shown
    at = done.lines.index("") + 1
    assert masked(done.lines[at:], {r"after \d+ of": "after N of", r"0:00:\d\d": "TIME"}) == [
        "runs/spirals: stopped after N of 3000000 steps in TIME (received SIGINT)",
        "  resume:  robo-orchard-lab resume runs/spirals",
    ]
    if columns > 80:
        return  # another resume would show the same
    steps = int(re.findall(r"after (\d+) of", done.lines[at])[0])
    resumed = session("resume", "runs/spirals", "--trainer.max_step", str(steps + 1))
    assert resumed.code == 0
    start = f"run    {steps + 1} steps, in runs/spirals, resumed after step {steps}, from "
    assert f"{start}step_{steps:08}" in " ".join(map(str.strip, resumed.lines))


def test_a_narrow_terminal(session: Callable[..., Session]) -> None:
    """At 30 columns, the bar is one line, and columns that do not fit are left out."""
    until = r"loss \d"
    done = session("train", "experiment.yaml", *SHORT, NO_REPORT, columns=30, until=until)
    assert re.match(r"step +\d+/60  loss \d\.\d{4}$", done.found[-1])
    assert done.code == 0
    at = done.lines.index("epoch  step       loss") + 1
    rows = done.lines[at : at + 10]
    assert all(re.fullmatch(r" +\d+ +\d+     \d\.\d{4}", row) for row in rows)
    assert "runs/spirals: completed after" in done.lines


def test_a_dumb_terminal(session: Callable[..., Session]) -> None:
    """``TERM=dumb`` has plain lines with their times: header, each epoch, and the end."""
    order = {"columns": 200, "rows": 60, "variables": {"TERM": "dumb"}}
    done = session("train", "experiment.yaml", *SHORT, NO_REPORT, **order)
    assert done.code == 0
    assert "\x1b" not in done.written
    assert "━" not in done.written
    told = [line for line in done.lines if re.match(r"\d\d:\d\d:\d\d INFO +(\w+:|epoch)", line)]
    assert [line.split()[2] for line in told] == ["model:", "data:", "run:", *["epoch"] * 21]


def test_verbose_without_colors(session: Callable[..., Session]) -> None:
    """``-v`` adds each epoch and each save; with ``NO_COLOR``, the bar has no colors."""
    order = {"columns": 200, "rows": 60, "variables": {"NO_COLOR": "1"}}
    done = session("train", "experiment.yaml", *SHORT, NO_REPORT, "-v", **order)
    assert done.code == 0
    rows = [line for line in done.lines if re.match(r" +\d+ +\d+  .* \d\.\d{4}", line)]
    assert len(rows) == 20 + 1  # and the logging point of step 50
    assert len([line for line in done.lines if " saved " in line]) == 4
    assert "━" in done.written
    assert not re.search(r"\x1b\[[\d;]*3\d[\d;]*m", done.written)


def test_quiet(session: Callable[..., Session]) -> None:
    """``-q`` shows nothing of a completed run."""
    done = session("train", "experiment.yaml", *SHORT, NO_REPORT, "-q")
    assert (done.code, done.lines) == (0, [])
