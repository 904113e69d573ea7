"""An experiment's file and those it builds on, read without trusting any of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from robo_orchard_core.utils.config import formats
from robo_orchard_core.utils.config.document import Lines, Plain
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
    shown,
)
from robo_orchard_lab.experiment.merging import paths
from robo_orchard_lab.experiment.origins import Origin, Origins, origin_of

MAX_FILE_BYTES = 2**17
"""Of an experiment's file with all that it builds on; real ones have a few thousand."""

MAX_VALUES = 20_000
"""Of a file, lists and mappings included; far above any real one."""

MAX_KEY = 200
"""Characters of a key, and of a file's name."""

MAX_BASES = 16
"""Files that one builds on, one on the other."""


@dataclass(frozen=True)
class ReadFile:
    """What one file says.

    Attributes:
        path: The file.
        document: Without ``base`` and ``$schema``, which are about the file.
        origins: Of each value: the file, with the line where it is known.
        base: The name of the file beside it that this one builds on, if it does.
    """

    path: Path
    document: dict[str, Plain]
    origins: Origins
    base: str | None


def read_with_bases(path: Path) -> list[ReadFile]:
    """The file and those it builds on, itself first.

    Raises:
        ConfigError: One can't be read, is a link or no regular file, is too large, is no
            document, or names a base that isn't a file beside it or leads back to it.
    """
    files: list[ReadFile] = []
    size = MAX_FILE_BYTES
    named_in: ReadFile | None = None
    while True:
        try:
            content = _content(path, size)
        except ConfigError as error:
            raise _of_base(error, path, named_in) from None
        size -= len(content)
        file = _parsed(path, content)
        files.append(file)
        if file.base is None:
            return files
        known = [known.path.name for known in files]
        if file.base in known:
            raise _wrong_base(
                file, f"leads back to {file.base!r}: {' -> '.join([*known, file.base])}"
            )
        if len(files) > MAX_BASES:
            raise _wrong_base(
                file, f"is one more than the {MAX_BASES} that may build on each other"
            )
        path, named_in = path.with_name(file.base), file


def _content(path: Path, size: int) -> bytes:
    """What is in the file, of at most ``size`` bytes."""
    if os.path.islink(path):
        raise ConfigError("is a link; expected the file itself")
    # What became a link since then isn't followed, and nobody waits for a pipe's other end.
    flags = sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "BINARY"))
    try:
        descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror or error}") from error
    except ValueError as error:  # of a name that no file can have
        raise ConfigError(f"can't be read: {error}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError("is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(size + 1)
    finally:
        os.close(descriptor)
    if len(content) > size:
        raise ConfigSyntaxError(
            f"is larger than the {MAX_FILE_BYTES} bytes that an experiment's file may have, with "
            "those it builds on"
        )
    return content


def _parsed(path: Path, content: bytes) -> ReadFile:
    lines: Lines = {}
    try:
        document = formats.read(formats.decoded(content), formats.format_of(path), lines)
        check_bounds(document)
    except ConfigError as error:
        error.source = os.fspath(path)
        if error.path in lines:
            error.source += f":{lines[error.path]}"
            if isinstance(error, ConfigSyntaxError):
                error.position = ""  # is in that line
        raise
    at_line = {where: Origin("file", f"{path}:{line}") for where, line in lines.items()}
    at_line.setdefault((), Origin("file", os.fspath(path)))
    origins = {where: origin_of(where, at_line) for where in paths(document)}
    document.pop("$schema", None)
    base = document.pop("base", None)
    file = ReadFile(path, document, origins, base if isinstance(base, str) else None)
    if base is not None:
        _check_base(file, base)
    return file


def check_bounds(document: Mapping[str, Plain]) -> None:
    """Refuse a document of more values or longer keys than any experiment has.

    Raises:
        ConfigSyntaxError: It is one.
    """
    waiting: list[Plain] = [dict(document)]
    seen = 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise ConfigSyntaxError(f"the document holds more than {MAX_VALUES} values")
        if isinstance(value, dict):
            for key in value:
                if len(key) > MAX_KEY:
                    raise ConfigSyntaxError(
                        f"expected keys of at most {MAX_KEY} characters, found {key[:40]!r}..."
                    )
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_base(file: ReadFile, base: Plain) -> None:
    if not isinstance(base, str):
        raise _wrong_base(file, f"expected the name of a file beside this one, found {shown(base)}")
    is_plain = base.isprintable() and all(
        kind(base).name == base for kind in (PurePosixPath, PureWindowsPath)
    )
    if not is_plain or base in ("", ".", "..") or len(base) > MAX_KEY:
        raise _wrong_base(
            file,
            f"expected the name of a file beside this one, without a folder; found {shown(base)}",
        )


def _wrong_base(file: ReadFile, problem: str) -> ConfigFieldError:
    error = ConfigFieldError(problem, ("base",))
    error.source = str(origin_of(("base",), file.origins))
    return error


def _of_base(error: ConfigError, path: Path, named_in: ReadFile | None) -> ConfigError:
    """An error about a file as a whole, at the place that names it."""
    if named_in is None:
        error.source = os.fspath(path)
        return error
    return _wrong_base(named_in, f"{path.name!r} {error.problem}")
