"""Configs of classes and functions that have none: their parameters become the fields.

The config of torch's SGD refuses an unknown name, or a text for a number, as one that someone has
declared does. What isn't given isn't kept: it stays whatever the class itself has as a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar, Self, TypeVar, cast, overload

from pydantic import create_model, model_validator

from robo_orchard_core.utils.config.base import Config
from robo_orchard_core.utils.config.building import built_arguments, call, hints_of, returned_class
from robo_orchard_core.utils.config.callable_config import CallableConfig
from robo_orchard_core.utils.config.class_config import ClassConfig
from robo_orchard_core.utils.config.errors import ConfigReferenceError
from robo_orchard_core.utils.config.kinds import declared_config_class
from robo_orchard_core.utils.config.loading import CONFIG_TYPE, current
from robo_orchard_core.utils.config.model import field_values
from robo_orchard_core.utils.config.parameter_types import UNDECLARED, field_annotation
from robo_orchard_core.utils.config.parts import Anything
from robo_orchard_core.utils.config.problems import as_declared, shown, unknown_field
from robo_orchard_core.utils.config.references import Code, reference_to
from robo_orchard_core.utils.config.restoring import restore

T = TypeVar("T")

BASES: dict[str, type[Config]] = {}
"""What configs of a class and its subclasses derive from, by its reference, where that is something
else than `ClassConfig`."""

_RESERVED = frozenset({CONFIG_TYPE, "class_type", "func"})


class DerivedConfig(Config):
    """What configs that are made of a signature have in common.

    Two of them are equal where they hold the same code and the same arguments. Documents hold the
    arguments that were given, and no others.
    """

    only_what_is_set: ClassVar[bool] = True
    several: ClassVar[str | None] = None
    """The parameter that takes any number of positional arguments, if there is one."""
    required: ClassVar[tuple[str, ...]] = ()
    """The parameters without a default, which whoever calls it may give as well."""
    makes: ClassVar[bool] = False
    """Of a function's: whether its return annotation names a class, so that it stands for one of
    its instances, as a class does."""
    declared: ClassVar[frozenset[str]] = frozenset()
    """Fields that are no arguments, but those of the declared class that this one belongs to."""
    made_of: ClassVar[tuple[Any, ...]] = ()
    """What this class was made of; no module has it by name, so it is pickled by that."""

    def arguments(self) -> dict[str, Any]:
        """The arguments that were given, by name; configs among them are not built."""
        no_arguments = self.declared | {"class_type", "func"}
        return {k: value for k, value in field_values(self).items() if k not in no_arguments}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the class or function returns; ``args`` and ``kwargs`` go before the arguments.

        Raises:
            ConfigBuildError: It doesn't take what it would get.
        """
        given = self.arguments()
        further = given.pop(self.several, ()) if self.several else ()
        return call(code_of(self), self, given, args, kwargs, further)

    def bound(self) -> Callable[..., Any]:
        """The class or function with the arguments, built now, for many calls of it."""
        code, given = code_of(self), self.arguments()
        further = given.pop(self.several, ()) if self.several else ()
        if further or not given.keys().isdisjoint(_only_by_position(code)):
            return self
        arguments = built_arguments(code, given)
        return partial(code, **arguments) if arguments else cast(Callable[..., Any], code)

    def __reduce__(self) -> Any:
        return _blank, type(self).made_of, self.__getstate__()

    def __repr_args__(self) -> Any:
        return [*field_values(self).items()]


class OpenDerivedConfig(DerivedConfig):
    """Of a signature that takes any keyword arguments, or some of names that no field can have."""

    __pydantic_extra__: dict[str, Anything]
    beside_fields: ClassVar[dict[str, Any]] = {}
    """How the parameters are declared whose names no field can have."""
    takes_any: ClassVar[bool] = True
    """Whether there may be any others."""

    @model_validator(mode="after")
    def _knows_what_is_beside_fields(self) -> Self:
        extra = self.__pydantic_extra__ or {}
        for name, value in extra.items():
            if (declared := self.beside_fields.get(name)) is not None:
                if (state := current()) is not None:
                    value = restore(state, declared, value, (name,))
                extra[name] = as_declared(name, value, declared)
            elif not self.takes_any:
                known = {**type(self).model_fields, **self.beside_fields}
                raise unknown_field(name, known, type(self).__qualname__)
        return self


def code_of(config: Config) -> Any:
    """The class or function that a config stands for."""
    return getattr(config, "class_type", None) or getattr(config, "func", None)


def function_of(value: Any) -> Callable[..., Any]:
    """What a field that is declared as `Function` holds, to be called.

    A config of a function is that with its arguments; one of a class an instance.
    """
    if not isinstance(value, Config):
        return cast(Callable[..., Any], value)
    function: Any = value
    if isinstance(value, DerivedConfig) and hasattr(value, "func"):
        return value.bound()
    return cast(Callable[..., Any], function() if hasattr(value, "class_type") else function)


