"""Questions about declared types: what may stand where, and which code a declaration names."""

from __future__ import annotations

import collections.abc
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from robo_orchard_core.utils.config.references import Code


def bare(annotation: Any) -> Any:
    """The annotation without ``Annotated``; a type variable stands for its bound.

    >>> bare(Annotated[int, "metadata"])
    <class 'int'>
    """
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif isinstance(annotation, TypeVar):
            annotation = annotation.__bound__ or Any
        elif hasattr(annotation, "__value__"):  # an alias made by a `type` statement
            annotation = annotation.__value__
        else:
            return annotation


def members(annotation: Any) -> tuple[Any, ...]:
    """What a union consists of; any other annotation is its own only member.

    >>> members(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    annotation = bare(annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    return tuple(inner for arg in get_args(annotation) for inner in members(arg))


def item_annotation(annotation: Any, index: int) -> Any:
    """How the item of a list, tuple or set is declared; Any where nothing says it."""
    for member in members(annotation):
        args, origin = get_args(member), get_origin(member)
        if origin is tuple and args and args[-1] is not Ellipsis:
            return args[index] if index < len(args) else Any
        if args and is_collection(origin):
            return args[0]
    return Any


def value_annotation(annotation: Any) -> Any:
    """How the value of a mapping is declared; Any where nothing says it."""
    for member in members(annotation):
        if is_mapping(origin := get_origin(member)) and len(args := get_args(member)) == 2:
            return args[1] if origin is not collections.Counter else int
    return Any


def is_mapping(origin: Any) -> bool:
    """Whether it is a mapping type."""
    return isinstance(origin, type) and issubclass(origin, Mapping)


def is_collection(origin: Any) -> bool:
    """Whether it is a type of lists, tuples or sets."""
    return (
        isinstance(origin, type)
        and issubclass(origin, collections.abc.Iterable)
        and not issubclass(origin, Mapping | str | bytes | type)
        and origin is not collections.abc.Callable
    )


def class_kinds(annotation: Any) -> tuple[type, ...]:
    """The classes that ``type[...]`` admits, each with its subclasses.

    >>> class_kinds(type[int | str])
    (<class 'int'>, <class 'str'>)
    """
    args = get_args(annotation)
    kinds = members(args[0]) if args else (object,)
    return tuple(k if isinstance(k, type) and k is not Any else object for k in kinds)


def is_kind(cls: type, kind: type) -> bool:
    """Whether instances of ``cls`` may stand where ``kind`` is declared.

    Beyond ``issubclass``, a generic config counts as covariant: ``ClassConfig[MyHook]`` may stand
    for ``ClassConfig[Hook]``, which pydantic's classes don't know of each other.
    """
    if issubclass(cls, kind):
        return True
    origin, wanted = _parametrization(kind)
    if origin is None or not issubclass(cls, origin):
        return False
    arguments: dict[Any, Any] = {}
    for base in cls.__mro__:
        base_origin, args = _parametrization(base)
        if base_origin is not None:
            for parameter, arg in zip(_parameters(base_origin), args, strict=True):
                arguments.setdefault(parameter, arguments.get(arg, arg))
    given = [arguments.get(parameter) for parameter in _parameters(origin)]
    return all(map(_is_argument, given, wanted))


def _parametrization(cls: type) -> tuple[type | None, tuple[Any, ...]]:
    metadata = getattr(cls, "__pydantic_generic_metadata__", None)
    return (metadata["origin"], metadata["args"]) if metadata else (None, ())


def _parameters(origin: type) -> tuple[Any, ...]:
    parameters: tuple[Any, ...] = origin.__pydantic_generic_metadata__["parameters"]  # type: ignore[attr-defined]  # of pydantic's generic models
    return parameters


def _is_argument(given: Any, wanted: Any) -> bool:
    given, wanted = bare(given), bare(wanted)
    if wanted is Any:  # which is a class since Python 3.11
        return True
    if isinstance(given, type) and isinstance(wanted, type):
        return is_kind(given, wanted)
    return bool(given == wanted)


def declared_config_class(cls: type, base: type[BaseModel] = BaseModel) -> type[BaseModel] | None:
    """The config class whose ``class_type`` is this class by default, from the class's own module;
    of several, the one that is named like it."""
    origin, _ = _parametrization(base)
    found = [
        config
        for config in vars(sys.modules.get(cls.__module__, object)).values()
        if isinstance(config, type)
        and issubclass(config, BaseModel)
        and issubclass(config, origin or base)
        and config.__module__ == cls.__module__
        and "class_type" in config.model_fields
        and config.model_fields["class_type"].default is cls
    ]
    return min(found, key=lambda c: c.__name__ != f"{cls.__name__}Config", default=None)


def declared_code(model: type[BaseModel]) -> Iterator[Code]:
    """Every class and function that a config class declares, at whatever depth.

    These are the arguments of ``type[...]``, the config classes among the field types, and what
    the fields' defaults hold. All of it was imported when the config class was.
    """
    seen: set[Any] = set()
    waiting: list[Any] = [model]
    while waiting:
        found = waiting.pop()
        if isinstance(found, BaseModel):
            waiting += [type(found), *(getattr(found, name) for name in type(found).model_fields)]
        elif isinstance(found, Mapping):
            waiting += found.values()
        elif isinstance(found, list | tuple | set | frozenset):
            waiting += found
        elif get_origin(found) is not None or isinstance(found, TypeVar):
            waiting += [a for a in (bare(found), *get_args(found)) if a is not found]
        elif isinstance(found, Code) and found not in seen:
            seen.add(found)
            yield found
            if isinstance(found, type) and issubclass(found, BaseModel):
                for field in found.model_fields.values():
                    waiting += [field.annotation, default_of(field)]


def default_of(field: FieldInfo) -> Any:
    """A field's default, also one that a factory makes; PydanticUndefined where there is none."""
    if field.default_factory_takes_validated_data:
        return PydanticUndefined
    try:
        return field.get_default(call_default_factory=True)
    except Exception:  # of the user's factory; it comes up again where its value is needed
        return PydanticUndefined
