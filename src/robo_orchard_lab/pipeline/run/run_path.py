"""Paths of files that a run writes; in an experiment file, relative to the run folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from robo_orchard_core.utils.config import Config, ConfigFieldError
from robo_orchard_core.utils.config.errors import describe
from robo_orchard_core.utils.untrusted_text import path_problem

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class RunPath:
    """Annotation of a config field that names a file or directory to write.

    In a script, such a path is relative to the working directory. In an experiment file, it is
    relative to the run folder and can't leave the run folder. A field of type ``str`` accepts a
    `pathlib.Path`, too.

    >>> from typing import Annotated
    >>> class Dump(Config):
    ...     path: Annotated[str, RunPath()] = "dump.txt"
    >>> in_run_folder(Dump(), Path("runs/first")).path
    'runs/first/dump.txt'

    Attributes:
        joined: True if the run folder is prepended; False if the path is only checked.
    """

    joined: bool = True

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema of the field, which accepts any `os.PathLike`."""
        return core_schema.no_info_before_validator_function(path_text, handler(source))


def path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_run_path(path: str | PurePath) -> None:
    """Check that a path relative to the run folder stays inside.

    Raises:
        ConfigFieldError: the path may lead out, see :func:`path_problem`.
    """
    if problem := path_problem(path):
        raise ConfigFieldError(
            "expected a path within the run folder, relative to it, such as 'out/a'; found "
            f"{describe(str(path))}, which {problem}"
        )


def check_run_paths(config: Config) -> None:
    """Check the run paths of a config and of nested configs.

    Raises:
        ConfigFieldError: a path leaves the run folder; the error has its location.
    """
    _within(config, Path())


def in_run_folder(config: ConfigT, folder: Path) -> ConfigT:
    """Return a copy of the config with all run paths, also nested ones, inside ``folder``.

    Raises:
        ConfigFieldError: a path leaves the folder or passes a link; the error has its location.
    """
    return _within(config, folder)  # type: ignore[no-any-return]  # of the same type


def _within(value: Any, folder: Path) -> Any:
    """Return a value with all its run paths in the folder; the same object if unchanged."""
    changes: dict[Any, Any] = {}
    for key, part, mark in _parts_of(value):
        try:
            inside = _within(part, folder) if mark is None else _placed(part, folder, mark)
        except ConfigFieldError as error:
            raise error.under((key,)) from error.__cause__
        if inside is not part:
            changes[key] = inside
    if not changes:
        return value
    if isinstance(value, Config):
        return value.model_copy(update=changes)
    if isinstance(value, dict):
        return {**value, **changes}
    return type(value)(changes.get(index, part) for index, part in enumerate(value))


def _parts_of(value: Any) -> Iterator[tuple[Any, Any, RunPath | None]]:
    """Yield key, value and mark of each field of a config, or item of a dict, list or tuple."""
    if isinstance(value, Config):
        for name, field in type(value).model_fields.items():
            marks = (mark for mark in field.metadata if isinstance(mark, RunPath))
            yield name, getattr(value, name), next(marks, None)
        value = value.model_extra or {}  # may hold configs with run paths, too
    if isinstance(value, dict):
        yield from ((key, part, None) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((index, part, None) for index, part in enumerate(value))


def _placed(value: Any, folder: Path, mark: RunPath) -> Any:
    if value is None:
        return None
    check_run_path(value)
    if not mark.joined:
        return value
    for part in (PurePath(value), *PurePath(value).parents[:-1]) if folder != Path() else ():
        if (link := folder / part).is_symlink():
            raise ConfigFieldError(f"expected a path within the run folder; {link} is a link")
    return type(value)(folder / value)
