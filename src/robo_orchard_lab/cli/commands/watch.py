"""Command ``watch``."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robo_orchard_lab.cli.commands import Command
from robo_orchard_lab.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from robo_orchard_lab.cli.live_view import LiveView
    from robo_orchard_lab.report.live import LiveRun

_TICK_S = 0.1
_READ_S = 0.4  # of one update, so that the picture changes while a long file is read


@click.command("watch", cls=Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="WORD",
    help="Show the metrics whose names contain WORD; repeatable. All metrics by default.",
)
@click.option("--once", is_flag=True, help="Print one picture and exit.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two updates.",
)
def watch(run: Path, metrics: tuple[str, ...], once: bool, interval: float) -> None:
    """Show a run while it trains, in a terminal: stage, progress, curves, events and hooks.

    \b
      robo-orchard-lab watch runs/spirals
      robo-orchard-lab watch runs/spirals --metric loss --metric accuracy

    RUN is a run of another process, on this machine or on a shared file system, or one that ended.
    Only its files are read. Ctrl-C ends the view, not the run. Without a terminal, one picture is
    printed.
    """
    from robo_orchard_lab.report.listing import run_folder

    folder = run_folder(run)
    try:
        from rich.console import Console

        from robo_orchard_lab.cli.live_view import LiveView
    except ImportError as error:
        raise CommandError(
            "watch needs rich", 'pip install "robo-orchard-hooks[terminal]"', ExitCode.FAILED
        ) from error
    from robo_orchard_lab.report.live import LiveRun

    console = Console(file=sys.stdout, highlight=False)
    followed = LiveRun(folder)
    if once or not sys.stdout.isatty() or console.is_dumb_terminal:
        followed.update()
        console.print(LiveView(followed, metrics))
        return
    try:
        _follow(console, followed, LiveView(followed, metrics, is_live=True), interval)
    except KeyboardInterrupt:
        raise SystemExit(ExitCode.INTERRUPTED) from None


def _follow(console: Console, run: LiveRun, view: LiveView, interval: float) -> None:
    """Draw the view on the alternate screen until an exception ends it."""
    from rich.live import Live

    with Live(
        view,
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        while True:
            run.update(_READ_S)
            size = shutil.get_terminal_size()
            live.refresh()
            ends_at = time.monotonic() + (0.0 if run.is_behind else interval)
            while time.monotonic() < ends_at and shutil.get_terminal_size() == size:
                time.sleep(_TICK_S)
