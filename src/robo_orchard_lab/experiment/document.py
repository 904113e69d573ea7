"""Reading of experiment files: base files, limits, and overrides; nothing is imported."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from robo_orchard_core.utils.config import formats
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
    describe,
)
from robo_orchard_core.utils.config.errors import Path as FieldPath
from robo_orchard_core.utils.config.formats import Lines, Plain
from robo_orchard_lab.experiment.catalogue import with_definitions
from robo_orchard_lab.experiment.overrides import (
    DEFAULT,
    ItemChange,
    Origin,
    Origins,
    Override,
    from_environment,
    merge_with_origins,
    origin_of,
    paths,
    uniform_origins,
)

MAX_FILE_BYTES = 2**17
"""Limit of a file with its base files; a real experiment has a few thousand bytes."""

MAX_VALUES = 20_000
"""Limit of values in a document, lists and mappings included."""

MAX_KEY = 200
"""Limit of a key and of a file name, in characters."""

MAX_BASES = 16
"""Limit of base files, each based on the next."""

# --- files -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParsedFile:
    """Content of one file.

    Attributes:
        path: Path of the file.
        document: Fields, without ``base`` and ``$schema``.
        origins: Origin of each value: the file, with the line if known.
        base: Name of the base file in the same folder, or None.
    """

    path: Path
    document: dict[str, Plain]
    origins: Origins
    base: str | None


def read_with_bases(path: Path) -> list[ParsedFile]:
    """Read a file and its base files, the file first.

    Raises:
        ConfigError: A file can't be read, is a link or not a regular file, is too large or
            malformed, or names a base that is missing or leads back to the file.
    """
    files: list[ParsedFile] = []
    size = MAX_FILE_BYTES
    named_in: ParsedFile | None = None
    while True:
        try:
            content = _read_bytes(path, size)
        except ConfigError as error:
            raise _file_error(error, path, named_in) from None
        size -= len(content)
        file = _parse(path, content)
        files.append(file)
        if file.base is None:
            return files
        known = [known.path.name for known in files]
        if file.base in known:
            cycle = " -> ".join([*known, file.base])
            raise _base_error(file, f"leads back to {file.base!r}: {cycle}")
        if len(files) > MAX_BASES:
            raise _base_error(file, f"exceeds the limit of {MAX_BASES} base files")
        path, named_in = path.with_name(file.base), file


def _read_bytes(path: Path, size: int) -> bytes:
    """Read a regular file of at most ``size`` bytes."""
    if os.path.islink(path):
        raise ConfigError("is a link; expected the file itself")
    # A link created after the check is not followed, and opening a pipe does not block.
    flags = sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "BINARY"))
    try:
        descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a name that no file can have
        raise ConfigError(f"can't be read: {error}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError("is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(size + 1)
    finally:
        os.close(descriptor)
    if len(content) > size:
        raise ConfigSyntaxError(
            f"exceeds the limit of {MAX_FILE_BYTES} bytes for an experiment with its base files"
        )
    return content


def _parse(path: Path, content: bytes) -> ParsedFile:
    lines: Lines = {}
    try:
        document = formats.read(formats.decode_utf8(content), formats.format_of(path), lines)
        check_bounds(document)
    except ConfigError as error:
        error.source = os.fspath(path)
        line: int | str | None = lines.get(error.path)
        if isinstance(error, ConfigSyntaxError):
            if found := re.match(r"line (\d+)", error.position) if error.path else None:
                line = line or found[1]
            error.position = "" if line else error.position  # repeats the line
        error.source += f":{line}" if line else ""
        raise
    by_line = {where: Origin("file", f"{path}:{line}") for where, line in lines.items()}
    by_line.setdefault((), Origin("file", os.fspath(path)))
    origins = {where: origin_of(where, by_line) for where in paths(document)}
    document.pop("$schema", None)
    base = document.pop("base", None)
    file = ParsedFile(path, document, origins, base if isinstance(base, str) else None)
    if base is not None:
        _check_base(file, base)
    return file


def check_bounds(document: Mapping[str, Plain]) -> None:
    """Refuse a document with more values or longer keys than any real experiment.

    Raises:
        ConfigSyntaxError: A limit is exceeded.
    """
    remaining: list[Plain] = [dict(document)]
    seen = 0
    while remaining:
        value = remaining.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise ConfigSyntaxError(f"the document holds more than {MAX_VALUES} values")
        if isinstance(value, dict):
            for key in value:
                if len(key) > MAX_KEY:
                    raise ConfigSyntaxError(
                        f"expected keys of at most {MAX_KEY} characters, found {key[:40]!r}..."
                    )
            remaining += value.values()
        elif isinstance(value, list):
            remaining += value


def _check_base(file: ParsedFile, base: Plain) -> None:
    is_plain = (
        isinstance(base, str)
        and base.isprintable()
        and base not in ("", ".", "..")
        and len(base) <= MAX_KEY
        and all(kind(base).name == base for kind in (PurePosixPath, PureWindowsPath))
    )
    if not is_plain:
        problem = f"expected the name of a file in the same folder, found {describe(base)}"
        raise _base_error(file, problem)


def _base_error(file: ParsedFile, problem: str) -> ConfigFieldError:
    error = ConfigFieldError(problem, ("base",))
    error.source = str(origin_of(("base",), file.origins))
    return error


def _file_error(error: ConfigError, path: Path, named_in: ParsedFile | None) -> ConfigError:
    """Locate the error of a file: for a base file, in the file above."""
    if named_in is None:
        error.source = os.fspath(path)
        return error
    return _base_error(named_in, f"{path.name!r} {error.problem}")


# --- documents -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExperimentDocument:
    """Merged plain data of an experiment, not validated yet.

    Attributes:
        document: Merged fields; names of code are replaced by definitions.
        origins: Origin of each value, mappings and lists included. A mapping merged from several
            layers has the origin of the weakest layer.
        files: The file, its base, and so on.
        overrides: Applied overrides, the weakest first.
    """

    document: dict[str, Plain]
    origins: Origins
    files: tuple[Path, ...]
    overrides: tuple[Override, ...] = ()

    @cached_property
    def leaf_origins(self) -> Origins:
        """Origin of each scalar, empty list and empty mapping."""
        parents = {path[:-1] for path in self.origins}
        return {path: origin for path, origin in self.origins.items() if path not in parents}

    def locate(self, error: ConfigError) -> ConfigError:
        """Set the source of an error: file and line, option, or variable."""
        origin = origin_of(error.path, self.origins)
        error.source = str(self.files[0] if origin is DEFAULT else origin)
        return error

    def with_text(self, path: FieldPath) -> ExperimentDocument | None:
        """Return a copy with the override nearest to ``path`` as typed text.

        ``--name 3`` is parsed as a number, although the field may require text.

        Returns:
            None if no override at ``path`` was parsed as another type than text.
        """
        found: list[tuple[int, int, FieldPath, str]] = []
        for number, override in enumerate(self.overrides):
            if override.text is None:
                continue
            try:
                at = _resolve_path(self.document, override.path)
            except ConfigError:  # a stronger override replaced the parent
                continue
            if self.origins.get(at) != override.origin:
                continue
            if isinstance(_value_at(self.document, at), str):
                continue
            if path[: len(at)] == at or (path and at[: len(path)] == path):
                found.append((abs(len(path) - len(at)), -number, at, override.text))
        if not found:
            return None
        *_, at, text = min(found)
        origins = {
            where: origin
            for where, origin in self.origins.items()
            if where == at or where[: len(at)] != at
        }
        document = _with_value(self.document, at, text)
        assert isinstance(document, dict)  # no path of an override is empty
        return replace(self, document=document, origins=origins)


def read_experiment(
    file: str | os.PathLike[str],
    *,
    overrides: Iterable[Override] = (),
    environ: Mapping[str, str] | None = None,
) -> ExperimentDocument:
    """Read an experiment's file with its base files and overrides, without validation.

    Args:
        file: YAML, TOML or JSON, by suffix.
        overrides: Overrides; the command line takes precedence over the environment, and the
            environment over code. Within a layer, the last override counts.
        environ: Environment variables with overrides; none by default.

    Raises:
        ConfigError: The error names file and line, option, or variable.
    """
    files = read_with_bases(Path(file))
    document: dict[str, Plain] = {}
    origins: Origins = {}
    for read in reversed(files):
        fields = {key: with_definitions(value, (key,)) for key, value in read.document.items()}
        document, origins = merge_with_origins((document, origins), (fields, read.origins))
    given = list(overrides)
    applied: list[Override] = []
    for layer in ("code", "environment", "command line"):
        of_layer = [override for override in given if override.origin.layer == layer]
        if layer == "environment" and environ is not None:
            of_layer += from_environment(environ, document)
        # A new class replaces the mapping, so overrides of its arguments are applied later.
        for override in sorted(
            of_layer, key=lambda o: (not o.names_code, len(o.path) * o.names_code)
        ):
            document, origins = _apply(document, origins, override)
            applied.append(override)
    return ExperimentDocument(document, origins, tuple(f.path for f in files), tuple(applied))


def _apply(
    document: dict[str, Plain], origins: Origins, override: Override
) -> tuple[dict[str, Plain], Origins]:
    try:
        at = _resolve_path(document, override.path)
    except ConfigError as error:
        error.source = str(override.origin)
        raise
    value = with_definitions(override.value, at)
    new_origins = uniform_origins(value, override.origin, at)
    for key in reversed(at):
        value = ItemChange(key, value) if isinstance(key, int) else {key: value}
        at = at[:-1]
        new_origins[at] = override.origin
    assert isinstance(value, dict)  # no path is empty
    return merge_with_origins((document, origins), (value, new_origins))


def _resolve_path(document: dict[str, Plain], keys: tuple[str, ...]) -> FieldPath:
    """Convert the keys of an override to a path, with the indexes of lists as integers.

    Raises:
        ConfigFieldError: A parent is a scalar, or a list without such an item.
    """
    if keys[0] in ("base", "$schema"):
        raise ConfigFieldError("can't be overridden; write this key in a file", keys[:1])
    path: FieldPath = ()
    inside: Plain = document
    for key in keys:
        if isinstance(inside, list):
            if not key.isdecimal() or int(key) >= len(inside):
                raise ConfigFieldError(
                    f"expected the index of one of {len(inside)} items, found {key!r}", path
                )
            path = (*path, int(key))
            inside = inside[int(key)]
        elif inside is None or isinstance(inside, dict):
            path = (*path, key)
            inside = None if inside is None else inside.get(key)
        else:
            raise ConfigFieldError(f"holds {describe(inside)}, which has no {key!r}", path)
    return path


def _value_at(document: Plain, path: FieldPath) -> Plain:
    """Return the value at a path, or None."""
    for key in path:
        if isinstance(document, list) and isinstance(key, int) and key < len(document):
            document = document[key]
        elif isinstance(document, dict) and isinstance(key, str):
            document = document.get(key)
        else:
            return None
    return document


def _with_value(document: Plain, path: FieldPath, value: Plain) -> Plain:
    """Return a copy of the document with another value at an existing path."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(document, list):
        return [_with_value(v, rest, value) if i == key else v for i, v in enumerate(document)]
    assert isinstance(document, dict)  # the path exists
    return {k: _with_value(v, rest, value) if k == key else v for k, v in document.items()}
