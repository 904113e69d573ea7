"""Errors of commands: text of at most two lines, and exit code."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import click

from robo_orchard_core.utils.config.errors import ConfigError

_INDENT = "       "  # as wide as "error: "
_PIPELINE_ERRORS = "robo_orchard_lab.pipeline.errors"  # imports torch
_COMPLETE_MESSAGES = ("PipelineConfigError", "RankFailed", "StateError", "UnknownMetricError")
_DEBUG_HINT = "--debug shows the traceback"


class ExitCode(IntEnum):
    """Exit code of the program."""

    DONE = 0
    FAILED = 1
    """The command failed: a run, a check, a comparison."""
    USAGE = 2
    """The command line or a file is invalid; nothing was done."""
    PREEMPTED = 75
    """The run was saved and stopped; start it again."""
    INTERRUPTED = 130
    """Ctrl-C."""
    TERMINATED = 143
    """SIGTERM."""


class CommandError(Exception):
    """Refusal of a command: expected and found in one line, the remedy in another."""

    def __init__(
        self, problem: str, advice: str = "", exit_code: ExitCode = ExitCode.USAGE
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice
        self.exit_code = exit_code


def check_target(path: Path, *, force: bool) -> None:
    """Refuse a file to write that exists, unless ``force``, or whose folder is missing.

    Raises:
        CommandError: With the remedy.
    """
    if os.path.lexists(path) and not force:
        raise CommandError(f"{path} already exists", "--force replaces it")
    if not path.parent.is_dir():
        raise CommandError(f"there is no folder {path.parent}", f"mkdir -p {path.parent}")


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an error; `RunPreempted` and similar errors have a code."""
    match error:
        case click.ClickException() | CommandError():
            return int(error.exit_code)
        case KeyboardInterrupt() | click.Abort():
            return ExitCode.INTERRUPTED
        case SystemExit(code=None):
            return ExitCode.DONE
        case SystemExit(code=int(code)):
            return code
    is_usage = isinstance(error, ConfigError) or _is_of_pipeline(error, "PipelineConfigError")
    if _is_of_pipeline(error, "UnknownMetricError"):
        is_usage = bool(getattr(error, "place", ""))  # of a setting, before the first step
    return ExitCode.USAGE if is_usage else ExitCode.FAILED


def _is_of_pipeline(error: BaseException, *names: str) -> bool:
    """Return True for an error of these classes of the pipeline, without an import."""
    module = sys.modules.get(_PIPELINE_ERRORS)
    return isinstance(error, tuple(getattr(module, name) for name in names if module is not None))


def error_lines(error: BaseException) -> list[str]:
    """Return the lines to print for an error: the problem and the advice, or none.

    >>> error_lines(CommandError("there is no run in runs/1", "start it with train"))
    ['error: there is no run in runs/1', '       start it with train']
    """
    problem, advice = _problem_and_advice(error)
    lines = [f"error: {problem}"] if problem else []
    return [*lines, _INDENT + advice] if advice else lines


def config_error_line(error: ConfigError) -> str:
    """Return location, field and problem of a config error as a line.

    >>> error = ConfigError("must be >= 1", ("trainer", "max_epoch"))
    >>> error.source = "digits.yaml:12"
    >>> config_error_line(error)
    'digits.yaml:12: trainer.max_epoch: must be >= 1'
    >>> error.source = "command line: --trainer.max_epoch"
    >>> config_error_line(error)
    '--trainer.max_epoch: must be >= 1'
    """
    source, field = error.source or "", error.location
    if source == f"command line: --{field}":
        source, field = "", f"--{field}"
    return ": ".join(filter(None, (source, field, error.problem)))