@overload
def config_of(code: type[T], /, **arguments: Any) -> ClassConfig[T]: ...
@overload
def config_of(code: Callable[..., T], /, **arguments: Any) -> CallableConfig[T]: ...
def config_of(code: Callable[..., T], /, **arguments: Any) -> Any:
    """The config of a class or function with these arguments.

    For a class, it is of the config class that is declared beside it, or of one made of its
    constructor's signature; calling it makes an instance. For a function, calling it calls that.

    >>> from fractions import Fraction
    >>> half = config_of(Fraction, numerator=1, denominator=2)
    >>> half
    FractionConfig(class_type=<class 'fractions.Fraction'>, numerator=1, denominator=2)
    >>> half()
    Fraction(1, 2)

    Raises:
        ConfigReferenceError: It is nothing that a file could name, such as a ``functools.partial``.
        ValueError: pydantic's, where an argument is unknown or of another type.
    """
    if not isinstance(code, Code):
        raise ConfigReferenceError(
            f"expected a class or function that a file can name, found {shown(code)}; arguments "
            "are given beside it"
        )
    made: Any
    if isinstance(code, type):
        key, made = "class_type", config_class_of(code)
    else:
        key, made = "func", function_config_class(code)
    return made(**{key: code}, **arguments)


def config_class_of(cls: type, base: type[Config] | None = None) -> type[Config]:
    """The config class of a class: the one declared in its module, or one made of its signature.

    Args:
        cls: Any class.
        base: What the config class has to be a subclass of, by default what `BASES` says, or
            `ClassConfig`; its fields come first, and parameters of the same names are left to them.
    """
    if base is None:
        found = (BASES.get(reference_to(ancestor)) for ancestor in cls.__mro__)
        base = next(filter(None, found), ClassConfig)
    return cast(type[Config], declared_config_class(cls, base) or _derived(cls, base))


@cache
def _derived(cls: type, base: type[Config]) -> type[Config]:
    return _config_class(cls, f"{cls.__name__}Config", base, class_type=(type[cls], ...))


@cache
def function_config_class(function: Callable[..., Any]) -> type[Config]:
    """The config class of a function, made of its signature."""
    name = "".join(word.capitalize() for word in function.__name__.split("_"))
    field = (Callable[..., Any], ...)
    made: Any = _config_class(function, f"{name}Config", CallableConfig, func=field)
    made.makes = returned_class(function) is not None
    return cast(type[Config], made)


def _config_class(code: Any, name: str, base: type[Config], **fields: Any) -> type[Config]:
    """A subclass of ``base`` with a field for each parameter, behind the given ones."""
    declared = frozenset(base.model_fields) - fields.keys()
    several, takes_any = None, False
    required: list[str] = []
    beside_fields: dict[str, Any] = {}
    hints = hints_of(code)
    for parameter in parameters_of(code):
        name_, default = parameter.name, parameter.default
        hint = hints.get(name_, parameter.annotation)
        annotation = field_annotation(hint)
        if hint is parameter.empty:
            package = code.__module__.partition(".")[0]
            annotation = UNDECLARED.get((package, name_), annotation)
        annotation = base.parameter_declaration(annotation)
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
            continue
        if name_ in declared:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            several, annotation, default = name_, list[annotation], []  # type: ignore[valid-type]
        if default is parameter.empty:
            required.append(name_)
            default = None
        if _can_be_field(name_):
            fields[name_] = (annotation, default)
        else:
            beside_fields[name_] = annotation
    is_open = takes_any or beside_fields
    config_class: Any = create_model(
        name,
        __base__=(OpenDerivedConfig if is_open else DerivedConfig, base),
        __module__=code.__module__,
        __doc__=f"The parameters of {reference_to(code)}.",
        __cls_kwargs__={"extra": "allow" if is_open else "forbid", "validate_default": False},
        **fields,
    )
    config_class.several, config_class.declared = several, declared
    config_class.required = tuple(required)
    if is_open:
        config_class.beside_fields, config_class.takes_any = beside_fields, takes_any
    generic = base.__pydantic_generic_metadata__
    config_class.made_of = (code, generic["origin"] or base, generic["args"])
    return cast(type[Config], config_class)


def _blank(code: Any, base: type[Config], arguments: tuple[Any, ...]) -> Config:
    """A config that is being unpickled, before it has its values."""
    if isinstance(code, type):
        cls = _derived(code, base[arguments] if arguments else base)  # type: ignore[index]
    else:
        cls = function_config_class(code)
    return cls.__new__(cls)


def _can_be_field(name: str) -> bool:
    """Not where configs have something of that name, or pydantic none that begins like it."""
    return not name.startswith("_") and not hasattr(OpenDerivedConfig, name)


def _only_by_position(code: Any) -> list[str]:
    return [p.name for p in parameters_of(code) if p.kind is p.POSITIONAL_ONLY]


def parameters_of(code: Any) -> list[inspect.Parameter]:
    """The parameters of a function, or of a class's constructor.

    Raises:
        ConfigReferenceError: It doesn't say them, or has one of a name that documents need.
    """
    try:
        parameters = [*inspect.signature(code).parameters.values()]
    except (ValueError, TypeError) as error:
        problem = f"{reference_to(code)!r} doesn't say which parameters it has"
        raise ConfigReferenceError(problem) from error
    if taken := _RESERVED.intersection(parameter.name for parameter in parameters):
        problem = f"{reference_to(code)!r} has a parameter {min(taken)!r}, a word of documents"
        raise ConfigReferenceError(problem)
    return parameters
