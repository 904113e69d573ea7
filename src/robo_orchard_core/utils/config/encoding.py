"""From a config to the plain data of its document, with the proof that nothing was lost."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any, get_args

from pydantic import BaseModel, PlainSerializer, TypeAdapter, ValidationError, WrapSerializer
from pydantic_core import to_jsonable_python

from robo_orchard_core.utils.config.errors import (
    ConfigReferenceError,
    ConfigSaveError,
    ConfigSyntaxError,
    Path,
    config_error,
    describe,
)
from robo_orchard_core.utils.config.formats import MAX_DEPTH, Plain, check_plain
from robo_orchard_core.utils.config.model import ConfigModel, field_values
from robo_orchard_core.utils.config.references import (
    CONFIG_TYPE,
    Code,
    Loading,
    Trust,
    declared_code,
    find_config_class,
    find_in_module,
    item_type,
    loading,
    mapping_value_type,
    reference_to,
    union_members,
)


def encode(config: ConfigModel, *, for_toml: bool = False) -> dict[str, Plain]:
    """The document of a config: every field, in the order of declaration.

    Args:
        config: What to write.
        for_toml: Leave out fields that are None by default and None here, and put plain values
            before tables, since TOML has no null and no way back out of a table.

    Raises:
        ConfigSaveError: A value would not come back exactly; its place is named.
    """
    encoder = _Encoder(for_toml=for_toml)
    document = encoder.config(config, type(config), ())
    _checked(document)
    _prove(config, document, encoder.code)
    return document


def encode_value(value: Any, annotation: Any) -> Plain:
    """What stands in a document for one value of a field, without the proof.

    Raises:
        ConfigSaveError: No document can hold it.
    """
    return _checked(_Encoder(for_toml=False).value(value, annotation, ()))


class _Encoder:
    def __init__(self, *, for_toml: bool) -> None:
        self._for_toml = for_toml
        self.code: dict[Code, Path] = {}

    def config(self, config: ConfigModel, annotation: Any, path: Path) -> dict[str, Plain]:
        cls = type(config)
        document: dict[str, Plain] = {}
        admitted = [m for m in union_members(annotation) if m is not type(None)]
        if admitted != [cls] and not (cls.is_sparse or _is_named_by_class(config, admitted)):
            document[CONFIG_TYPE] = self._reference(cls, path)
        for name, value in field_values(config).items():
            field = cls.model_fields.get(name)
            if field is None:
                document[name] = self.value(value, Any, (*path, name))
                continue
            if _has_serializer(cls, name):
                # The author says how it is written, and presumably how that is read.
                document[name] = config.model_dump(mode="json", include={name})[name]
                continue
            if field.exclude or (self._for_toml and value is None and field.default is None):
                continue
            document[name] = self.value(value, field.annotation, (*path, name))
        if self._for_toml:
            return dict(sorted(document.items(), key=lambda pair: isinstance(pair[1], dict)))
        return document

    def value(self, value: object, annotation: Any, path: Path) -> Plain:
        if len(path) > MAX_DEPTH:
            raise ConfigSaveError(f"nested deeper than {MAX_DEPTH} levels", path[:8])
        if isinstance(value, ConfigModel):
            return self.config(value, annotation, path)
        if isinstance(value, Enum):
            return self.value(value.value, Any, path)
        # Subclasses, as NumPy's float64 is one, are written as what they are subclasses of.
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, float):
            return float(value)
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, Mapping):
            return self._mapping(value, mapping_value_type(annotation), path)
        if isinstance(value, list | tuple | set | frozenset):
            items = [
                self.value(item, item_type(annotation, i), (*path, i))
                for i, item in enumerate(value)
            ]
            # The order of a set differs from process to process; its document must not.
            return sorted(items, key=json.dumps) if isinstance(value, set | frozenset) else items
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            return self._reference(value, path)
        leaf: Plain = self._leaf(value, path)
        return leaf

    def _mapping(self, mapping: Mapping[Any, Any], annotation: Any, path: Path) -> Plain:
        document: dict[str, Plain] = {}
        for key, value in mapping.items():
            # Pydantic knows the text of a key that is a number, a path, an enum and so on.
            (name,) = self._leaf({key: None}, path)
            document[name] = self.value(value, annotation, (*path, name))
        return document

    def _reference(self, code: Code, path: Path) -> str:
        self.code.setdefault(code, path)
        return reference_to(code)

    def _leaf(self, value: Any, path: Path) -> Any:
        if isinstance(value, PurePath):
            return str(value)
        try:
            if hasattr(type(value), "__get_pydantic_core_schema__"):  # says how it is written
                return TypeAdapter(type(value)).dump_python(value, mode="json")
            return to_jsonable_python(value)
        except ValueError as error:  # pydantic's, or of text that UTF-8 can't hold
            raise ConfigSaveError(f"no document can hold {describe(value)}", path) from error


def _is_named_by_class(config: ConfigModel, admitted: list[Any]) -> bool:
    """Whether it is read as what it is where its ``class_type`` is all that names it: of the config
    class that stands beside that class, where a part or a config of any class is declared."""
    cls = getattr(config, "class_type", None)
    if cls is None or find_config_class(cls) is not type(config):
        return False
    return any(kind is Any or _leaves_class_open(kind) for kind in admitted)


def _leaves_class_open(kind: Any) -> bool:
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    return "class_type" in fields and fields["class_type"].is_required()


def _has_serializer(cls: type[BaseModel], name: str) -> bool:
    """Whether the field, or a part of it, is declared with a serializer of its own."""
    decorated = cls.__pydantic_decorators__.field_serializers.values()
    if any(
        name in decorator.info.fields or "*" in decorator.info.fields for decorator in decorated
    ):
        return True
    field = cls.model_fields[name]
    waiting: list[Any] = [field.annotation, *field.metadata]
    while waiting:
        part = waiting.pop()
        if isinstance(part, PlainSerializer | WrapSerializer):
            return True
        waiting += [*getattr(part, "__metadata__", ()), *get_args(part)]
    return False


def _checked(document: Plain) -> Plain:
    """The document, once it keeps the rules that its readers hold it to."""
    try:
        return check_plain(document)
    except ConfigSyntaxError as error:
        raise ConfigSaveError(error.problem, error.path) from error


def _prove(config: ConfigModel, document: dict[str, Plain], code: dict[Code, Path]) -> None:
    """Read the document back, without trust or import, and compare."""
    cls = type(config)
    hidden = {item: path for item, path in code.items() if not _is_reachable(item)}
    for item in hidden.keys() - set(declared_code(cls) if hidden else ()):
        raise ConfigSaveError(
            f"{reference_to(item)!r} can't be found by its name; define it at the top of "
            "a module, or declare it as the field's type or default",
            hidden[item],
        )
    try:
        with loading(
            Loading(cls, Trust(frozenset()), known=code.keys() - hidden.keys(), proving=True)
        ):
            loaded = cls.model_validate(document)
    except ValidationError as error:
        problem = config_error(error, document)
        raise ConfigSaveError(f"would not come back: {problem.problem}", problem.path) from error
    difference = _difference(config, loaded, ())
    if difference is not None:
        raise ConfigSaveError(
            "the declared type would not bring this value back exactly; declare it more precisely",
            difference,
        )


def _is_reachable(code: Code) -> bool:
    module = sys.modules.get(code.__module__)
    if module is None:
        return False
    try:
        return find_in_module(module, code.__qualname__, reference_to(code)) is code
    except ConfigReferenceError:
        return False


def _difference(left: Any, right: Any, path: Path) -> Path | None:
    """Where two values differ, in type or content; None where they are the same."""
    if type(left) is not type(right) and not _is_plainer(right, left):
        return path
    parts: list[tuple[str | int, Any, Any]]
    if isinstance(left, BaseModel):
        values, others = field_values(left), field_values(right)
        if [*values] != [*others]:
            return path
        parts = [(name, values[name], others[name]) for name in values]
    elif isinstance(left, Mapping):
        if [(type(k), k) for k in left] != [(type(k), k) for k in right]:
            return path
        parts = [(str(key), left[key], right[key]) for key in left]
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            return path
        parts = [(i, a, b) for i, (a, b) in enumerate(zip(left, right, strict=True))]
    elif isinstance(left, set | frozenset):
        return None if {(type(i), i) for i in left} == {(type(i), i) for i in right} else path
    else:
        return None if _is_same(left, right) else path
    found = (_difference(a, b, (*path, part)) for part, a, b in parts)
    return next((difference for difference in found if difference is not None), None)


def _is_plainer(plain: Any, value: Any) -> bool:
    """Whether a number or text came back as what it is a subclass of, as NumPy's float64 is."""
    base = type(plain)
    return (
        base in (int, float, str) and isinstance(value, base) and not isinstance(value, bool | Enum)
    )


def _is_same(left: Any, right: Any) -> bool:
    if isinstance(left, float):
        return float.hex(left) == float.hex(right)  # tells -0.0 from 0.0
    if isinstance(left, datetime.datetime | datetime.time):
        # A time zone with rules (ZoneInfo) has no offset without a date, and a file holds no rules.
        zones = [zone and zone.utcoffset(None) for zone in (left.tzinfo, right.tzinfo)]
        return bool(left == right) and zones[0] == zones[1]
    return bool(left == right)
