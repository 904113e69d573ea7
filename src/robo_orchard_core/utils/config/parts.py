"""Fields for parts: what a document describes and a run is built of.

In a document, a part is a mapping with ``class_type`` (a class; the other keys are parameters of
its constructor, or fields of the config class that is declared beside it), with ``func`` (a
function and keyword arguments for it), or with ``config_type`` (as configs write themselves).
"""

from __future__ import annotations

import collections.abc
import datetime
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property, partial
from pathlib import PurePath
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    overload,
)

from pydantic import (
    BaseModel,
    GetCoreSchemaHandler,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from robo_orchard_core.utils.config.class_config import (
    CallableConfig,
    ClassConfig,
    build_arguments,
    call,
    returned_class,
    type_hints,
)
from robo_orchard_core.utils.config.config import Config
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigReferenceError,
    config_error,
    describe,
    unknown_field,
    validate_value,
)
from robo_orchard_core.utils.config.model import ConfigModel, field_values, restore
from robo_orchard_core.utils.config.references import (
    CONFIG_TYPE,
    Code,
    Loading,
    bare,
    current,
    find_config_class,
    is_assignable,
    is_collection,
    is_mapping,
    reference_to,
    union_members,
)

# --- parts -----------------------------------------------------------------------------------


PART_KEYS = ("class_type", "func", CONFIG_TYPE)
"""The keys of which a mapping has one if it is a part; their values say of which code it is."""


def is_part(data: object) -> bool:
    """Whether a value of a document is a part."""
    return isinstance(data, dict) and any(key in data for key in PART_KEYS)


