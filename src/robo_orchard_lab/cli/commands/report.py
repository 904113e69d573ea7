"""Commands ``report`` and ``runs``."""

from __future__ import annotations

from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.cli.commands import Command
from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.output import (
    PROGRAM,
    bytes_text,
    duration_text,
    json_option,
    note,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from robo_orchard_lab.report.listing import RunSummary

COMPARISON_FILE = "comparison.html"


@click.command("report", cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; RUN/report.html by default, for several runs comparison.html.",
)
@click.option("--sort", metavar="METRIC", help="Metric that sorts the table of several runs.")
@json_option
def report(runs: tuple[Path, ...], output: Path | None, sort: str | None, as_json: bool) -> None:
    """Write the report of RUNS: one self-contained HTML file.

    \b
      robo-orchard-lab report runs/spirals
      robo-orchard-lab report runs/a runs/b runs/c --sort eval/val/loss

    The report of one run has the outcome, curves, evaluations, events, checkpoints, hooks,
    configuration and environment, from the files in the run folder alone. Several runs are
    compared: a table, the differing fields, and the curves in common charts. A run in progress, a
    killed run and damaged files are fine: the page lists what is missing.
    """
    from robo_orchard_lab.report.files import reason_of
    from robo_orchard_lab.report.listing import run_folder
    from robo_orchard_lab.report.page import REPORT_FILE, render, write

    folders = [run_folder(run) for run in runs]
    if output is None:
        output = folders[0] / REPORT_FILE if len(folders) == 1 else Path(COMPARISON_FILE)
    page = render(folders, sort=sort)
    try:
        write(output, page)
    except OSError as error:
        raise CommandError(
            f"{output} can't be written: {reason_of(error)}",
            "pass --output FILE in a writable folder",
            ExitCode.FAILED,
        ) from error
    size = len(page.encode())
    if as_json:
        print_json({"file": str(output), "size_bytes": size, "runs": [*map(str, folders)]})
    else:
        say(f"wrote {output} ({bytes_text(size)})")


_COLUMNS = {
    "run": "path",
    "state": "state",
    "steps": "steps",
    "time": "seconds",
    "best": "best",
    "commit": "commit",
    "started": "started_at",
}


@click.command("runs", cls=Command)
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option(
    "--sort",
    type=click.Choice([*_COLUMNS]),
    default="started",
    show_default=True,
    help="Column to sort by; the best run is the last row, above the prompt.",
)
@click.option("--reverse", is_flag=True, help="Reverse the order.")
@click.option("--metric", metavar="NAME", help="Metric of the column BEST, such as eval/val/loss.")
@json_option
def runs(folder: Path, sort: str, reverse: bool, metric: str | None, as_json: bool) -> None:
    """List the runs in FOLDER and below (default: runs).

    Shows state, steps, time, best metric and commit. BEST is the metric that the run monitors for
    its best checkpoint, or else of its evaluations.
    """
    from robo_orchard_lab.report.listing import find_runs, summarize

    if not folder.is_dir():
        raise CommandError(f"there is no folder {folder}", f"name one: {PROGRAM} runs FOLDER")
    found = [summarize(run, metric) for run in find_runs(folder)]
    key = attrgetter(_COLUMNS[sort])

    def order(run: RunSummary) -> Any:
        value = key(run)
        return value if sort != "best" or run.mode != "min" else -value

    known = sorted((run for run in found if key(run) is not None), key=order, reverse=reverse)
    found = [run for run in found if key(run) is None] + known
    if as_json:
        print_json([{**asdict(run), "path": str(run.path)} for run in found])
        return
    if not found:
        say(f"there are no runs in {folder}")
        return
    print_table(
        ["run", "state", "steps", "time", "best", "commit"],
        [
            [
                one_line(run.path.relative_to(folder)) if run.path != folder else str(folder),
                run.state if run.host is None else one_line(f"{run.state} on {run.host}"),
                "" if run.steps is None else f"{run.steps:,}",
                duration_text(run.seconds),
                _best_text(run),
                "" if run.commit is None else one_line(run.commit[:8]) + "+" * run.changed,
            ]
            for run in found
        ],
    )
    damaged = [run for run in found if run.problems]
    for run in damaged[:5]:
        note(f"{run.path}: {one_line(run.problems[0])}")
    if len(damaged) > 5:
        note(f"{len(damaged) - 5} more runs have missing or damaged files; --json lists them")


def _best_text(run: RunSummary) -> str:
    if run.metric is None or run.best is None:
        return ""
    return one_line(f"{run.metric} {run.best:.5g} (step {run.best_step:,})")