def _problem_and_advice(error: BaseException) -> tuple[str, str]:
    match error:
        case SystemExit():
            return "" if error.code is None or isinstance(error.code, int) else str(error.code), ""
        case KeyboardInterrupt() | click.Abort():
            return "interrupted", ""
        case click.ClickException():
            # click's messages are sentences.
            text = " ".join(error.format_message().split()).rstrip(".")
            text = text if text[1:2].isupper() else text[:1].lower() + text[1:]
            context = getattr(error, "ctx", None)
            return text, "" if context is None else f"run `{context.command_path} --help` for usage"
        case CommandError():
            return error.problem, error.advice
        case ConfigError(others=()):
            return config_error_line(error), ""
        case ConfigError(others=(other,)):
            return config_error_line(error), f"also {config_error_line(other)}"
        case ConfigError():
            more = f"and {len(error.others)} more; `robo-orchard-lab config check` lists all errors"
            return config_error_line(error), more
    if _is_of_pipeline(error, *_COMPLETE_MESSAGES):
        return _first_line(error), ""
    message, frames = _first_line(error), [*traceback.extract_tb(error.__traceback__)]
    if worker := _worker_error(error):
        message, frames = f"{worker[0]}, in a DataLoader worker", worker[1] or frames
    own = [frame for frame in frames if not _is_library_code(frame.filename)]
    if isinstance(error, PermissionError) and isinstance(error.filename, str) and not own:
        advice = f"`namei -l {error.filename}` lists the permissions of the path"
        return f"no permission to read or write {error.filename}; {advice}", ""
    location = _location(error, frames, own)
    return (
        f"{type(error).__qualname__}: {message}".removesuffix(": "),
        f"{location}; {_DEBUG_HINT}" if location else _DEBUG_HINT,
    )


def _location(
    error: BaseException,
    frames: Sequence[traceback.FrameSummary],
    own: Sequence[traceback.FrameSummary],
) -> str:
    """Describe the source line of an error, the last line of the user's code, and the hook."""
    from robo_orchard_core.utils.hook.errors import CONFIGURED_AT, origin_of, short_location

    def line(frame: traceback.FrameSummary) -> str:
        try:
            file = os.path.relpath(frame.filename)
        except (OSError, ValueError):  # the working directory was removed, or is on another drive
            file = os.pardir
        place = f"{frame.filename if file.startswith(os.pardir) else file}:{frame.lineno}"
        return short_location(place) if _is_library_code(frame.filename) else place

    parts = [f"raised at {line(frames[-1])}"] if frames else []
    if own and own[-1] is not frames[-1]:
        parts.append(f"called from {line(own[-1])}")
    if hook := origin_of(error):
        parts.append(f"in hook {hook}")
    parts += [n for n in getattr(error, "__notes__", ()) if str(n).startswith(CONFIGURED_AT)]
    return ", ".join(parts)


def _is_library_code(file: str) -> bool:
    """Return True for a file of an installed package, of Python's library, or of this package."""
    paths = sysconfig.get_paths()
    package = Path(__file__).parents[2]
    folders = {str(package), paths["stdlib"], paths["purelib"], paths["platlib"]}
    return file.startswith("<") or any(Path(file).is_relative_to(folder) for folder in folders)


def _first_line(error: BaseException) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception as failure:  # in the error's own __str__
        return f"<no text: {type(failure).__qualname__}>"
    return lines[0] + (" ..." if len(lines) > 1 else "") if lines else ""


def _worker_error(error: BaseException) -> tuple[str, list[traceback.FrameSummary]] | None:
    """Return message and frames of an error of a DataLoader worker, or None for another error.

    In the main process, torch raises the error with the worker's traceback as its text.
    """
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    if not text.startswith("Caught ") or " in DataLoader worker process " not in text:
        return None
    found = list(re.finditer(r'^ +File "(.+)", line (\d+), in (.+)$', text, re.MULTILINE))
    frames = [
        traceback.FrameSummary(file, int(line), name)
        for file, line, name in (match.groups() for match in found)
    ]
    rest = text[found[-1].end() if found else 0 :].splitlines()
    message = next((line for line in rest if line and not line[0].isspace()), text)
    return message.removeprefix(f"{type(error).__qualname__}: "), frames
