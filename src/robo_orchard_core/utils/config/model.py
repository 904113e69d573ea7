"""Validation and serialization of configs: `ConfigModel`, `restore` and `encode`.

`encode` converts a config to plain data, reads the data back and compares both. `restore` is the
inverse where pydantic has none: code from references, enum members from text.
"""

from __future__ import annotations

import collections.abc
import datetime
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    WrapSerializer,
    model_validator,
)
from pydantic_core import to_jsonable_python

from robo_orchard_core.utils.config.errors import (
    MAX_PROBLEMS,
    ConfigError,
    ConfigReferenceError,
    ConfigSaveError,
    ConfigSyntaxError,
    Path,
    config_error,
    describe,
    unknown_field,
)
from robo_orchard_core.utils.config.formats import MAX_DEPTH, Plain, check_plain
from robo_orchard_core.utils.config.references import (
    CONFIG_TYPE,
    Code,
    Loading,
    Trust,
    admitted_classes,
    current,
    declared_code,
    find_config_class,
    find_in_module,
    is_assignable,
    is_collection,
    is_mapping,
    item_type,
    loading,
    mapping_value_type,
    reference_to,
    union_members,
)


def restore(state: Loading, annotation: Any, value: Any, path: Path) -> Any:
    """Return the value with code instead of references if the annotation declares code."""
    options = union_members(annotation)
    if value is None or str in options or Any in options:
        return value
    errors: list[ConfigReferenceError] = []
    for option in options:
        try:
            restored = _restore_option(state, option, value, path)
        except ConfigReferenceError as error:
            errors.append(error)
        else:
            if restored is not value:
                return restored
    if errors:
        raise errors[0]
    return value


def _restore_option(state: Loading, annotation: Any, value: Any, path: Path) -> Any:
    origin = get_origin(annotation) or annotation
    if origin is type and isinstance(value, str):
        return state.resolve_class(value, admitted_classes(annotation), path)
    if origin is collections.abc.Callable and isinstance(value, str):
        return state.resolve_function(value, annotation, path)
    if origin is Literal and value not in get_args(annotation):
        members = (choice for choice in get_args(annotation) if isinstance(choice, Enum))
        return next((member for member in members if member.value == value), value)
    if isinstance(value, list) and is_collection(origin):
        items = [
            restore(state, item_type(annotation, i), item, (*path, i))
            for i, item in enumerate(value)
        ]
        return items if any(map(_differ, items, value)) else value
    if isinstance(value, dict) and is_mapping(origin):
        keys, inner = (get_args(annotation) or (Any,))[0], mapping_value_type(annotation)
        mapping = {
            _restore_key(keys, key): restore(state, inner, item, (*path, key))
            for key, item in value.items()
        }
        if [*mapping] != [*value] or any(map(_differ, mapping.values(), value.values())):
            return mapping
    return value


def _differ(left: object, right: object) -> bool:
    return left is not right


def _restore_key(annotation: Any, text: str) -> Any:
    """Return the enum member or Literal choice for the text of a mapping's key."""
    for kind in union_members(annotation):
        is_enum = isinstance(kind, type) and issubclass(kind, Enum)
        for choice in kind if is_enum else get_args(kind) if get_origin(kind) is Literal else ():
            if str(choice.value if isinstance(choice, Enum) else choice) == text:
                return choice
    return text


