"""Charts of docs/explanation/performance.md, drawn from results.json.

python -m benchmarks.charts
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import nan
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.report import Report, Table
from benchmarks.results import KEPT

FOLDER = Path(__file__).parents[1] / "docs/explanation/charts"
GREY, BLUE, ORANGE = "#808080", "#4c78a8", "#e07b18"
OURS = ("this ", "CheckpointStore", "HookProfiler", "robo_orchard_lab.pipeline")

CHARTS = {  # file: benchmark, title of its table
    "step": ("overhead", "One step"),
    "hook": ("overhead", "One hook's before and after, within a step"),
    "logging": ("observing", "What default logging adds to a step"),
    "save": ("checkpoints", "Saving 307 MB; the store flushes and takes digests"),
    "first_step": ("startup", "From the start of the process to the end of the first step"),
    "robot_data": ("robot_data", "Chunks of 16 actions with two cameras"),
}

END_TO_END = "end_to_end"


def table_of(chart: str) -> Table:
    """Return the measured table that a chart shows."""
    benchmark, title = CHARTS[chart]
    report = Report.from_dict(json.loads(KEPT.read_text("utf-8"))[benchmark]["report"])
    return next(table for table in report.tables if table.title == title)


def draw(table: Table, path: Path) -> None:
    """Draw the medians as bars, with the middle half as a line."""
    rows = [(row.name, row.value) for row in table.rows if row.value is not None]
    names, values = [name for name, _ in rows], [value for _, value in rows]
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9})
    figure = Figure(figsize=(7.5, 0.6 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = [ORANGE if name.startswith(OURS) else BLUE for name in names]
    medians = [value.median for value in values]
    spread = [
        [value.median - value.low for value in values],
        [value.high - value.median for value in values],
    ]
    bars = axes.barh(names, medians, xerr=spread, color=colors, ecolor=GREY, alpha=0.75)
    labels = [f"{median:,.0f}" if median >= 100 else f"{median:.3g}" for median in medians]
    axes.bar_label(bars, labels, padding=4, color=GREY)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_title(f"{table.title} ({table.unit.split(';')[0]})", color=GREY, loc="left", size=9)
    axes.tick_params(colors=GREY, length=0)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def draw_ratios(tables: Sequence[Table], path: Path) -> None:
    """Draw the ratios of each table's rows to its first row, one panel a table."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9})
    names = [row.name for row in tables[0].rows[1:]]
    figure = Figure(figsize=(7.5, 1.0 + 0.26 * len(names)), layout="constrained")
    for axes, table in zip(figure.subplots(1, len(tables), sharey=True), tables, strict=True):
        ratios = {row.name: row.ratio.median for row in table.rows if row.ratio is not None}
        values = [ratios.get(name, nan) for name in names]
        colors = [ORANGE if name.startswith(OURS) else BLUE for name in names]
        bars = axes.barh(names, values, color=colors, alpha=0.75)
        axes.bar_label(bars, [f"{v:.2f}" if v == v else "" for v in values], padding=3, color=GREY)
        axes.axvline(1, color=GREY, linewidth=0.8)
        axes.margins(x=0.3)
        axes.set_title(fill(table.title, 17), color=GREY, loc="left", size=8)
        axes.tick_params(colors=GREY, length=0)
        axes.set_xticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    axes.invert_yaxis()  # of all, since they share it
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for chart in CHARTS:
        draw(table_of(chart), FOLDER / f"{chart}.svg")
    if END_TO_END in (kept := json.loads(KEPT.read_text("utf-8"))):
        report = Report.from_dict(kept[END_TO_END]["report"])
        draw_ratios(report.tables, FOLDER / f"{END_TO_END}.svg")


if __name__ == "__main__":
    main()
