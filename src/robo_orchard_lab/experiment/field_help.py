"""The fields of configs for people: what each is, takes, and is by default."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from robo_orchard_core.utils.cli import Option, options_of, type_name
from robo_orchard_core.utils.config import ClassConfig, Config
from robo_orchard_core.utils.config.parts import FieldsOf, Function, Part
from robo_orchard_core.utils.config.references import is_collection, is_mapping, members


@dataclass(frozen=True)
class FieldHelp:
    """One field, by its dotted path."""

    path: str
    description: str
    type: str
    default: str | None
    """As in a file; None where one has to be given."""

    @property
    def text(self) -> str:
        """What help says of it."""
        default = "required" if self.default is None else f"default: {self.default}"
        return f"{self.description} ({self.type}; {default})".strip()


@cache
def experiment_fields() -> tuple[FieldHelp, ...]:
    """The fields of every experiment; those of its parts are their classes'."""
    from robo_orchard_lab.experiment.config import ExperimentConfig

    return tuple(fields_of(ExperimentConfig))


def fields_of(config_class: type[BaseModel]) -> list[FieldHelp]:
    """The fields of a config class, those of the configs that it holds behind their names."""
    required = getattr(config_class, "required", ())  # of one that is made of a signature
    return [
        _field(option, required)
        for option in options_of(config_class, lambda path: "")
        if not _only_holds(option) and option.path not in (("class_type",), ("func",))
    ]


def _only_holds(option: Option) -> bool:
    """Whether it is a config's, whose fields are listed themselves."""
    kind = option.field.annotation
    return isinstance(kind, type) and issubclass(kind, Config)


def _field(option: Option, required: Iterable[str]) -> FieldHelp:
    has_default = not (option.required or ".".join(option.path) in required)
    return FieldHelp(
        path=".".join(option.path),
        description=option.field.description or "",
        type=_type(option.field.annotation, option.field.metadata),
        default=_default(option.default) if has_default else None,
    )


def _type(annotation: Any, marks: Iterable[Any] = ()) -> str:
    """The type in words; of a part, the class that it has to be of.

    >>> _type(dict[str, Annotated[Any, Part("torch.nn:Module")]] | None)
    'Module by name | null'
    """
    for mark in marks:
        if words := _of_mark(mark):
            return words
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return _type(inner, marks)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if len(members(annotation)) > 1:
        names = [_type(member) for member in arguments]
        # A schedule's text stands for it.
        return " | ".join(n for n in names if not (n == "str" and "Schedule" in names))
    if is_mapping(origin) and len(arguments) == 2:
        return f"{_type(arguments[1])} by name"
    if is_collection(origin) and arguments:
        return f"list of {_type(arguments[0])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, ClassConfig):
        return _built_by(annotation)
    return "anything" if annotation is Any else type_name(annotation)


def _of_mark(mark: Any) -> str:
    """What an annotation beside the type says of it; empty where that is nothing for people."""
    if isinstance(mark, Part):
        kinds = mark.kinds if isinstance(mark.kinds, tuple) else (mark.kinds,)
        names = [kind if isinstance(kind, str) else kind.__qualname__ for kind in kinds]
        return " | ".join(name.rpartition(":")[2] for name in names)
    if isinstance(mark, FieldsOf):
        return mark.reference.rpartition(":")[2].removesuffix("Config") + "'s fields"
    return "function" if mark in get_args(Function)[1:] else ""


def _built_by(config_class: type[ClassConfig[Any]]) -> str:
    arguments = config_class.__pydantic_generic_metadata__["args"]
    known = bool(arguments) and isinstance(arguments[0], type) and arguments[0] is not Any
    return arguments[0].__name__ if known else "part"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "made when needed"
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except TypeError:
        return str(value)
