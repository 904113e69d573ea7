"""Curves of metrics files: downsampling, damage, and a million points."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_lab.report import series
from robo_orchard_lab.report.files import Problems
from robo_orchard_lab.report.page import render, write
from robo_orchard_lab.report.series import downsample, guess_mode, read_metrics, to_plain
from run_folders import Page, record, write_metrics

VALUES = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.lists(VALUES, max_size=400), st.integers(4, 120))
def test_downsampling_keeps_extremes(values: list[float], limit: int) -> None:
    """The kept points are in order and few; ends, extremes and non-finite values are among them."""
    kept = downsample(values, limit)
    assert kept == sorted(set(kept))
    assert len(kept) <= max(limit, 5) + 1 or len(kept) == len(values) <= limit
    finite = [v for v in values if math.isfinite(v)]
    shown = [values[i] for i in kept]
    if values:
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
        bad = [i for i, v in enumerate(values) if not math.isfinite(v)]
        assert bad[:1] == [i for i in kept if not math.isfinite(values[i])][:1]
    if finite:
        assert {min(finite), max(finite)} <= set(shown)


def test_a_short_curve_is_complete() -> None:
    """A curve with as many points as the limit is not changed."""
    assert downsample([3.0, 1.0, 2.0], 3) == [0, 1, 2]


def test_short_curves_leave_their_share(tmp_path: Path) -> None:
    """Short curves stay complete, and a long curve uses the rest of the budget."""
    lines = [
        record(s, long=float(s), **({"short": 1.0} if s % 50 == 0 else {})) for s in range(500)
    ]
    metrics = read_metrics(write_metrics(tmp_path, lines) / "metrics.jsonl", Problems())
    plain = to_plain(metrics, 110)
    assert len(plain["short"]["x"]) == plain["short"]["points"] == 10
    assert 40 < len(plain["long"]["x"]) <= 101
    assert plain["long"]["points"] == 500


def test_values_of_earlier_steps_and_partial_records_count(tmp_path: Path) -> None:
    """Metrics of earlier steps stand at their own step, and the last value of a step counts."""
    line = json.loads(record(50, loss=0.5))
    line["earlier"] = [{"step": 48, "metrics": {"grad_norm": 1.5}}]
    partial = {**json.loads(record(50, loss=0.25)), "partial": True}
    folder = write_metrics(tmp_path, [json.dumps(line) + "\n", json.dumps(partial) + "\n"])
    curves = read_metrics(folder / "metrics.jsonl", Problems()).curves
    assert ([*curves["grad_norm"].steps], [*curves["grad_norm"].values]) == ([48], [1.5])
    assert ([*curves["loss"].steps], [*curves["loss"].values]) == ([50], [0.25])


def test_damage_is_counted_and_left_out(tmp_path: Path) -> None:
    """Lines that are no records, values that are no numbers and a cut last line are problems."""
    lines = [
        record(3, loss=3.0),
        "no json\n",
        "[1, 2]\n",
        "[" * 100_000 + "\n",
        record(1, loss=1.0, text="high", nested={"a": 1}, huge=10**400),
        record(2, loss="NaN"),
        record(4, loss=True),
        record(5, loss=5.0)[:-20],
    ]
    problems = Problems()
    folder = write_metrics(tmp_path, lines)
    curves = read_metrics(folder / "metrics.jsonl", problems).curves
    assert [*curves["loss"].steps] == [1, 2, 3]
    plain = curves["loss"].to_plain(100)
    assert (plain["y"], plain["non_finite"], plain["first_non_finite"]) == ([1.0, None, 3.0], 1, 2)
    assert math.isinf(curves["huge"].values[0])
    assert "the last line of metrics.jsonl is cut" in problems[0]
    assert "3 lines of metrics.jsonl can't be read" in problems[1]
    assert "3 values of metrics.jsonl are no numbers" in problems[2]


def test_every_name_has_its_curve(tmp_path: Path) -> None:
    """Names that share a long beginning stay apart; a page has those that UTF-8 can't encode."""
    names = ["x" * 10_000 + end for end in "abc"] + ["\ud800", "__proto__", "", "a\0b"]
    lines = [record(1, **{name: float(at) for at, name in enumerate(names)})]
    run = write_metrics(tmp_path / "run", lines)
    file = tmp_path / "page.html"
    write(file, render([run]))
    found = Page(file.read_text()).data["runs"][0]["series"]
    values = {name: curve["y"][0] for name, curve in found.items()}
    assert sorted(values.values()) == [0, 1, 2, 3, 4, 5, 6]
    assert (values["?"], values["__proto__"], values["a\0b"]) == (3, 4, 6)
    assert max(map(len, values)) < 320


def test_steps_beyond_every_axis_are_damage(tmp_path: Path) -> None:
    """A step that no chart can show, or that is negative, is left out and counted."""
    lines = [record(step, loss=1.0) for step in (3, 2**52, -1, 2**50 - 1)]
    problems = Problems()
    found = read_metrics(write_metrics(tmp_path, lines) / "metrics.jsonl", problems)
    assert [*found.curves["loss"].steps] == [3, 2**50 - 1]
    assert problems == ["2 values of metrics.jsonl are no numbers and are left out"]


def test_a_series_of_nan_alone_has_no_best() -> None:
    """A curve without a finite value has no best value."""
    curve = series.Curve()
    curve.add(1, math.nan)
    assert curve.best("min") is None
    assert curve.to_plain(10)["y"] == [None]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("eval/val/loss", "min"),
        ("eval/val/accuracy", "max"),
        ("eval/val/top5_accuracy", "max"),
        ("eval/sim/success_rate", "max"),
        ("eval/val/rmse", "min"),
        ("eval/val/glossary", None),
    ],
)
def test_the_direction_of_a_metric_is_guessed_by_whole_words(name: str, mode: str | None) -> None:
    """Known words in a name decide; parts of other words do not."""
    assert guess_mode(name) == mode


def test_a_million_points_fit_into_a_page(tmp_path: Path) -> None:
    """A page of a million points has less than 5 MB, all extremes, and is written in seconds."""
    rng = random.Random(0)
    values = [[rng.gauss(0, 1) for _ in range(10)] for _ in range(100_000)]
    values[31_415][3], values[92_653][7] = 1234.5, -1234.5
    lines = (
        record(step, **{f"train/metric{i}": value for i, value in enumerate(row)})
        for step, row in enumerate(values)
    )
    folder = write_metrics(tmp_path, lines)
    began_at = time.process_time()
    page = render([folder])
    assert time.process_time() - began_at < 20
    assert len(page.encode()) < 5_000_000
    curves = Page(page).data["runs"][0]["series"]
    assert len(curves) == 10
    for i, column in enumerate(zip(*values, strict=True)):
        curve = curves[f"train/metric{i}"]
        assert curve["points"] == 100_000
        assert len(curve["x"]) <= series.MAX_POINTS_OF_CURVE + 1
        assert (min(curve["y"]), max(curve["y"])) == (min(column), max(column))
        assert curve["x"][curve["y"].index(max(column))] == column.index(max(column))
