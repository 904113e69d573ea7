"""Latest measurements in results.json, and RESULTS.md generated from them.

A single benchmark can be repeated, and the page still shows all benchmarks. Remarks on missed bars
are in remarks.toml, by benchmark and row.
"""

import json
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.printing import markdown
from benchmarks.pythons import HERE
from benchmarks.registry import BENCHMARKS
from benchmarks.report import Report, Row, Table

PAGE = HERE / "RESULTS.md"
KEPT = HERE / "results.json"
REMARKS = HERE / "remarks.toml"


@dataclass(frozen=True, slots=True)
class Measured:
    """A report with its date and commit."""

    report: Report
    on: str
    commit: str


def keep(reports: Sequence[Report]) -> None:
    """Replace older reports of the same benchmarks, and rewrite the page."""
    kept: dict[str, Any] = {}
    if KEPT.exists():
        kept = json.loads(KEPT.read_text(encoding="utf-8"))
    for report in reports:
        kept[report.benchmark] = {
            "on": date.today().isoformat(),
            "commit": _commit(),
            "report": report.to_dict(),
        }
    ordered = {name: kept[name] for name in BENCHMARKS if name in kept}
    KEPT.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(_measured(ordered), _remarks(REMARKS)), encoding="utf-8")
    print("to draw the charts of the documents again: python -m benchmarks.charts")


def page(measured: Mapping[str, Measured], remarks: Mapping[str, Mapping[str, str]]) -> str:
    """Return all results as Markdown: bars, misses with reasons, then every table."""
    missing = [name for name in BENCHMARKS if name not in measured]
    parts = [
        "# Results",
        "Written by `python -m benchmarks --write` (README.md says what is measured, and how). "
        "Every ratio is to its table's first row, taken between neighbours in time; a bar is the "
        "most that is allowed.",
    ]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    parts += ["## Bars", _bars(measured)]
    missed = list(_missed(measured, remarks))
    if missed:
        parts += ["## Missed", *missed]
    parts += [
        f"## {title.capitalize()}\n\n{remark['text']}"
        for title, remark in remarks.items()
        if title not in BENCHMARKS
    ]
    for name, found in measured.items():
        parts += _section(name, found, remarks.get(name, {}).get("text", ""))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _section(name: str, found: Measured, text: str) -> Iterator[str]:
    report = found.report
    yield f"## {name}"
    yield (
        f"`python -m benchmarks {name}` on {found.on}, at commit {found.commit}: "
        + ", ".join(f"{what} {version}" for what, version in report.environment.items())
        + "."
    )
    yield from filter(None, [text])
    yield from map(markdown, report.tables)
    yield from (f"FAULT, so that the figures are void: {fault}" for fault in report.faults)


def _bars(measured: Mapping[str, Measured]) -> str:
    lines = ["| benchmark | what | measured | bar |  |", "|---|---|---|---|---|"]
    for name, table, row in _rows_with_bars(measured):
        verdict = "met" if row.bar_met else f"MISSED by {_excess(row):.1%}"
        what = f"{table.title}: {row.name}"
        lines.append(f"| {name} | {what} | {_figure(table, row)} | {row.bar:g} | {verdict} |")
    return "\n".join(lines)


def _missed(
    measured: Mapping[str, Measured], remarks: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    for name, table, row in _rows_with_bars(measured):
        if not row.bar_met:
            why = remarks.get(name, {}).get(row.name, "Nothing has been written about it yet.")
            measured_as = f"{_figure(table, row)} where {row.bar:g} is asked"
            yield f"**{name}, {row.name}**: {measured_as}, {_excess(row):.1%} over. {why.strip()}"


def _rows_with_bars(measured: Mapping[str, Measured]) -> Iterator[tuple[str, Table, Row]]:
    for name, found in measured.items():
        for table in found.report.tables:
            for row in table.rows:
                if row.bar_met is not None:
                    yield name, table, row


def _figure(table: Table, row: Row) -> str:
    if row.ratio is not None:
        return f"{row.ratio.median:.3f}"
    assert row.value is not None  # since it was held against its bar
    return f"{row.value.median:.1f} {table.unit}"


def _excess(row: Row) -> float:
    found = row.ratio or row.value
    assert found is not None  # as above
    assert row.bar is not None
    return found.median / row.bar - 1


def _measured(kept: Mapping[str, Any]) -> dict[str, Measured]:
    return {
        name: Measured(Report.from_dict(found["report"]), found["on"], found["commit"])
        for name, found in kept.items()
    }


def _remarks(path: Path) -> dict[str, dict[str, str]]:
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _commit() -> str:
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{commit}, changed since" if _git("status", "--porcelain", "../src") else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
