"""Paths of what a run writes: in an experiment's file, they lie in the run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from robo_orchard_core.utils.config import Config, ConfigFieldError

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class RunPath:
    """What stands in ``Annotated`` for a config's field that names a file or folder to write.

    Where a hook is built by a script, such a path is that of the script, from the working
    directory. In an experiment it is one in the run's folder, and can't lead out of it.

    >>> from typing import Annotated
    >>> class Dump(Config):
    ...     path: Annotated[str, RunPath()] = "dump.txt"
    >>> in_run_folder(Dump(), Path("runs/first")).path
    'runs/first/dump.txt'

    Attributes:
        joined: whether the run's folder comes in front of it; else something else does that lies
            in there, and the path is only checked.
    """

    joined: bool = True


def check_run_path(path: str | PurePath) -> None:
    """That a path, from a run's folder on, leads to something in there.

    Raises:
        ConfigFieldError: it does not.
    """
    path = PurePath(path)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigFieldError(
            f"expected a path within the run's folder, from there on, found {str(path)!r}; leave "
            "out a leading '/' and any '..'"
        )
    if not str(path).isprintable():
        raise ConfigFieldError(
            f"expected a path within the run's folder that can be printed, found {str(path)!r}"
        )


def check_run_paths(config: Config) -> None:
    """That all such paths in a config, and in those within, stay in the run's folder.

    Raises:
        ConfigFieldError: one of them does not, and where it is.
    """
    for _ in _walked(config, Path()):
        pass


def in_run_folder(config: ConfigT, folder: Path) -> ConfigT:
    """The same config with all such paths, and those of configs within, in a run's folder.

    Raises:
        ConfigFieldError: one of them leads out of it or through a link, and where it is.
    """
    changes = dict(_walked(config, folder))
    return config.model_copy(update=changes) if changes else config


def _walked(config: Config, folder: Path) -> Iterator[tuple[str, Any]]:
    """The fields that have another value in the folder."""
    fields = type(config).model_fields
    # What a config has beside its fields may hold configs with such paths, too.
    for name in (*fields, *(config.model_extra or ())):
        value = getattr(config, name) if name in fields else (config.model_extra or {})[name]
        metadata = fields[name].metadata if name in fields else []
        marks = [mark for mark in metadata if isinstance(mark, RunPath)]
        try:
            inside = _placed(value, folder, marks[0]) if marks else _within(value, folder)
        except ConfigFieldError as error:
            raise error.under((name,)) from error.__cause__
        if inside is not value:
            yield name, inside


def _within(value: Any, folder: Path) -> Any:
    """A value with what it has of configs in the folder; itself where that is the same."""
    if isinstance(value, Config):
        return in_run_folder(value, folder)
    if isinstance(value, dict):
        parts: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    else:
        return value
    inside = {}
    for key, part in parts:
        try:
            inside[key] = _within(part, folder)
        except ConfigFieldError as error:
            raise error.under((key,)) from error.__cause__
    if all(inside[key] is part for key, part in parts):
        return value
    return inside if isinstance(value, dict) else type(value)(inside.values())


def _placed(value: Any, folder: Path, mark: RunPath) -> Any:
    if value is None:
        return None
    check_run_path(value)
    if not mark.joined:
        return value
    for part in (PurePath(value), *PurePath(value).parents[:-1]) if folder != Path() else ():
        if (link := folder / part).is_symlink():
            raise ConfigFieldError(f"expected a path within the run's folder; {link} is a link")
    return type(value)(folder / value)
