"""The program ``robo-orchard-lab``: its commands, log, signals and exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click
from click.shell_completion import shell_complete

from robo_orchard_core.utils.logging import log_basic_config, visible
from robo_orchard_lab.cli.commands import LazyGroup
from robo_orchard_lab.cli.errors import ExitCode, error_lines, exit_code_of
from robo_orchard_lab.cli.output import (
    COMPLETE_VARIABLE,
    DISTRIBUTION,
    PROGRAM,
    discard_output,
    is_reader_gone,
    is_watched,
    note,
    styled,
)

_FIRST_RANK_REPORTS_S = 10.0

_COMMANDS = "robo_orchard_lab.cli.commands"
COMMANDS = {
    "Runs": {
        "train": ("Train the experiment of a file.", f"{_COMMANDS}.train:train"),
        "resume": ("Resume a run from its newest checkpoint.", f"{_COMMANDS}.train:resume"),
        "evaluate": ("Evaluate the saved weights of a run.", f"{_COMMANDS}.train:evaluate"),
        "test": ("Evaluate the saved weights on test sets.", f"{_COMMANDS}.train:test"),
        "predict": ("Write a model's outputs for each sample.", f"{_COMMANDS}.train:predict"),
        "export": ("Export the model by torch.export or to ONNX.", f"{_COMMANDS}.train:export"),
        "rollout": ("Run episodes of a policy; print its success.", f"{_COMMANDS}.rollout:rollout"),
        "submit": ("Train in a job of SLURM, requeued at its limit.", f"{_COMMANDS}.submit:submit"),
        "sweep": ("Search the best values of fields.", f"{_COMMANDS}.sweep:sweep"),
        "prove-resume": ("Prove that a run resumes exactly.", f"{_COMMANDS}.train:prove_resume"),
        "report": ("Write the HTML report of runs.", f"{_COMMANDS}.report:report"),
        "runs": ("List runs with state and best metric.", f"{_COMMANDS}.report:runs"),
        "watch": ("Show a run in a terminal while it trains.", f"{_COMMANDS}.watch:watch"),
        "view": ("Show the reports of runs in a browser, live.", f"{_COMMANDS}.view:view"),
        "checkpoint": (
            "List, show, verify, export and prune checkpoints.",
            f"{_COMMANDS}.checkpoint:checkpoint",
        ),
        "hub": ("Push runs to the Hugging Face Hub, pull them.", f"{_COMMANDS}.hub:hub"),
    },
    "Experiment files": {
        "config": ("Create, check, show and compare files.", f"{_COMMANDS}.config:config"),
        "schema": ("Write the JSON Schema of files, for editors.", f"{_COMMANDS}.config:schema"),
        "hooks": ("List and show hooks, and the hooks of a file.", f"{_COMMANDS}.hooks:hooks"),
    },
    "Installation": {
        "doctor": ("Show versions, devices and missing packages.", f"{_COMMANDS}.doctor:doctor"),
        "completion": ("Print the completion script of a shell.", f"{_COMMANDS}.doctor:completion"),
    },
}

_HELP = """Train the experiment of a file; inspect files, runs and checkpoints.

\b
  robo-orchard-lab config init experiment.yaml
  robo-orchard-lab train experiment.yaml --trainer.max_epoch 3
  robo-orchard-lab evaluate runs/spirals

Every field of a file is also an option (`train --help` lists them). Several processes:
`torchrun --nproc-per-node 2 -m robo_orchard_lab train FILE`.
"""
_EXIT_CODES = """\b
Exit codes:
  0    success
  1    the command failed
  2    wrong usage or an invalid file; nothing was done
  75   the run was saved and stopped; start it again
  130  Ctrl-C
  143  SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, print its errors and return the exit code (see `ExitCode`).

    Args:
        argv: arguments without the name of the program; those of the process by default.
    """
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments
    if argv is None:
        # Else child processes, such as DataLoader workers, look for modules in the working
        # directory first, also for those of Python itself.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters outside the encoding
    with _exit_on_sigterm():
        try:
            if COMPLETE_VARIABLE in os.environ:
                instruction = os.environ[COMPLETE_VARIABLE]
                return shell_complete(_program(), {}, PROGRAM, COMPLETE_VARIABLE, instruction)
            _start_log(debug)
            code = _run(arguments)
            if sys.stdout is not None:  # None if it was closed
                sys.stdout.flush()  # raises errors here, not at the end of the interpreter
        except BaseException as error:
            if isinstance(error, BrokenPipeError) and is_reader_gone():
                discard_output()
                return ExitCode.DONE
            _print_error(error, debug)
            if argv is None and isinstance(error, Exception):
                # As for an uncaught error: exit handlers then have time limits.
                sys.last_value = error
            return exit_code_of(error)
    return code


def _start_log(debug: bool) -> None:
    """Log short lines to a terminal; complete lines to a file, in a job, and with ``--debug``."""
    if is_watched() and not debug:
        log_basic_config(format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    else:
        log_basic_config()


def _run(arguments: list[str]) -> int:
    program = _program()
    # Not click's main, which attributes every broken pipe of a training to standard output.
    try:
        with program.make_context(PROGRAM, arguments) as context:
            returned = program.invoke(context)
    except click.exceptions.Exit as request:
        return request.exit_code
    return returned if isinstance(returned, int) else ExitCode.DONE


def _program() -> click.Command:
    group = LazyGroup(PROGRAM, COMMANDS, _HELP)
    group.epilog = _EXIT_CODES
    message = f"{DISTRIBUTION} %(version)s"
    return click.version_option(package_name=DISTRIBUTION, message=message)(group)


def _print_error(error: BaseException, debug: bool) -> None:
    if exit_code_of(error) == ExitCode.USAGE and os.environ.get("LOCAL_RANK", "0") != "0":
        # Every rank finds a usage error; the first rank of a machine prints it and exits, then the
        # launcher ends this rank. If this rank exited first, the launcher would end the first rank.
        time.sleep(_FIRST_RANK_REPORTS_S)
    if debug and not isinstance(error, SystemExit | click.ClickException):
        traceback.print_exception(error)
        return
    is_job = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"[rank {os.environ.get('RANK', '0')}] " if is_job else ""
    for line in map(visible, error_lines(error)):
        head, mark, rest = line.partition("error:")
        note(f"{rank}{styled(mark, 'red', sys.stderr)}{rest}" if not head else f"{rank}{line}")


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit` in a block; a second SIGTERM ends the process at once.

    Hooks may replace the handler while they run.
    """
    process = os.getpid()

    def exit_with_code(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # a fork of this process ends by the signal
            os.kill(os.getpid(), number)
        raise SystemExit(ExitCode.TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, exit_with_code)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