@dataclass(frozen=True)
class Part:
    """What stands in ``Annotated`` for a field that takes configs of instances of some classes.

    >>> from robo_orchard_core.utils.config import Config
    >>> class Scale(Config):
    ...     factor: Annotated[Any, Part("fractions:Fraction")]
    >>> scale = Scale.from_str(
    ...     '{"factor": {"class_type": "fractions:Fraction", "numerator": 3}}', trust="fractions"
    ... )
    >>> scale.factor()
    Fraction(3, 1)

    Attributes:
        kinds: The classes, one or several. A reference (``"torch.nn.modules.module:Module"``) is
            imported when a value is validated.
        functions: What a function is there for: to ``make`` an instance, which its return
            annotation has to say, or to be called as it is, with further arguments.
        given: Parameters that whoever makes it has arguments for.
    """

    kinds: type | str | tuple[type | str, ...]
    functions: Literal["make", "are called"] = "make"
    given: tuple[str, ...] = ()

    @cached_property
    def classes(self) -> tuple[type, ...]:
        """The kinds, imported.

        Raises:
            ConfigReferenceError: One is of a package that isn't installed.
        """
        kinds = self.kinds if isinstance(self.kinds, tuple) else (self.kinds,)
        try:
            return tuple(map(_imported, kinds))
        except ImportError as error:
            raise ConfigReferenceError(f"needs a package that isn't installed: {error}") from error

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validated)

    def validated(self, data: Any) -> ConfigModel:
        """The config; made of a mapping where a document is being loaded.

        Raises:
            ValueError: It is no part of this kind; a `ConfigReferenceError` where that is found
                out by what it names.
        """
        state = current()
        if state is not None and isinstance(data, dict):
            data = self._loaded(state, data)
        if not isinstance(data, ConfigModel):
            wanted = self._wanted() if state else f"{self._named()}: a config, as of config_of()"
            raise ValueError(f"expected {wanted}, found {describe(data)}")
        config = self._of_own_class(data)
        self._check(config)
        if self.functions == "make" or not hasattr(config, "func"):
            self._check_is_complete(config)
        return config

    def _of_own_class(self, config: ConfigModel) -> ConfigModel:
        """The same, of the class that a document of it would be read as."""

        cls, values = getattr(config, "class_type", None), field_values(config)
        if cls is None or not (config.is_sparse or [*values] == ["class_type"]):
            return config
        own = config_class_of(cls)
        remade = config if type(config) is own else own(**values)
        assert isinstance(remade, ConfigModel)
        return remade

    def _loaded(self, state: Loading, data: dict[str, Any]) -> ConfigModel:

        named = [key for key in PART_KEYS if key in data]
        if not named:
            raise ValueError(f"expected {self._wanted()}, found the keys {', '.join(data)!r}")
        if CONFIG_TYPE in named:
            target: Any = state.resolve_config_class(data[CONFIG_TYPE], ConfigModel, (CONFIG_TYPE,))
            self._check_config_class(state, target, data)
        elif len(named) == 2:
            raise ValueError("expected one of 'class_type' and 'func', found both")
        elif not isinstance(data[named[0]], str):
            raise ConfigReferenceError(
                f"expected a name like 'package.module:Name', found {describe(data[named[0]])}",
                (named[0],),
            )
        elif named == ["class_type"]:
            found = state.resolve_class(data["class_type"], self.classes, ("class_type",))
            target = config_class_of(found)
        else:
            function = state.resolve_function(data["func"], Callable, ("func",))
            target = function_config_class(function)
        loaded = target.model_validate({k: v for k, v in data.items() if k != CONFIG_TYPE})
        assert isinstance(loaded, ConfigModel)
        return loaded

    def _check_config_class(
        self, state: Loading, target: type[ConfigModel], data: dict[str, Any]
    ) -> None:
        """That its configs are parts of this kind, ahead of making one, which may do anything."""
        field = target.model_fields.get("class_type")
        if field is None and "func" not in target.model_fields:
            raise ValueError(f"expected {self._wanted()}, found a {target.__qualname__}")
        named = data.get("class_type")
        if field is not None and isinstance(named, str):
            state.resolve_class(named, self.classes, ("class_type",))
        elif field is not None and isinstance(field.default, type):
            self._check_class(field.default)

    def _check_class(self, cls: type) -> None:
        if not any(is_assignable(cls, kind) for kind in self.classes):
            problem = f"expected {self._names()}, found {reference_to(cls)!r}"
            raise ConfigReferenceError(problem, ("class_type",))
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(vars(cls)["__abstractmethods__"]))
            raise ConfigReferenceError(
                f"{reference_to(cls)!r} is abstract, without {missing}; name a class that has all",
                ("class_type",),
            )

    def _check(self, config: ConfigModel) -> None:
        """That what it builds is of one of the kinds; nothing is called for it."""
        if (cls := getattr(config, "class_type", None)) is not None:
            self._check_class(cls)
        elif (function := getattr(config, "func", None)) is None:
            raise ValueError(f"expected {self._wanted()}, found a {type(config).__qualname__}")
        elif self.functions == "make" and self.classes != (object,):
            self._check_result(function)

    def _check_is_complete(self, config: ConfigModel) -> None:
        values = field_values(config)
        for name in self.given:
            if name in values and getattr(config, "is_sparse", False):
                raise ConfigFieldError("is given when it is built; leave it out", (name,))
        for name in getattr(config, "required", ()):
            if name not in values and name not in self.given:
                raise ConfigFieldError("a value is required here and none is given", (name,))

    def _check_result(self, function: Any) -> None:
        from robo_orchard_core.utils.config.class_config import returned_class

        result = returned_class(function)
        if result is None or not any(is_assignable(result, kind) for kind in self.classes):
            says = "none" if result is None else repr(reference_to(result))
            raise ConfigReferenceError(
                f"expected a function that returns {self._names()} by its return annotation; "
                f"that of {reference_to(function)!r} names {says}",
                ("func",),
            )

    def _names(self) -> str:
        return " or ".join(f"a {kind.__qualname__}" for kind in self.classes)

    def _named(self) -> str:
        return "something" if self.classes == (object,) else self._names()

    def _wanted(self) -> str:
        return f"{self._named()}: a mapping with 'class_type' or 'func'"


@dataclass(frozen=True)
class FieldsOf:
    """What stands in ``Annotated`` for a field of a config class that is imported when a value is
    validated; documents hold its fields.

    >>> from robo_orchard_core.utils.config import Config
    >>> class Run(Config):
    ...     more: Annotated[Any, FieldsOf("robo_orchard_core.utils.config.config:Config")] = {}
    >>> Run().more
    Config()
    """

    reference: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validated)

    @cached_property
    def config_class(self) -> type[ConfigModel]:
        """The class, imported."""
        return _imported(self.reference)

    def validated(self, data: Any) -> ConfigModel:
        """A config of this class.

        Raises:
            ValueError: pydantic's, where it has no such fields.
        """
        return self.config_class.model_validate(data)


