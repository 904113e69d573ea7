"""An experiment as plain data: its file, those it builds on, and what is said over them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from robo_orchard_core.utils.config.document import Plain
from robo_orchard_core.utils.config.errors import ConfigError, ConfigFieldError, shown
from robo_orchard_core.utils.config.errors import Path as FieldPath
from robo_orchard_lab.experiment.catalogue import with_definitions
from robo_orchard_lab.experiment.merging import ItemChange, all_from, merged_with_origins
from robo_orchard_lab.experiment.origins import DEFAULT, Origins, origin_of
from robo_orchard_lab.experiment.overrides import Override, from_environment
from robo_orchard_lab.experiment.reading import read_with_bases


@dataclass(frozen=True)
class ExperimentDocument:
    """What an experiment says, before anything of it is believed.

    Attributes:
        document: The merged fields, with public and short names of code replaced by the places
            where it is defined.
        places: Where each value comes from, mappings and lists included. A mapping that several
            layers contribute to comes from the weakest, which began it.
        files: The file, the one it builds on, and so on.
        overrides: What was applied over them, the weakest first.
    """

    document: dict[str, Plain]
    places: Origins
    files: tuple[Path, ...]
    overrides: tuple[Override, ...] = ()

    @cached_property
    def origins(self) -> Origins:
        """Where each value comes from that is no mapping or list of others.

        `origin_of` finds a field's here; one that nothing has set is a default.
        """
        inner = {path[:-1] for path in self.places}
        return {path: origin for path, origin in self.places.items() if path not in inner}

    def located(self, error: ConfigError) -> ConfigError:
        """The error, with the file and line, the option or the variable that it comes from."""
        origin = origin_of(error.path, self.places)
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
            if self.places.get(at) != override.origin:
                continue
            if isinstance(_value_at(self.document, at), str):
                continue
            if path[: len(at)] == at or (path and at[: len(path)] == path):
                found.append((abs(len(path) - len(at)), -number, at, override.text))
        if not found:
            return None
        *_, at, text = min(found)
        places = {
            where: origin
            for where, origin in self.places.items()
            if where == at or where[: len(at)] != at
        }
        document = _with_value(self.document, at, text)
        assert isinstance(document, dict)  # no path of an override is empty
        return replace(self, document=document, places=places)


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
        document, origins = merged_with_origins((document, origins), (said, read.origins))
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
    return merged_with_origins((document, origins), (value, from_it))


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
            raise ConfigFieldError(f"holds {shown(inside)}, which has no {key!r}", path)
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
