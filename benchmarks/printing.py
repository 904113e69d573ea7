"""Reports as tables: by rich in a terminal, as Markdown elsewhere."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.report import Report, Row, Table
from benchmarks.timing import Spread


def print_report(report: Report) -> None:
    """Write one report to standard output."""
    console = Console()
    environment = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    if not console.is_terminal:
        print(f"## {report.benchmark}\n\n{environment}\n")
        for table in report.tables:
            print(markdown(table))
        for fault in report.faults:
            print(f"FAULT: {fault}\n")
        sys.stdout.flush()
        return
    console.rule(report.benchmark)
    console.print(environment, style="dim", highlight=False)
    for table in report.tables:
        drawn = RichTable(title=table.title, title_justify="left")
        header, *lines = _cells(table)
        for position, column in enumerate(header):
            drawn.add_column(column, justify="left" if position in (0, 5) else "right")
        for line, row in zip(lines, table.rows, strict=True):
            style = {True: "green", False: "red", None: ""}[row.bar_met]
            drawn.add_row(*line, style=style)
        console.print(drawn)
        for note in table.notes:
            console.print(f"  {note}", highlight=False)
    for fault in report.faults:
        console.print(f"FAULT: {fault}", style="bold red", highlight=False)


def markdown(table: Table) -> str:
    """Return the table as Markdown, with columns padded for reading as plain text."""
    lines = _cells(table)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    header, *body = [f"| {' | '.join(line)} |" for line in padded]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    notes = [f"- {note}" for note in table.notes]
    blank = [""] if notes else []
    return "\n".join([f"**{table.title}**", "", header, rule, *body, *blank, *notes, ""])


def _cells(table: Table) -> list[list[str]]:
    header = ["", table.unit, "middle half", "ratio", "middle half", "bar"]
    return [header, *(_row_cells(row) for row in table.rows)]


def _row_cells(row: Row) -> list[str]:
    verdict = {None: "", True: f"<= {row.bar}: met", False: f"<= {row.bar}: MISSED"}[row.bar_met]
    return [
        row.name,
        *_spread_cells(row.value, digits=1),
        *_spread_cells(row.ratio, digits=3),
        "; ".join(filter(None, (verdict, row.note))),
    ]


def _spread_cells(spread: Spread | None, *, digits: int) -> Sequence[str]:
    if spread is None:
        return ("", "")
    return (f"{spread.median:.{digits}f}", f"{spread.low:.{digits}f}-{spread.high:.{digits}f}")
