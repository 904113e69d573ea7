"""Commands ``report`` and ``runs``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.cli.commands import Command
from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.output import (
    PROGRAM,
    bytes_text,
    count_text,
    duration_text,
    json_option,
    note,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from robo_orchard_lab.report.listing import RunSummary
    from robo_orchard_lab.report.query import Selection

COMPARISON_FILE = "comparison.html"


_where_option = click.option(
    "--where",
    metavar="CONDITION",
    multiple=True,
    help="Only runs that meet the condition, such as 'lr>1e-3'; repeat it for several.",
)


@click.command("report", cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; RUN/report.html by default, for several runs comparison.html.",
)
@click.option("--sort", metavar="METRIC", help="Metric that sorts the table of several runs.")
@_where_option
@json_option
def report(
    runs: tuple[Path, ...],
    output: Path | None,
    sort: str | None,
    where: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the report of RUNS: one self-contained HTML file.

    \b
      robo-orchard-lab report runs/spirals
      robo-orchard-lab report runs/a runs/b runs/c --sort eval/val/loss
      robo-orchard-lab report sweeps/spirals --where "optimizer.lr>1e-3" --where state=completed

    The report of one run has the outcome, curves, evaluations, events, checkpoints, hooks,
    configuration and environment, from the files in the run folder alone. Several runs are
    compared: a table, the differing fields, and the curves in common charts. A run in progress, a
    killed run and damaged files are fine: the page lists what is missing. With --where, RUNS are
    folders, and the runs below them that meet the conditions are compared; see `runs --help`.
    """
    from robo_orchard_lab.report.listing import run_folder
    from robo_orchard_lab.report.page import REPORT_FILE, render, write

    folders = _selected(runs, where) if where else [run_folder(run) for run in runs]
    if output is None:
        output = folders[0] / REPORT_FILE if len(folders) == 1 else Path(COMPARISON_FILE)
    page = render(folders, sort=sort)
    _write(output, partial(write, output, page), "--output")
    size = len(page.encode())
    if as_json:
        print_json({"file": str(output), "size_bytes": size, "runs": [*map(str, folders)]})
    else:
        say(f"wrote {output} ({bytes_text(size)})")


def _selected(folders: Sequence[Path], where: Sequence[str]) -> list[Path]:
    """Return the runs below folders that meet conditions."""
    from robo_orchard_lab.report.fields import read_runs_of
    from robo_orchard_lab.report.query import select

    found = select([run for folder in folders for run in read_runs_of(folder)], where)
    for line in found.left_out:
        note(line)
    if not found.runs:
        names = ", ".join(map(str, folders))
        raise CommandError(f"no run in {names} meets the conditions", f"{PROGRAM} runs lists them")
    return [run.folder for run in found.runs]


def _write(file: Path, write: Callable[[], None], option: str = "--out") -> None:
    from robo_orchard_lab.report.files import reason_of

    try:
        write()
    except OSError as error:
        raise CommandError(
            f"{file} can't be written: {reason_of(error)}",
            f"pass {option} FILE in a writable folder",
            ExitCode.FAILED,
        ) from error


