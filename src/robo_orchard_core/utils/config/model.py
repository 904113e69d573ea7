"""The pydantic side of a config: validation, ``__post_init__``, equality."""

from __future__ import annotations

import collections.abc
from enum import Enum
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator

from robo_orchard_core.utils.config.errors import ConfigReferenceError, Path, unknown_field
from robo_orchard_core.utils.config.references import (
    CONFIG_TYPE,
    Loading,
    admitted_classes,
    current,
    is_assignable,
    is_collection,
    is_mapping,
    item_type,
    mapping_value_type,
    union_members,
)

# --- restoring -------------------------------------------------------------------------------
# The part of reading that pydantic can't do: code from references, enum union_members from text.
#
# A field's declaration is walked beside its value. What isn't declared as one of these is left to
# pydantic as it is.


def restore(state: Loading, annotation: Any, value: Any, path: Path) -> Any:
    """The value with code in the place of references, where the annotation declares code.

    Raises:
        ConfigReferenceError: A reference leads to nothing that is trusted and of that kind.
    """
    options = union_members(annotation)
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
        return state.resolve_class(value, admitted_classes(annotation), path)
    if origin is collections.abc.Callable and isinstance(value, str):
        return state.resolve_function(value, annotation, path)
    if origin is Literal and value not in get_args(annotation):
        return _listed(annotation, value)
    if isinstance(value, list) and is_collection(origin):
        items = [
            restore(state, item_type(annotation, i), item, (*path, i))
            for i, item in enumerate(value)
        ]
        return items if any(map(_differ, items, value)) else value
    if isinstance(value, dict) and is_mapping(origin):
        keys, inner = (get_args(annotation) or (Any,))[0], mapping_value_type(annotation)
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
    for kind in union_members(annotation):
        is_enum = isinstance(kind, type) and issubclass(kind, Enum)
        for choice in kind if is_enum else get_args(kind) if get_origin(kind) is Literal else ():
            if str(choice.value if isinstance(choice, Enum) else choice) == text:
                return choice
    return text


class ConfigModel(BaseModel):
    """Fields that are validated; `Config` adds the documents."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid",
        # An assignment is validated as construction is, field by field. Rules across fields
        # (__post_init__) are not repeated: two fields that depend on each other could never be
        # changed one after the other.
        validate_assignment=True,
        # `rate: float = 1` holds 1.0, as it does once it was written to a file and read.
        validate_default=True,
        allow_inf_nan=False,
        # Documents use the names of fields, whatever alias the constructor takes.
        populate_by_name=True,
        # `model_name` and its like are what training configs call their fields.
        protected_namespaces=(),
    )

    is_sparse: ClassVar[bool] = False
    """Whether it stands for the fields that were set alone, see `DerivedConfig`."""

    @classmethod
    def adapt_parameter(cls, declaration: Any) -> Any:
        """How a parameter of a class is declared in configs that derive from this one and the
        class's signature; by default, as it is there."""
        return declaration

    @classmethod
    def _class_named_in(cls, state: Loading, document: dict[str, Any]) -> type[BaseModel]:
        """The config class that a document names, where this one is declared."""
        if CONFIG_TYPE in document:
            return state.resolve_config_class(document[CONFIG_TYPE], cls, (CONFIG_TYPE,))
        return cls

    @classmethod
    def _converted(cls, config: ConfigModel) -> ConfigModel | None:
        """The same as a document of it would be read as, where this class is declared; None where
        it would be refused."""
        return None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.model_config.get("extra") != "forbid" and not cls.is_sparse:
            raise TypeError(f"{cls.__qualname__}: a Config refuses unknown fields; drop `extra`")
        if CONFIG_TYPE in cls.model_fields:
            raise TypeError(
                f"{cls.__qualname__}: the name {CONFIG_TYPE!r} is what documents call the class "
                "of a config; give the field another name"
            )

    def __post_init__(self) -> None:
        """Called when all fields are valid: the place for rules across fields.

        A ValueError raised here is reported like any other wrong value, with the place of this
        config. Fields may be assigned; the result has to stay the same when it runs again on
        what a file holds.
        """

    def model_post_init(self, context: Any, /) -> None:
        """Runs `__post_init__`, but for a config that is only compared with its document."""
        state = current()
        if state is None or not state.proving:
            self.__post_init__()

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, ConfigModel) and data.is_sparse and not cls.is_sparse:
            values = field_values(data)
            if [*values] == ["class_type"]:
                # It says no more than this class can: a document couldn't tell the two.
                return handler(values)
        if isinstance(data, ConfigModel) and not isinstance(data, cls):
            # Pydantic would rebuild another parametrization of a generic class from its fields,
            # and so forget what the subclass adds.
            if is_assignable(type(data), cls):
                return data  # type: ignore[return-value]  # it stands for cls, see is_assignable
            if (remade := cls._converted(data)) is not None:
                return remade  # type: ignore[return-value]  # it stands for cls as well
            raise ValueError(f"expected {cls.__qualname__}, found {type(data).__qualname__}")
        state = current()
        if state is None or not isinstance(data, dict):
            return handler(data)
        target = cls._class_named_in(state, data)
        data = {key: value for key, value in data.items() if key != CONFIG_TYPE}
        if target is not cls:
            return target.model_validate(data)  # type: ignore[return-value]  # see is_assignable
        names = {field.alias or name: name for name, field in cls.model_fields.items()}
        names |= {name: name for name in cls.model_fields}
        for key in data if cls.model_config.get("extra") == "forbid" else ():
            if key not in names:
                raise unknown_field(key, cls.model_fields, cls.__qualname__)
        return handler(
            {
                key: restore(state, cls.model_fields[names[key]].annotation, value, (key,))
                if key in names
                else value
                for key, value in data.items()
            }
        )

    def __eq__(self, other: object) -> bool:
        """Same class, same values; what isn't a field doesn't count."""
        if type(self) is not type(other) or not isinstance(other, ConfigModel):
            return NotImplemented
        return field_values(self) == field_values(other)


def field_values(model: BaseModel) -> dict[str, Any]:
    """The fields by name, in the order of declaration; the values themselves, not copies.

    Of a config that stands for what was set alone, these fields, and the arguments beside them.
    """
    values = {name: getattr(model, name) for name in type(model).model_fields}
    if isinstance(model, ConfigModel) and model.is_sparse:
        values = {name: v for name, v in values.items() if name in model.model_fields_set}
        values |= model.__pydantic_extra__ or {}
    return values
