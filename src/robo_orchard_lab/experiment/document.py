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
    Located,
    Origin,
    Origins,
    Override,
    from_environment,
    merge,
    origin_of,
    walk,
)

MAX_FILE_BYTES = 2**17
"""Limit of a file with its base files; a real experiment has a few thousand bytes."""

MAX_VALUES = 20_000
"""Limit of values in a document, lists and mappings included."""

MAX_KEY = 200
"""Limit of a key and of a file name, in characters."""

MAX_BASES = 16
"""Limit of base files, each based on the next."""


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

    def base_error(self, problem: str) -> ConfigFieldError:
        """Return an error of the field ``base``."""
        error = ConfigFieldError(problem, ("base",))
        error.source = str(origin_of(("base",), self.origins))
        return error


def read_with_bases(path: Path) -> list[ParsedFile]:
    """Read a file and its base files, the file first.

    Raises:
        ConfigError: A file can't be read, is a link or not a regular file, is too large or
            malformed, or names a base that is missing or leads back to the file.
    """
    files: list[ParsedFile] = []
    size = MAX_FILE_BYTES
    while True:
        try:
            content = _read_bytes(path, size)
        except ConfigError as error:
            if files:
                raise files[-1].base_error(f"{path.name!r} {error.problem}") from None
            error.source = os.fspath(path)
            raise
        size -= len(content)
        file = _parse(path, content)
        files.append(file)
        if file.base is None:
            return files
        known = [known.path.name for known in files]
        if file.base in known:
            cycle = " -> ".join([*known, file.base])
            raise file.base_error(f"leads back to {file.base!r}: {cycle}")
        if len(files) > MAX_BASES:
            raise file.base_error(f"exceeds the limit of {MAX_BASES} base files")
        path = path.with_name(file.base)


def _read_bytes(path: Path, size: int) -> bytes:
    """Read a regular file of at most ``size`` bytes."""
    if os.path.islink(path):
        raise ConfigError("is a link; expected the file itself")
    # A link created after the check is not followed, and opening a pipe does not block.
    flags = sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "BINARY"))
    try:
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
            is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(size + 1) if is_regular else b""
    except IsADirectoryError:
        is_regular, content = False, b""
    except (OSError, ValueError) as error:  # also a name that no file can have
        raise ConfigError(f"can't be read: {getattr(error, 'strerror', error)}") from error
    if not is_regular:
        raise ConfigError("is not a regular file; expected an experiment file")
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
    origins = {where: origin_of(where, by_line) for where, _ in walk(document)}
    document.pop("$schema", None)
    base = document.pop("base", None)
    file = ParsedFile(path, document, origins, base if isinstance(base, str) else None)
    if base is not None:
        _check_base(file, base)
    return file


def check_bounds(document: Mapping[str, Plain]) -> None:
    """Refuse a document with more values or longer keys than any real experiment."""
    remaining: list[Plain] = [dict(document)]
    seen = 0
    while remaining:  # faster than a walk with paths
        value = remaining.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise ConfigSyntaxError(f"the document holds more than {MAX_VALUES} values")
        if isinstance(value, dict):
            if long := next((key for key in value if len(key) > MAX_KEY), None):
                problem = f"expected keys of at most {MAX_KEY} characters, found {long[:40]!r}..."
                raise ConfigSyntaxError(problem)
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
        found = describe(base)
        raise file.base_error(f"expected the name of a file in the same folder, found {found}")


@dataclass(frozen=True)
class ExperimentDocument:
    """Merged plain data of an experiment, not validated yet.

    Attributes:
        document: Merged fields; names of code are replaced by definitions.
        origins: Origin of each value, mappings and lists included. A mapping merged from several
            layers has the origin of the weakest layer.
        files: The file, its base, and so on.
        overrides: Applied overrides, the weakest first.
        without_overrides: Fields and origins of the files alone.
    """

    document: dict[str, Plain]
    origins: Origins
    files: tuple[Path, ...]
    overrides: tuple[Override, ...]
    without_overrides: Located

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
        """Return a copy with the effective override nearest to ``path`` as typed text, or None.

        ``--name 3`` is parsed as a number, although the field may require text.
        """
        keys = tuple(map(str, path))
        effective = {tuple(map(str, where)): origin for where, origin in self.origins.items()}
        found: list[tuple[int, int, str]] = []
        for number, override in enumerate(self.overrides):
            at, text = override.path, override.text
            is_near = keys[: len(at)] == at or (keys and at[: len(keys)] == keys)
            is_typed = text is not None and not isinstance(override.value, str)
            if is_near and is_typed and effective.get(at) == override.origin:
                found.append((abs(len(keys) - len(at)), -number, text or ""))
        if not found:
            return None
        _, negative, text = min(found)
        overrides = [*self.overrides]
        overrides[-negative] = replace(overrides[-negative], value=text)
        located = self.without_overrides
        try:
            for override in overrides:
                located = _apply(located, override)
        except ConfigError:  # another override changes a part of the value
            return None
        document, origins = located
        return replace(self, document=document, origins=origins, overrides=tuple(overrides))


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
    of_files: Located = {}, {}
    for read in reversed(files):
        fields = {key: with_definitions(value, (key,)) for key, value in read.document.items()}
        of_files = merge(of_files, (fields, read.origins))
    located, given = of_files, list(overrides)
    applied: list[Override] = []
    for layer in ("code", "environment", "command line"):
        of_layer = [override for override in given if override.origin.layer == layer]
        if layer == "environment" and environ is not None:
            of_layer += from_environment(environ, located[0])
        # A new class replaces the mapping, so overrides of its arguments are applied later.
        for override in sorted(
            of_layer, key=lambda o: (not o.names_code, len(o.path) * o.names_code)
        ):
            located = _apply(located, override)
            applied.append(override)
    paths = tuple(file.path for file in files)
    return ExperimentDocument(*located, paths, tuple(applied), of_files)


def _apply(located: Located, override: Override) -> Located:
    with override.origin.as_source():
        at = _resolve_path(located[0], override.path)
    value = with_definitions(override.value, at)
    new_origins = {inner: override.origin for inner, _ in walk(value, at)}
    for key in reversed(at):
        value = ItemChange(key, value) if isinstance(key, int) else {key: value}
        at = at[:-1]
        new_origins[at] = override.origin
    assert isinstance(value, dict)  # no path is empty
    return merge(located, (value, new_origins))


def _resolve_path(document: dict[str, Plain], keys: tuple[str, ...]) -> FieldPath:
    """Convert the keys of an override to a path, with the indexes of lists as integers."""
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
