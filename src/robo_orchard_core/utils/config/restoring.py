"""The part of reading that pydantic can't do: code from references, enum members from text.

A field's declaration is walked beside its value. What isn't declared as one of these is left to
pydantic as it is.
"""

from __future__ import annotations

import collections.abc
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from robo_orchard_core.utils.config.errors import ConfigReferenceError, Path
from robo_orchard_core.utils.config.kinds import (
    class_kinds,
    is_collection,
    is_mapping,
    item_annotation,
    members,
    value_annotation,
)
from robo_orchard_core.utils.config.loading import Loading


def restore(state: Loading, annotation: Any, value: Any, path: Path) -> Any:
    """The value with code in the place of references, where the annotation declares code.

    Raises:
        ConfigReferenceError: A reference leads to nothing that is trusted and of that kind.
    """
    options = members(annotation)
    if value is None or str in options or Any in options:
        return value
    errors: list[ConfigReferenceError] = []
    for option in options:
        try:
            restored = _restore(state, option, value, path)
        except ConfigReferenceError as error:
            errors.append(error)
        else:
            if restored is not value:
                return restored
    if errors:
        raise errors[0]
    return value


def _restore(state: Loading, annotation: Any, value: Any, path: Path) -> Any:
    origin = get_origin(annotation) or annotation
    if origin is type and isinstance(value, str):
        return state.class_at(value, class_kinds(annotation), path)
    if origin is collections.abc.Callable and isinstance(value, str):
        return state.function_at(value, annotation, path)
    if origin is Literal and value not in get_args(annotation):
        return _listed(annotation, value)
    if isinstance(value, list) and is_collection(origin):
        items = [
            restore(state, item_annotation(annotation, i), item, (*path, i))
            for i, item in enumerate(value)
        ]
        return items if any(map(_differ, items, value)) else value
    if isinstance(value, dict) and is_mapping(origin):
        keys, inner = (get_args(annotation) or (Any,))[0], value_annotation(annotation)
        mapping = {
            _key(keys, key): restore(state, inner, item, (*path, key))
            for key, item in value.items()
        }
        if [*mapping] != [*value] or any(map(_differ, mapping.values(), value.values())):
            return mapping
    return value


def _differ(left: object, right: object) -> bool:
    return left is not right


def _listed(annotation: Any, value: Any) -> Any:
    """The enum member that a Literal lists and that stands in documents as ``value``."""
    choices = (choice for choice in get_args(annotation) if isinstance(choice, Enum))
    return next((choice for choice in choices if choice.value == value), value)


def _key(annotation: Any, text: str) -> Any:
    """The enum member, or the value that a Literal lists, whose text is a mapping's key."""
    for kind in members(annotation):
        is_enum = isinstance(kind, type) and issubclass(kind, Enum)
        for choice in kind if is_enum else get_args(kind) if get_origin(kind) is Literal else ():
            if str(choice.value if isinstance(choice, Enum) else choice) == text:
                return choice
    return text