class ConfigModel(BaseModel):
    """Validated fields; `Config` adds documents."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid",
        # Assignments are validated field by field. Rules across fields (__post_init__) are not
        # repeated: two dependent fields could never be changed one after the other.
        validate_assignment=True,
        # `rate: float = 1` holds 1.0, as after a round trip.
        validate_default=True,
        allow_inf_nan=False,
        # Documents use field names, even if the constructor has aliases.
        populate_by_name=True,
        # Training configs have fields such as `model_name`.
        protected_namespaces=(),
        # Validators are built on first use: a program imports more configs than it uses.
        defer_build=True,
    )

    is_sparse: ClassVar[bool] = False
    """True if only fields that were set count; see `DerivedConfig`."""

    @classmethod
    def adapt_parameter(cls, declaration: Any) -> Any:
        """Return the field type for a parameter, in configs derived from this class."""
        return declaration

    @classmethod
    def remedy_for(cls, name: str, value: Any, form: Literal["python", "file"]) -> str:
        """Return what to write instead of an unknown field, or "" to suggest a similar field."""
        return ""

    @classmethod
    def _class_named_in(cls, state: Loading, document: dict[str, Any]) -> type[BaseModel]:
        """Return the config class named in a document."""
        if CONFIG_TYPE in document:
            return state.resolve_config_class(document[CONFIG_TYPE], cls, (CONFIG_TYPE,))
        return cls

    @classmethod
    def _converted(cls, config: ConfigModel) -> ConfigModel | None:
        """Return the config as loaded from its document in a field of this class, or None."""
        return None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.model_config.get("extra") != "forbid" and not cls.is_sparse:
            raise TypeError(f"{cls.__qualname__}: a Config refuses unknown fields; drop `extra`")
        if CONFIG_TYPE in cls.model_fields:
            raise TypeError(
                f"{cls.__qualname__}: the name {CONFIG_TYPE!r} is reserved for the class of a "
                "config in documents; rename the field"
            )

    def __post_init__(self) -> None:
        """Check rules across fields; called after all fields are valid.

        A ValueError is reported with the path of this config. Fields may be assigned, but a second
        run on the same values must not change the result.
        """

    def model_post_init(self, context: Any, /) -> None:
        """Call `__post_init__`, unless the state of the loading says otherwise."""
        state = current()
        if state is None or not state.skips_post_init:
            self.__post_init__()

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, ConfigModel) and data.is_sparse and not cls.is_sparse:
            values = field_values(data)
            if [*values] == ["class_type"]:
                # A document of the config would be read as this class.
                return handler(values)
        if isinstance(data, ConfigModel) and not isinstance(data, cls):
            # pydantic would rebuild another parametrization of a generic class from its fields,
            # without the fields of the subclass.
            if is_assignable(type(data), cls):
                return data  # type: ignore[return-value]  # see is_assignable
            if (converted := cls._converted(data)) is not None:
                return converted  # type: ignore[return-value]  # as above
            raise ValueError(f"expected {cls.__qualname__}, found {type(data).__qualname__}")
        state = current()
        if state is None or not isinstance(data, dict):
            if isinstance(data, dict) and not data.keys() <= cls.model_fields.keys():
                cls._refuse_with_remedy(data)
            return handler(data)
        if state.skips_parts and CONFIG_TYPE in data:  # fields of a class to import
            return cls.model_construct()
        target = cls._class_named_in(state, data)
        data = {key: value for key, value in data.items() if key != CONFIG_TYPE}
        if target is not cls:
            return target.model_validate(data)  # type: ignore[return-value]  # as above
        names = {field.alias or name: name for name, field in cls.model_fields.items()}
        names |= {name: name for name in cls.model_fields}
        is_strict = cls.model_config.get("extra") == "forbid"
        unknown = [key for key in data if key not in names] if is_strict else []
        known = {
            key: restore(state, cls.model_fields[names[key]].annotation, value, (key,))
            if key in names
            else value
            for key, value in data.items()
            if key not in unknown
        }
        if not unknown:
            return handler(known)
        others: list[ConfigError] = [
            cls._unknown_field(key, cls.remedy_for(key, data[key], "file"))
            for key in unknown[:MAX_PROBLEMS]
        ]
        try:
            handler(known)
        except ValidationError as error:
            found = config_error(error, known)
            others += [each for each in (found, *found.others) if each.path]
        first = others.pop(0)
        first.others = tuple(others)
        raise first

    @classmethod
    def _unknown_field(cls, name: str, remedy: str) -> ConfigError:
        return unknown_field(name, cls.model_fields, cls.__qualname__, remedy=remedy)

    @classmethod
    def _refuse_with_remedy(cls, data: dict[str, Any]) -> None:
        remedies = {
            name: cls.remedy_for(name, value, "python")
            for name, value in data.items()
            if name not in cls.model_fields
        }
        found = [cls._unknown_field(name, text) for name, text in remedies.items() if text]
        if found:
            found[0].others = tuple(found[1:])
            raise found[0]

    def __eq__(self, other: object) -> bool:
        """Return True for configs of equal class and field values."""
        if type(self) is not type(other) or not isinstance(other, ConfigModel):
            return NotImplemented
        return field_values(self) == field_values(other)


def field_values(model: BaseModel) -> dict[str, Any]:
    """Return field values by name, in the order of declaration, without copies.

    A sparse config has only the fields and extra arguments that were set.
    """
    values = {name: getattr(model, name) for name in type(model).model_fields}
    if isinstance(model, ConfigModel) and model.is_sparse:
        values = {name: v for name, v in values.items() if name in model.model_fields_set}
        values |= model.model_extra or {}
    return values


def encode(config: ConfigModel, *, for_toml: bool = False) -> dict[str, Plain]:
    """Serialize a config to plain data and verify that it round-trips.

    Args:
        config: Config to serialize.
        for_toml: Omit fields that are None by default, and put plain values before tables: TOML
            has no null, and no values after tables.

    Raises:
        ConfigSaveError: With the path of a value that would not be restored exactly.
    """
    encoder = _Encoder(for_toml=for_toml)
    document = encoder.config(config, type(config), ())
    _check_writable(document)
    _verify(config, document, encoder.code)
    return document


def encode_value(value: Any, annotation: Any) -> Plain:
    """Serialize a value of a field, without verification."""
    return _check_writable(_Encoder(for_toml=False).value(value, annotation, ()))


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
        # Subclasses, such as NumPy's float64, are written as the builtin type.
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
            # Sets have another order in each process; their documents must not.
            return sorted(items, key=json.dumps) if isinstance(value, set | frozenset) else items
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            return self._reference(value, path)
        leaf: Plain = self._leaf(value, path)
        return leaf

    def _mapping(self, mapping: Mapping[Any, Any], annotation: Any, path: Path) -> Plain:
        document: dict[str, Plain] = {}
        for key, value in mapping.items():
            # pydantic converts keys such as numbers, paths and enum members to text.
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
            if hasattr(type(value), "__get_pydantic_core_schema__"):
                return TypeAdapter(type(value)).dump_python(value, mode="json")
            return to_jsonable_python(value)
        except ValueError as error:  # pydantic's, or a lone surrogate
            raise ConfigSaveError(f"no document can hold {describe(value)}", path) from error


def _is_named_by_class(config: ConfigModel, admitted: list[Any]) -> bool:
    """Return True if ``class_type`` alone leads to this config's class when a file is read."""
    cls = getattr(config, "class_type", None)
    if cls is None or find_config_class(cls) is not type(config):
        return False

    def requires_class(kind: Any) -> bool:
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        field = kind.model_fields.get("class_type") if is_model else None
        return field is not None and field.is_required()

    return any(kind is Any or requires_class(kind) for kind in admitted)


