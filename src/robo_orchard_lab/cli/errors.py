"""What goes wrong, in a line or two, and the code that the process ends with."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from enum import IntEnum
from pathlib import Path
from typing import Any

import click

from robo_orchard_core.utils.config.errors import ConfigError

_INDENT = "       "  # as wide as "error: "
_PIPELINE_ERRORS = "robo_orchard_lab.pipeline.errors"  # which can't be imported without torch
_TOLD_BY_THEMSELVES = ("PipelineConfigError", "RankFailed", "StateError")
_LAST_LINE = "--debug shows the traceback"


class ExitCode(IntEnum):
    """What the process ends with."""

    DONE = 0
    FAILED = 1
    """What was asked for has failed: a run, a check, a comparison."""
    USAGE = 2
    """The command line, or a file that it names, is not as it has to be; nothing was done."""
    PREEMPTED = 75
    """A run was saved and stopped, and is to be started again."""
    INTERRUPTED = 130
    """Ctrl-C."""
    TERMINATED = 143
    """SIGTERM."""


class CommandError(Exception):
    """A command can't do what it is asked for.

    Args:
        problem: what was expected and what was found, in a line.
        advice: what to do about it, in another.
        exit_code: of the process.
    """

    def __init__(
        self, problem: str, advice: str = "", exit_code: ExitCode = ExitCode.USAGE
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """What the process ends with after an error that nobody has caught.

    A code of its own, such as that of a run that was preempted, an error keeps.
    """
    match error:
        case click.ClickException() | CommandError():
            return int(error.exit_code)
        case ConfigError():
            return ExitCode.USAGE
        case KeyboardInterrupt() | click.Abort():
            return ExitCode.INTERRUPTED
        case SystemExit(code=None):
            return ExitCode.DONE
        case SystemExit(code=int(code)):
            return code
        case _ if _is_of_pipeline(error, "PipelineConfigError"):
            return ExitCode.USAGE
    return ExitCode.FAILED


def lines_of(error: BaseException) -> list[str]:
    """What is to be said of an error: nothing, a line, or two.

    >>> lines_of(CommandError("there is no run in runs/1", "start it with train"))
    ['error: there is no run in runs/1', '       start it with train']
    """
    problem, advice = _told(error)
    lines = [f"error: {problem}"] if problem else []
    return [*lines, *(_INDENT + line for line in advice)]


def line_of(error: ConfigError) -> str:
    """The error alone, with where it is said and the field.

    >>> error = ConfigError("must be >= 1", ("trainer", "max_epoch"))
    >>> error.source = "digits.yaml:12"
    >>> line_of(error)
    'digits.yaml:12: trainer.max_epoch: must be >= 1'
    >>> error.source = "command line: --trainer.max_epoch"
    >>> line_of(error)
    '--trainer.max_epoch: must be >= 1'
    """
    source, option = error.source or "", f"--{error.place}"
    if source == f"command line: {option}":
        source, place = "", option
    else:
        place = error.place
    return ": ".join(filter(None, (source, place, error.problem)))


def _told(error: BaseException) -> tuple[str, list[str]]:
    match error:
        case SystemExit():
            return (
                "" if error.code is None or isinstance(error.code, int) else str(error.code)
            ), []
        case KeyboardInterrupt() | click.Abort():
            return "interrupted", []
        case click.ClickException():
            return _of_click(error)
        case CommandError():
            return error.problem, [error.advice] if error.advice else []
        case ConfigError():
            return _of_config(error)
        case _ if any(_is_of_pipeline(error, name) for name in _TOLD_BY_THEMSELVES):
            return _first_line(error), []
    return _of_others(error)


def _of_click(error: click.ClickException) -> tuple[str, list[str]]:
    # Its texts are sentences, ours begin small behind "error:".
    text = " ".join(error.format_message().split()).rstrip(".")
    text = text if text[1:2].isupper() else text[:1].lower() + text[1:]
    context = getattr(error, "ctx", None)
    return text, [] if context is None else [f"`{context.command_path} --help` shows how"]


def _of_config(error: ConfigError) -> tuple[str, list[str]]:
    if not error.others:
        return line_of(error), []
    if len(error.others) == 1:
        return line_of(error), [f"also {line_of(error.others[0])}"]
    more = f"and {len(error.others)} more; `robo-orchard-lab config check` lists them all"
    return line_of(error), [more]


def _of_others(error: BaseException) -> tuple[str, list[str]]:
    place = _place(error)
    return (
        f"{type(error).__qualname__}: {_said(error)}".removesuffix(": "),
        [f"{place}; {_LAST_LINE}" if place else _LAST_LINE],
    )


def _place(error: BaseException) -> str:
    """The line that raised it, the last one of the user's own, and the hook, as far as known."""
    from robo_orchard_core.utils.hook import origin_of

    worker = _in_worker(error)
    frames = [*traceback.extract_tb(error.__traceback__)] if worker is None else worker[1]
    own = [frame for frame in frames if not _is_of_others(frame.filename)]
    hook = origin_of(error)
    parts = [f"raised at {_line(frames[-1])}"] if frames else []
    if own and own[-1] is not frames[-1]:
        parts.append(f"called from {_line(own[-1])}")
    if hook:
        parts.append(f"in hook {hook}")
    return ", ".join(parts)


def _line(frame: traceback.FrameSummary) -> str:
    return f"{_short(frame.filename)}:{frame.lineno}"


def _is_of_others(file: str) -> bool:
    """Whether the user has not written it: an installed package, Python's library, or ours."""
    ours = Path(__file__).parents[2]
    library = sysconfig.get_paths()
    others = {str(ours), library["stdlib"], library["purelib"], library["platlib"]}
    return file.startswith("<") or any(Path(file).is_relative_to(folder) for folder in others)


def _short(file: str) -> str:
    try:
        relative = os.path.relpath(file)
    except (OSError, ValueError):  # the working directory is gone, or on another drive
        return file
    return file if relative.startswith(os.pardir) else relative


def _first_line(error: BaseException) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception as failure:  # of the error's own __str__
        return f"<no text: {type(failure).__qualname__}>"
    return lines[0] + (" ..." if len(lines) > 1 else "") if lines else ""


def _said(error: BaseException) -> str:
    worker = _in_worker(error)
    return _first_line(error) if worker is None else f"{worker[0]}, in a loader's worker"


def _in_worker(error: BaseException) -> tuple[str, list[traceback.FrameSummary]] | None:
    """What an error of a loader's worker says, and where it was raised there.

    torch has the traceback of it as its text, in the main process.
    """
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    if not text.startswith("Caught ") or " in DataLoader worker process " not in text:
        return None
    found = list(re.finditer(r'^ +File "(.+)", line (\d+), in (.+)$', text, re.MULTILINE))
    frames = [
        traceback.FrameSummary(file, int(line), name)
        for file, line, name in (match.groups() for match in found)
    ]
    below = text[found[-1].end() if found else 0 :].splitlines()
    said = next((line for line in below if line and not line[0].isspace()), text)
    return said.removeprefix(f"{type(error).__qualname__}: "), frames


def _is_of_pipeline(error: BaseException, name: str) -> bool:
    """Whether it is an error of the pipeline's, which is there if one was raised."""
    kind: Any = getattr(sys.modules.get(_PIPELINE_ERRORS), name, None)
    return kind is not None and isinstance(error, kind)
