"""An experiment as plain data: its file, those it builds on, and what is said over them."""

from __future__ import annotations

import os
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
    all_from,
    from_environment,
    merge_with_origins,
    origin_of,
    paths,
)

# --- reading ---------------------------------------------------------------------------------
# An experiment's file and those it builds on, read without trusting any of them.


MAX_FILE_BYTES = 2**17
"""Of an experiment's file with all that it builds on; real ones have a few thousand."""

MAX_VALUES = 20_000
"""Of a file, lists and mappings included; far above any real one."""

MAX_KEY = 200
"""Characters of a key, and of a file's name."""

MAX_BASES = 16
"""Files that one builds on, one on the other."""


@dataclass(frozen=True)
class ParsedFile:
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


def read_with_bases(path: Path) -> list[ParsedFile]:
    """The file and those it builds on, itself first.

    Raises:
        ConfigError: One can't be read, is a link or no regular file, is too large, is no
            document, or names a base that isn't a file beside it or leads back to it.
    """
    files: list[ParsedFile] = []
    size = MAX_FILE_BYTES
    named_in: ParsedFile | None = None
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


def _parsed(path: Path, content: bytes) -> ParsedFile:
    lines: Lines = {}
    try:
        document = formats.read(formats.decode_utf8(content), formats.format_of(path), lines)
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
    file = ParsedFile(path, document, origins, base if isinstance(base, str) else None)
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


def _check_base(file: ParsedFile, base: Plain) -> None:
    if not isinstance(base, str):
        raise _wrong_base(
            file, f"expected the name of a file beside this one, found {describe(base)}"
        )
    is_plain = base.isprintable() and all(
        kind(base).name == base for kind in (PurePosixPath, PureWindowsPath)
    )
    if not is_plain or base in ("", ".", "..") or len(base) > MAX_KEY:
        raise _wrong_base(
            file,
            f"expected the name of a file beside this one, without a folder; "
            f"found {describe(base)}",
        )


def _wrong_base(file: ParsedFile, problem: str) -> ConfigFieldError:
    error = ConfigFieldError(problem, ("base",))
    error.source = str(origin_of(("base",), file.origins))
    return error


def _of_base(error: ConfigError, path: Path, named_in: ParsedFile | None) -> ConfigError:
    """An error about a file as a whole, at the place that names it."""
    if named_in is None:
        error.source = os.fspath(path)
        return error
    return _wrong_base(named_in, f"{path.name!r} {error.problem}")


@dataclass(frozen=True)
class ExperimentDocument:
    """What an experiment says, before anything of it is believed.

    Attributes:
        document: The merged fields, with public and short names of code replaced by the places
            where it is defined.
        origins: Where each value comes from, mappings and lists included. A mapping that several
            layers contribute to comes from the weakest, which began it.
        files: The file, the one it builds on, and so on.
        overrides: What was applied over them, the weakest first.
    """

    document: dict[str, Plain]
    origins: Origins
    files: tuple[Path, ...]
    overrides: tuple[Override, ...] = ()

    @cached_property
    def leaf_origins(self) -> Origins:
        """Where each value comes from that is no mapping or list of others.

        `origin_of` finds a field's here; one that nothing has set is a default.
        """
        inner = {path[:-1] for path in self.origins}
        return {path: origin for path, origin in self.origins.items() if path not in inner}

    def locate(self, error: ConfigError) -> ConfigError:
        """The error, with the file and line, the option or the variable that it comes from."""
        origin = origin_of(error.path, self.origins)
        error.source = str(self.files[0] if origin is DEFAULT else origin)
        return error

    def with_text(self, path: FieldPath) -> ExperimentDocument | None:
        """The same, where the override at ``path`` is the text as it was typed.

        ``--name 3`` says the number 3 until it turns out that the field wants text.

        Args:
            path: Where the value was refused; the override nearest to it counts.

        Returns:
            None where no override there was read as anything but text.
        """
        found: list[tuple[int, int, FieldPath, str]] = []
        for number, override in enumerate(self.overrides):
            if override.text is None:
                continue
            try:
                at = _place(self.document, override.path)
            except ConfigError:  # what it led into was replaced by a stronger one
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
    """The document of an experiment's file. Nothing that it names is imported or trusted.

    Args:
        file: YAML, TOML or JSON, as its suffix says.
        overrides: Over the file: those of the command line over those of the environment over
            those from code, and among these the later ones over the earlier ones.
        environ: Environment variables that may hold overrides; none by default.

    Raises:
        ConfigError: With the file and line, the option or the variable that is wrong.
    """
    files = read_with_bases(Path(file))
    document: dict[str, Plain] = {}
    origins: Origins = {}
    for read in reversed(files):
        said = {key: with_definitions(value, (key,)) for key, value in read.document.items()}
        document, origins = merge_with_origins((document, origins), (said, read.origins))
    given = list(overrides)
    applied: list[Override] = []
    for layer in ("code", "environment", "command line"):
        ours = [override for override in given if override.origin.layer == layer]
        if layer == "environment" and environ is not None:
            ours += from_environment(environ, document)
        # Whoever names a class replaces the mapping, so its arguments have to come behind it.
        for override in sorted(ours, key=lambda o: (not o.names_code, len(o.path) * o.names_code)):
            document, origins = _overridden(document, origins, override)
            applied.append(override)
    return ExperimentDocument(document, origins, tuple(f.path for f in files), tuple(applied))


def _overridden(
    document: dict[str, Plain], origins: Origins, override: Override
) -> tuple[dict[str, Plain], Origins]:
    try:
        at = _place(document, override.path)
    except ConfigError as error:
        error.source = str(override.origin)
        raise
    value = with_definitions(override.value, at)
    from_it = all_from(value, override.origin, at)
    for key in reversed(at):
        value = ItemChange(key, value) if isinstance(key, int) else {key: value}
        at = at[:-1]
        from_it[at] = override.origin
    assert isinstance(value, dict)  # no path is empty
    return merge_with_origins((document, origins), (value, from_it))


def _place(document: dict[str, Plain], keys: tuple[str, ...]) -> FieldPath:
    """Where the keys of an override lead: those of lists as numbers.

    Raises:
        ConfigFieldError: There is a value in the way, or a list without such an item.
    """
    if keys[0] in ("base", "$schema"):
        raise ConfigFieldError("is said by a file about itself, not over it", keys[:1])
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
    """The value there; None where there is none."""
    for key in path:
        if isinstance(document, list) and isinstance(key, int) and key < len(document):
            document = document[key]
        elif isinstance(document, dict) and isinstance(key, str):
            document = document.get(key)
        else:
            return None
    return document


def _with_value(document: Plain, path: FieldPath, value: Plain) -> Plain:
    """The document with another value at a path that it has."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(document, list):
        return [_with_value(v, rest, value) if i == key else v for i, v in enumerate(document)]
    assert isinstance(document, dict)  # or it hadn't the path
    return {k: _with_value(v, rest, value) if k == key else v for k, v in document.items()}