def _has_serializer(cls: type[BaseModel], name: str) -> bool:
    """Return True if the user declared a serializer for the field or for a type within."""
    decorators = getattr(cls, "__pydantic_decorators__", None)
    declared = getattr(decorators, "field_serializers", {}).values()
    if any({name, "*"}.intersection(decorator.info.fields) for decorator in declared):
        return True
    field = cls.model_fields[name]
    remaining: list[Any] = [field.annotation, *field.metadata]
    while remaining:
        item = remaining.pop()
        if isinstance(item, PlainSerializer | WrapSerializer):
            return True
        remaining += [*getattr(item, "__metadata__", ()), *get_args(item)]
    return False


def _check_writable(document: Plain) -> Plain:
    try:
        return check_plain(document)
    except ConfigSyntaxError as error:
        raise ConfigSaveError(error.problem, error.path) from error


def _verify(config: ConfigModel, document: dict[str, Plain], code: dict[Code, Path]) -> None:
    """Load the document, without trust or imports, and compare the configs."""
    cls = type(config)

    def is_reachable(item: Code) -> bool:
        with suppress(ConfigReferenceError, KeyError):
            module = sys.modules[item.__module__]
            return find_in_module(module, item.__qualname__, reference_to(item)) is item
        return False

    hidden = {item: path for item, path in code.items() if not is_reachable(item)}
    for item in hidden.keys() - set(declared_code(cls) if hidden else ()):
        raise ConfigSaveError(
            f"{reference_to(item)!r} can't be found by its name; define it at the top of "
            "a module, or declare it as the field's type or default",
            hidden[item],
        )
    try:
        with loading(
            Loading(cls, Trust(frozenset()), known=code.keys() - hidden.keys(), verifying=True)
        ):
            loaded = cls.model_validate(document)
    except ValidationError as error:
        problem = config_error(error, document)
        raise ConfigSaveError(f"would not be restored: {problem.problem}", problem.path) from error
    difference = _difference(config, loaded, ())
    if difference is not None:
        raise ConfigSaveError(
            "the declared type would not restore this value exactly; declare it more precisely",
            difference,
        )


def _difference(left: Any, right: Any, path: Path) -> Path | None:
    """Return the path of the first difference in type or content, or None."""
    is_base = type(right) in (int, float, str) and not isinstance(left, bool | Enum)
    # A subclass, like NumPy's float64, is restored as its builtin type.
    if type(left) is not type(right) and not (is_base and isinstance(left, type(right))):
        return path
    if isinstance(left, BaseModel):
        left, right = field_values(left), field_values(right)
    elif isinstance(left, list | tuple):
        left, right = dict(enumerate(left)), dict(enumerate(right))
    if isinstance(left, Mapping):
        if [(type(k), k) for k in left] != [(type(k), k) for k in right]:
            return path
        for key, value in left.items():
            name = key if isinstance(key, int) else str(key)
            if (found := _difference(value, right[key], (*path, name))) is not None:
                return found
        return None
    is_same = bool(left == right)
    if isinstance(left, float):
        is_same = float.hex(left) == float.hex(right)  # distinguishes -0.0 from 0.0
    elif isinstance(left, set | frozenset):
        is_same = {(type(i), i) for i in left} == {(type(i), i) for i in right}
    elif isinstance(left, datetime.datetime | datetime.time):
        # A ZoneInfo has no offset without a date, and a file holds no rules of time zones.
        zones = [zone and zone.utcoffset(None) for zone in (left.tzinfo, right.tzinfo)]
        is_same = is_same and zones[0] == zones[1]
    return None if is_same else path