def _imported(code: type | str) -> type:
    """A class from its reference, which is one of ours."""
    if isinstance(code, type):
        return code
    module, _, name = code.partition(":")
    try:
        found: type = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise ConfigReferenceError(f"this needs the package {package!r}; install it") from error
    return found


class _Anything:
    """Plain data, with parts anywhere in it."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validated)

    def validated(self, data: Any) -> Any:
        if current() is None:
            return data
        if is_part(data):
            return _ANY_PART.validated(data)
        if isinstance(data, dict):
            return {key: _at(key, self.validated, value) for key, value in data.items()}
        if isinstance(data, list):
            return [_at(index, self.validated, item) for index, item in enumerate(data)]
        return data


def _at(key: str | int, validated: Callable[[Any], Any], value: Any) -> Any:
    """What it makes of the value; errors say where in its holder that is."""
    try:
        return validated(value)
    except ValidationError as error:
        raise config_error(error, value).under((key,)) from error
    except ConfigError as error:
        raise error.under((key,)) from error.__cause__
    except ValueError as error:
        raise ConfigFieldError(str(error), (key,)) from error


class _Function(_Anything):
    """A function or class by its name, or a part that is or makes something to call."""

    def validated(self, data: Any) -> Any:
        state = current()
        if state is not None and isinstance(data, str):
            return state.resolve_code(data)
        if is_part(data) or callable(data):
            return super().validated(data)
        raise ValueError(
            f"expected a function: its name, like 'package.module:name', or a mapping with 'func' "
            f"or 'class_type'; found {describe(data)}"
        )


_ANY_PART = Part(object, functions="are called")
Anything = Annotated[Any, _Anything()]
Function = Annotated[Any, _Function()]


# --- parameter types -------------------------------------------------------------------------
# From how a constructor declares its parameters to how fields for them are declared.
#
# What has a plain form stays as it is. A class that has none stands for a part: a mapping in the
# document that says what to make. What isn't declared takes plain data, with parts anywhere in it.


_PLAIN = (
    *(int, float, str, bool, PurePath, Enum),
    *(datetime.date, datetime.time, datetime.timedelta, BaseModel),
)

FIELD_TYPES: dict[str, Any] = {
    "numbers:Number": int | float,
    "numbers:Real": int | float,
    "numbers:Integral": int,
}
"""How fields are declared for instances of a class, by its reference, where they are something
else than parts of this kind: texts for the data types of tensors, None for what no document holds,
such as tensors."""


UNTYPED_PARAMETERS: dict[tuple[str, str], Any] = {}
"""How fields are declared for parameters that say nothing of their type, by the name of the package
that has them and their own."""


def field_annotation(hint: Any) -> Any:
    """The declaration of a field for a parameter that is declared as ``hint``.

    What stands in ``Annotated`` counts for the field as well.

    >>> field_annotation(float | None)
    typing.Optional[float]
    >>> field_annotation(Annotated[float, "in metres"])
    typing.Annotated[float, 'in metres']
    """
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        annotation: Any = Annotated[(field_annotation(inner), *marks)]
    else:
        annotation = _converted(hint)
    try:
        TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return Anything if get_origin(hint) is not Annotated else field_annotation(bare(hint))
    return Anything if annotation is None else annotation


def _converted(hint: Any) -> Any:
    """The same; None for what no document holds."""
    hint = bare(hint)
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None) or origin is Literal or origin is type:
        return hint
    if len(options := union_members(hint)) > 1:
        admitted = [c for c in map(_converted, options) if c is not None]
        return Union[tuple(admitted)] if admitted else None  # noqa: UP007 - made at run time
    if hint is collections.abc.Callable or origin is collections.abc.Callable:
        return Function
    kind = origin or hint
    if not isinstance(kind, type) or kind in (Any, object, inspect.Parameter.empty):
        return Anything
    if (reference := reference_to(kind)) in FIELD_TYPES:
        return FIELD_TYPES[reference]
    if issubclass(kind, Enum) and not all(isinstance(m.value, int | str | float) for m in kind):
        return Anything  # what takes such a member takes its name, too
    if issubclass(kind, _PLAIN):
        return kind
    if kind is tuple and args and args[-1] is not Ellipsis:
        return tuple.__class_getitem__(tuple(_inner(arg) for arg in args))
    if is_mapping(kind):
        inner = _inner(args[1] if len(args) == 2 else Any)
        return dict[str, inner]  # type: ignore[valid-type]
    if kind is tuple:
        return tuple.__class_getitem__((_inner(args[0] if args else Any), ...))
    if is_collection(kind) and kind.__module__ in ("builtins", "collections.abc"):
        inner = _inner(args[0] if args else Any)
        return list[inner]  # type: ignore[valid-type]
    return Annotated[Any, Part(kind)]


def _inner(hint: Any) -> Any:
    inner = _converted(hint)
    return Anything if inner is None else inner


# --- derived ---------------------------------------------------------------------------------
# Configs of classes and functions that have none: their parameters become the fields.
#
# The config of torch's SGD refuses an unknown name, or a text for a number, as one that someone has
# declared does. What isn't given isn't kept: it stays whatever the class itself has as a default.


T = TypeVar("T")

CONFIG_BASES: dict[str, type[Config]] = {}
"""What configs of a class and its subclasses derive from, by its reference, where that is something
else than `ClassConfig`."""

_RESERVED = frozenset({CONFIG_TYPE, "class_type", "func"})


class DerivedConfig(Config):
    """What configs that are made of a signature have in common.

    Two of them are equal where they hold the same code and the same arguments. Documents hold the
    arguments that were given, and no others.
    """

    is_sparse: ClassVar[bool] = True
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
        arguments = build_arguments(code, given)
        return partial(code, **arguments) if arguments else cast("Callable[..., Any]", code)

    def __reduce__(self) -> Any:
        return _blank, type(self).made_of, self.__getstate__()

    def __repr_args__(self) -> Any:
        return [*field_values(self).items()]


class OpenDerivedConfig(DerivedConfig):
    """Of a signature that takes any keyword arguments, or some of names that no field can have."""

    __pydantic_extra__: dict[str, Anything]
    extra_parameters: ClassVar[dict[str, Any]] = {}
    """How the parameters are declared whose names no field can have."""
    accepts_any: ClassVar[bool] = True
    """Whether there may be any others."""

    @model_validator(mode="after")
    def _knows_what_is_beside_fields(self) -> Self:
        extra = self.__pydantic_extra__ or {}
        for name, value in extra.items():
            if (declared := self.extra_parameters.get(name)) is not None:
                if (state := current()) is not None:
                    value = restore(state, declared, value, (name,))
                extra[name] = validate_value(name, value, declared)
            elif not self.accepts_any:
                known = {**type(self).model_fields, **self.extra_parameters}
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
        return cast("Callable[..., Any]", value)
    function: Any = value
    if isinstance(value, DerivedConfig) and hasattr(value, "func"):
        return value.bound()
    return cast("Callable[..., Any]", function() if hasattr(value, "class_type") else function)


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
            f"expected a class or function that a file can name, found {describe(code)}; arguments "
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
        base: What the config class has to be a subclass of, by default what `CONFIG_BASES` says, or
            `ClassConfig`; its fields come first, and parameters of the same names are left to them.
    """
    if base is None:
        found = (CONFIG_BASES.get(reference_to(ancestor)) for ancestor in cls.__mro__)
        base = next(filter(None, found), ClassConfig)
    return cast("type[Config]", find_config_class(cls, base) or _derived(cls, base))


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
    return cast("type[Config]", made)


def _config_class(code: Any, name: str, base: type[Config], **fields: Any) -> type[Config]:
    """A subclass of ``base`` with a field for each parameter, behind the given ones."""
    declared = frozenset(base.model_fields) - fields.keys()
    several, accepts_any = None, False
    required: list[str] = []
    extra_parameters: dict[str, Any] = {}
    hints = type_hints(code)
    for parameter in parameters_of(code):
        name_, default = parameter.name, parameter.default
        hint = hints.get(name_, parameter.annotation)
        annotation = field_annotation(hint)
        if hint is parameter.empty:
            package = code.__module__.partition(".")[0]
            annotation = UNTYPED_PARAMETERS.get((package, name_), annotation)
        annotation = base.adapt_parameter(annotation)
        if parameter.kind is parameter.VAR_KEYWORD:
            accepts_any = True
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
            extra_parameters[name_] = annotation
    is_open = accepts_any or extra_parameters
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
        config_class.extra_parameters, config_class.accepts_any = extra_parameters, accepts_any
    generic = base.__pydantic_generic_metadata__
    config_class.made_of = (code, generic["origin"] or base, generic["args"])
    return cast("type[Config]", config_class)


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
