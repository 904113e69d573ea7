"""``robo-orchard-lab``: its commands, and the process around one of them."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import NoReturn

import click
from click.shell_completion import shell_complete

from robo_orchard_core.utils.logging import log_basic_config
from robo_orchard_lab.cli.errors import ExitCode, exit_code_of, lines_of
from robo_orchard_lab.cli.lazy_group import LazyGroup
from robo_orchard_lab.cli.output import (
    COMPLETE_VARIABLE,
    DISTRIBUTION,
    PROGRAM,
    discard_output,
    note,
    reader_is_gone,
    styled,
    visible,
)

_FIRST_TELLS_S = 10.0

_MODULES = "robo_orchard_lab.cli.commands"
COMMANDS = {
    "Runs": {
        "train": ("Train what a file describes.", f"{_MODULES}.train"),
        "resume": ("Go on with a run from its newest checkpoint.", f"{_MODULES}.resume"),
        "evaluate": ("Measure what a run has saved.", f"{_MODULES}.evaluate"),
        "prove-resume": (
            "Prove that a run goes on exactly where it stopped.",
            f"{_MODULES}.prove_resume",
        ),
        "checkpoint": (
            "List, show, verify, export and prune checkpoints.",
            f"{_MODULES}.checkpoint",
        ),
    },
    "Files of experiments": {
        "config": ("Begin, check, show and compare files.", f"{_MODULES}.config"),
        "schema": ("Write the JSON Schema of the files, for editors.", f"{_MODULES}.schema"),
        "hooks": ("Look at hooks, and at which run for a file.", f"{_MODULES}.hooks"),
    },
    "This installation": {
        "doctor": ("Show versions, devices, and what is missing.", f"{_MODULES}.doctor"),
        "completion": ("Print what completes commands in a shell.", f"{_MODULES}.completion"),
    },
}

_ABOUT = """Train what a file describes, and look at files, runs and checkpoints.

\b
  robo-orchard-lab config init experiment.yaml
  robo-orchard-lab train experiment.yaml --trainer.max_epoch 3

Every field of a file is an option as well (`train --help` lists them). Under torchrun, write
`torchrun --nproc-per-node 2 -m robo_orchard_lab train FILE`.
"""
_EXIT_CODES = """\b
Exit codes:
  0    done
  1    what was asked for has failed
  2    wrong use, or a bad file; nothing was done
  75   a run was saved and stopped, and is to be started again
  130  Ctrl-C
  143  SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say, and tell of what goes wrong.

    Args:
        argv: without the program's name; None is what was typed.

    Returns:
        What the process is to end with: see `ExitCode`.
    """
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments
    if argv is None:
        # Or Python processes that are started, such as those that load data, would look for modules
        # in the folder that one is in ahead of everything, also for those of Python itself.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what an older terminal can't show
    with _terminated():
        try:
            if COMPLETE_VARIABLE in os.environ:
                instruction = os.environ[COMPLETE_VARIABLE]
                return shell_complete(_program(), {}, PROGRAM, COMPLETE_VARIABLE, instruction)
            _begin_log(debug)
            code = _run(arguments)
            if sys.stdout is not None:  # as it is where that was closed
                sys.stdout.flush()  # an error of it belongs here, not to the interpreter's end
        except BaseException as error:
            if isinstance(error, BrokenPipeError) and reader_is_gone():
                discard_output()
                return ExitCode.DONE
            _tell(error, debug)
            if argv is None and isinstance(error, Exception):
                # As of an error that nobody catches: what is done at exit then has its limits.
                sys.last_value = error
            return exit_code_of(error)
    return code


def _begin_log(debug: bool) -> None:
    """Log lines, short ones for a person who watches; a file, a job and ``--debug`` get all."""
    watched = sys.stderr is not None and sys.stderr.isatty() and "WORLD_SIZE" not in os.environ
    if watched and not debug:
        log_basic_config(format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    else:
        log_basic_config()


def _run(arguments: list[str]) -> int:
    program = _program()
    # Not click's own main: it takes each broken pipe of a training for one of standard output.
    try:
        with program.make_context(PROGRAM, arguments) as context:
            returned = program.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    return returned if isinstance(returned, int) else ExitCode.DONE


def _program() -> click.Command:
    group = LazyGroup(PROGRAM, COMMANDS, _ABOUT)
    group.epilog = _EXIT_CODES
    group.params.append(
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version and stop.",
        )
    )
    return group


def _print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        try:
            click.echo(f"{DISTRIBUTION} {version(DISTRIBUTION)}")
        except PackageNotFoundError:
            click.echo(f"{DISTRIBUTION}, not installed: run from its sources")
        context.exit()


def _tell(error: BaseException, debug: bool) -> None:
    if exit_code_of(error) == ExitCode.USAGE and os.environ.get("LOCAL_RANK", "0") != "0":
        # What is wrong with a file or its use, each rank finds, and the first of a machine says it.
        # Its launcher then ends this one; but if this one ended first, it would end that one.
        time.sleep(_FIRST_TELLS_S)
    if debug and not isinstance(error, SystemExit | click.ClickException):
        traceback.print_exception(error)
        return
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"[rank {os.environ.get('RANK', '0')}] " if several else ""
    for line in map(visible, lines_of(error)):
        head, mark, rest = line.partition("error:")
        note(f"{rank}{styled(mark, 'red', sys.stderr)}{rest}" if not head else f"{rank}{line}")


@contextmanager
def _terminated() -> Iterator[None]:
    """Have SIGTERM end what runs inside as an exit does, so that all that is open is closed.

    A second one ends the process at once. Hooks that take signals themselves do so meanwhile.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # a fork of this one, which is to end as any other
            os.kill(os.getpid(), number)
        raise SystemExit(ExitCode.TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread, which has the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
