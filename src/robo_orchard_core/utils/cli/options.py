"""The fields of a config class as options: their names, their help, their values."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from robo_orchard_core.utils.config import Config, ConfigError, json_format
from robo_orchard_core.utils.config.encoding import encode_value
from robo_orchard_core.utils.config.kinds import default_of, is_mapping, members


@dataclass(frozen=True, eq=False)
class Option:
    """One field as an option and, where ``variable`` isn't empty, an environment variable.

    Attributes:
        path: The field and those that hold it, from the top.
        field: Its declaration.
        default: Its default, or what the default config that holds it has there.
        required: Whether it has no default.
        variable: The environment variable; empty where the environment isn't read.
    """

    path: tuple[str, ...]
    field: FieldInfo
    default: Any
    required: bool
    variable: str

    @property
    def flag(self) -> str:
        """As it is typed: ``--dataset.data_root``."""
        return "--" + ".".join(self.path)

    @property
    def dest(self) -> str:
        """Its name among argparse's results; no argument of the user's has a dot in its name."""
        return ".".join(("config", *self.path))

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Declare it to argparse: any number of times, absent unless it is typed."""
        is_switch = self.field.annotation is bool
        group.add_argument(
            self.flag,
            dest=self.dest,
            action="append",
            default=argparse.SUPPRESS,
            metavar="JSON" if any(map(_is_mapped, members(self.field.annotation))) else "VALUE",
            # "--pipeline_test" alone switches it on.
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
            help=self.help().replace("%", "%%"),
        )

    def help(self) -> str:
        """Description, type, default and variable of the field."""
        default = "required" if self.required else f"default: {self._shown_default()}"
        about = f"(type: {type_name(self.field.annotation)}, {default})"
        variable = f"[env: {self.variable}]" if self.variable else ""
        return " ".join(filter(None, (self.field.description, about, variable)))

    def _shown_default(self) -> str:
        if self.default is PydanticUndefined:
            return "made when needed"
        if isinstance(self.default, Config):
            return f"a {type(self.default).__qualname__}"
        if isinstance(self.default, str):
            return self.default
        try:
            return json.dumps(encode_value(self.default, self.field.annotation))
        except ConfigError:
            return repr(self.default)

    def parsed(self, texts: list[str]) -> Any:
        """The value for a document: the last text, or for a list the items that all of them are.

        Raises:
            ConfigSyntaxError: A text begins like JSON and isn't.
        """
        item = _item_annotation(self.field.annotation)
        if item is None or texts[-1][:1] == "[" or texts[-1] == "null":
            return _parsed(texts[-1], self.field.annotation)
        return [_parsed(text, item) for text in texts]


def options_of(
    cls: type[BaseModel],
    variable_of: Callable[[tuple[str, ...]], str],
    path: tuple[str, ...] = (),
    holder: BaseModel | None = None,
    above: tuple[type[BaseModel], ...] = (),
) -> Iterator[Option]:
    """The options of a config class, each before those of the config that its field holds.

    A class that holds itself is unrolled once; deeper levels are given as JSON.

    Args:
        cls: The config class.
        variable_of: The environment variable of a path; empty: none.
        path: Of the field that holds the config.
        holder: The config that this field holds by default.
        above: The classes on the way here.
    """
    for name, field in cls.model_fields.items():
        here = (*path, name)
        default = default_of(field) if holder is None else getattr(holder, name)
        required = holder is None and field.is_required()
        yield Option(here, field, default, required, variable_of(here))
        inner = _config_class(field.annotation)
        if inner is not None and inner not in (cls, *above):
            held = default if isinstance(default, inner) else None
            # What is there by default may be a subclass, with options of its own.
            kind = inner if held is None else type(held)
            yield from options_of(kind, variable_of, here, held, (cls, *above))


def type_name(annotation: Any) -> str:
    """The type in a few words, without modules; the values themselves where it lists them.

    >>> from pathlib import Path
    >>> type_name(dict[str, Path] | None), type_name(Literal["sgd", "adam"])
    ('dict[str, Path] | None', "'sgd' | 'adam'")
    """
    return " | ".join(map(_name, members(annotation)))


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(repr(getattr(value, "value", value)) for value in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(repr(member.value) for member in kind)
    if kind is type(None):
        return "None"
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return re.sub(r"(\w+\.|<locals>\.)+", "", str(kind))


def _config_class(annotation: Any) -> type[Config] | None:
    """The config class of a field that admits one, and maybe None."""
    kinds = [kind for kind in members(annotation) if kind is not type(None)]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Config):
        return kinds[0]
    return None


def _is_mapped(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return is_mapping(origin) or (isinstance(origin, type) and issubclass(origin, BaseModel))


def _item_annotation(annotation: Any) -> Any:
    """How the items of a list, set or tuple are declared; None where the field holds neither."""
    for kind in members(annotation):
        if (get_origin(kind) or kind) in (list, tuple, set, frozenset):
            return (get_args(kind) or (Any,))[0]
    return None


def _parsed(text: str, annotation: Any) -> Any:
    kinds = members(annotation)
    if text == "null" and type(None) in kinds:
        return None
    # Other texts go to pydantic, which reads numbers, booleans, dates and paths from text.
    return json_format.read(text) if text[:1] in ("[", "{") and str not in kinds else text