@click.command("runs", cls=Command)
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@_where_option
@click.option(
    "--columns",
    metavar="FIELDS",
    multiple=True,
    help="Fields to show, separated by commas, such as lr,eval/val/loss:best.",
)
@click.option(
    "--sort",
    metavar="FIELD",
    default="started",
    show_default=True,
    help="Field to sort by; the best run is the last row, above the prompt.",
)
@click.option("--reverse", is_flag=True, help="Reverse the order.")
@click.option("--metric", metavar="NAME", help="Metric of the column BEST, such as eval/val/loss.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a file instead of a table: .csv, .jsonl or .parquet.",
)
@json_option
def runs(
    folder: Path,
    where: tuple[str, ...],
    columns: tuple[str, ...],
    sort: str,
    reverse: bool,
    metric: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """List the runs in FOLDER and below (default: runs).

    \b
      robo-orchard-lab runs
      robo-orchard-lab runs sweeps/spirals --where "lr>1e-3" --where "state=completed"
      robo-orchard-lab runs --columns lr,eval/val/loss:best --sort eval/val/loss:best
      robo-orchard-lab runs --columns lr,eval/val/loss:best --out runs.csv

    Shows state, steps, time, best metric and commit. BEST is the metric that the run monitors for
    its best checkpoint, or else of its evaluations. JOB has id and state of a job of `submit`:
    queued, running, requeued, finished or failed.

    A FIELD is one of run, name, state, job, job_id, steps, epochs, time (in seconds), metric, best,
    best_step, commit, changed, started and updated; a dotted path of the configuration, such as
    optimizer.lr; or a metric: NAME:last, NAME:best, NAME:min or NAME:max. The end of a path or
    metric suffices where no other field ends so. Operators are = != < <= > >= ~ (contains) and in.
    """
    from robo_orchard_lab.report import query
    from robo_orchard_lab.report.fields import find_field, read_runs_of

    if not folder.is_dir():
        raise CommandError(f"there is no folder {folder}", f"name one: {PROGRAM} runs FOLDER")
    if out is not None:
        query.check_suffix(out)
    names = [name.strip() for text in columns for name in text.split(",") if name.strip()]
    if names and "run" not in names:
        names = ["run", *names]
    runs_found = read_runs_of(folder, metric)
    if metric is not None and runs_found:
        find_field(f"{metric}:last", runs_found)  # refuses an unknown name
    found = query.select(runs_found, where, names or query.DEFAULT_COLUMNS, sort, reverse=reverse)
    for line in found.left_out:
        note(line)
    if out is not None:
        _write(out, partial(found.write, out))
    if as_json and names:
        print_json([{n: query.strict(v) for n, v in row.items()} for row in found.rows()])
    elif as_json:
        print_json([_plain(run.summary) for run in found.runs])
    elif out is not None:
        say(f"wrote {out} ({count_text(len(found.runs), 'run')})")
    elif not found.runs:
        say(f"there are no runs in {folder}" + (" that meet the conditions" if where else ""))
    else:
        _print_runs(found, with_columns=bool(names))


def _print_runs(found: Selection, *, with_columns: bool) -> None:
    summaries = [run.summary for run in found.runs]
    if with_columns:
        rows = [[_cell_text(n, value) for n, value in row.items()] for row in found.rows()]
        print_table([field.name for field in found.columns], rows)
    else:
        has_jobs = any(summary.job is not None for summary in summaries)
        print_table(
            ["run", "state", *(["job"] * has_jobs), "steps", "time", "best", "commit"],
            [
                [
                    one_line(run.path),
                    _state_text(summary),
                    *([_job_text(summary)] * has_jobs),
                    "" if summary.steps is None else f"{summary.steps:,}",
                    duration_text(summary.seconds),
                    _best_text(summary),
                    ""
                    if summary.commit is None
                    else one_line(summary.commit[:8]) + "+" * summary.changed,
                ]
                for run, summary in zip(found.runs, summaries, strict=True)
            ],
        )
    failed = [s for s in summaries if s.job is not None and s.job.state == "failed"]
    for summary in failed[:5]:
        if (job := summary.job) is not None:
            note(one_line(f"{summary.path}: job {job.id}: {job.message} ({job.log})"))
    if len(failed) > 5:
        note(f"{len(failed) - 5} more jobs failed; --json lists them")
    damaged = [summary for summary in summaries if summary.problems]
    for summary in damaged[:5]:
        note(f"{summary.path}: {one_line(summary.problems[0])}")
    if len(damaged) > 5:
        note(f"{len(damaged) - 5} more runs have missing or damaged files; --json lists them")


def _cell_text(name: str, value: Any) -> str:
    if name in ("time", "seconds") and value is not None:
        return duration_text(value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if value is None or isinstance(value, str):
        return one_line(value or "")
    return f"{value:.5g}" if isinstance(value, float) else one_line(json.dumps(value))


def _plain(run: RunSummary) -> dict[str, Any]:
    job = run.job and {**asdict(run.job), "folder": str(run.job.folder), "log": str(run.job.log)}
    return {**asdict(run), "path": str(run.path), "job": job}


def _state_text(run: RunSummary) -> str:
    if run.state == "unknown" and run.job is not None:  # before the start
        return run.job.state
    return run.state if run.host is None else one_line(f"{run.state} on {run.host}")


def _job_text(run: RunSummary) -> str:
    return "" if run.job is None else f"{run.job.id} {run.job.state}"


def _best_text(run: RunSummary) -> str:
    if run.metric is None or run.best is None:
        return ""
    return one_line(f"{run.metric} {run.best:.5g} (step {run.best_step:,})")
