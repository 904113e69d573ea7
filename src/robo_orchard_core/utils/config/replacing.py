"""A config with other values at some paths, validated anew from there up."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from robo_orchard_core.utils.config.errors import ConfigError, ConfigFieldError
from robo_orchard_core.utils.config.kinds import item_annotation, value_annotation
from robo_orchard_core.utils.config.model import ConfigModel, field_values
from robo_orchard_core.utils.config.problems import (
    config_error,
    nearest_or_all,
    shown,
    unknown_field,
)

ModelT = TypeVar("ModelT", bound=ConfigModel)
Keys = tuple[str, ...]


def config_with(config: ModelT, changes: Mapping[Keys, Any]) -> ModelT:
    """The config with other values where the keys lead, all of them changed at once.

    Raises:
        ConfigFieldError: Keys that lead nowhere, or a value that isn't admitted there.
    """
    cls = type(config)
    values = copy.deepcopy(field_values(config))
    admits_any = cls.model_config.get("extra") == "allow"
    for name, inner in _by_first(changes).items():
        field = cls.model_fields.get(name)
        if field is None and name not in values and not admits_any:
            raise unknown_field(name, cls.model_fields, cls.__qualname__)
        if name in values:
            value = values[name]
        else:  # of a config that stands for what was set alone
            value = None if field is None else copy.deepcopy(getattr(config, name))
        try:
            values[name] = _changed(value, inner, Any if field is None else field.annotation)
        except ConfigError as error:
            raise error.under((name,)) from error.__cause__
    if cls.only_what_is_set:
        _check_code(config, values)
    try:
        return cls(**values)
    except ValidationError as error:
        raise config_error(error, values) from error


def _check_code(config: ConfigModel, values: Mapping[str, Any]) -> None:
    """That the code is the one whose arguments the other values are, or a subclass of it."""
    for name in ("class_type", "func"):
        old, new = getattr(config, name, None), values.get(name)
        is_same = old is new or (
            isinstance(old, type) and isinstance(new, type) and issubclass(new, old)
        )
        if not is_same:
            raise ConfigFieldError(
                f"the other values are for {shown(old)}, and this is {shown(new)}; replace the "
                "config whole",
                (name,),
            )


def _by_first(changes: Mapping[Keys, Any]) -> dict[str, dict[Keys, Any]]:
    found: dict[str, dict[Keys, Any]] = {}
    for (first, *rest), value in changes.items():
        found.setdefault(first, {})[tuple(rest)] = value
    return found


def _changed(value: Any, changes: dict[Keys, Any], annotation: Any) -> Any:
    """The value, or the one that stands in its place, with the changes within."""
    value = changes.pop((), value)
    if not changes:
        return value
    if isinstance(value, ConfigModel):
        return config_with(value, changes)
    if isinstance(value, dict):
        return _mapping_with(value, _by_first(changes), value_annotation(annotation))
    if type(value) in (list, tuple):
        return type(value)(_items_with(value, _by_first(changes), annotation))
    found = type(value).__qualname__
    raise ConfigFieldError(f"holds no config, mapping or list but {found}; replace it whole")


def _mapping_with(
    value: Mapping[Any, Any], changes: Mapping[str, dict[Keys, Any]], annotation: Any
) -> dict[Any, Any]:
    result = dict(value)
    keys = {str(key): key for key in value}
    for name, inner in changes.items():
        key = keys.get(name, name)
        removes = inner == {(): None} and not _admits_none(annotation)
        if name not in keys and (removes or () not in inner):
            advice = nearest_or_all(name, [*keys], "there is")
            raise ConfigFieldError(f"no entry has this name; {advice}", (name,))
        if removes:
            del result[key]
            continue
        try:
            result[key] = _changed(value.get(key), inner, annotation)
        except ConfigError as error:
            raise error.under((name,)) from error.__cause__
    return result


def _items_with(
    value: Iterable[Any], changes: Mapping[str, dict[Keys, Any]], annotation: Any
) -> list[Any]:
    items = [*value]
    for name, inner in changes.items():
        if not name.isdecimal() or int(name) >= len(items):
            raise ConfigFieldError(f"expected the index of one of {len(items)} items", (name,))
        index = int(name)
        try:
            items[index] = _changed(items[index], inner, item_annotation(annotation, index))
        except ConfigError as error:
            raise error.under((index,)) from error.__cause__
    return items


def _admits_none(annotation: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(None)
    except ValidationError:
        return False
    return True
