"""Parts: classes and functions in a document, from which a run is built.

A part is a mapping with one of three keys: ``class_type`` or ``func``, whose other keys are the
arguments, or the fields of a declared config; or ``config_type``, whose other keys are the fields.
A class or function without a declared config class gets one derived from its signature, so that
unknown names and wrong types are refused for torch's SGD as for the project's own classes.
"""

from __future__ import annotations

import collections.abc
import datetime
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
    Generic,
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
    ConfigDict,
    GetCoreSchemaHandler,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from robo_orchard_core.utils.config.build import (
    CallableConfig,
    DerivedConfig,
    build,
    import_class,
    parameters_of,
    returned_class,
    type_hints,
)
from robo_orchard_core.utils.config.config import Config
from robo_orchard_core.utils.config.errors import (
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
    admitted_classes,
    current,
    find_config_class,
    is_assignable,
    is_collection,
    is_mapping,
    parametrization,
    reference_to,
    strip_annotated,
    union_members,
)

T = TypeVar("T")
# Covariant: a config of MyHook is valid where a config of Hook is declared.
T_co = TypeVar("T_co", covariant=True)

PART_KEYS = ("class_type", "func", CONFIG_TYPE)
"""Keys that mark a mapping as a part; their values name the code."""

CONFIG_BASES: dict[str, type[Config]] = {}
"""Base of derived configs by reference of a class, for its subclasses too; else `ClassConfig`."""

FUNCTION_BASES: dict[str, type[Config]] = {}
"""Base of derived configs of functions by the kind of a `Part`; else `CallableConfig`."""

STAND_INS: list[Callable[[Any, Any], bool]] = []
"""Functions of a value and of a parameter's type, True for plain data that a program replaces by a
value of the type before the code is called. Such data is not validated against the type."""


class StandIns:
    """Marker for the parameters of derived configs, which admit `STAND_INS`."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        validator = partial(self.validated, source)
        return core_schema.no_info_wrap_validator_function(validator, handler(source))

    def validated(self, declared: Any, value: Any, validate: Callable[[Any], Any]) -> Any:
        """Return a stand-in for a value of the declared type, or a value of the type."""
        is_stand_in = any(accepts(value, declared) for accepts in STAND_INS)
        return value if is_stand_in else validate(value)


class ClassConfig(Config, Generic[T_co]):
    """Config of a class: ``class_type`` names the class, fields are constructor parameters.

    >>> class Timer:
    ...     def __init__(self, interval_s: float) -> None:
    ...         self.interval_s = interval_s
    >>> class TimerConfig(ClassConfig[Timer]):
    ...     class_type: type[Timer] = Timer
    ...     interval_s: float = 0.5
    >>> TimerConfig(interval_s=2)().interval_s
    2.0

    A class whose constructor accepts a config receives this config. Such a parameter is the first
    or required, and either declared as a class of this config, or undeclared and named ``cfg`` or
    ``config``. Any other class receives the fields as keyword arguments. Nested configs are built
    first, unless the parameter is declared as a config.

    Attributes:
        class_type: The class, or a subclass of the declared class.
    """

    class_type: type[T_co]

    @classmethod
    def _class_named_in(cls, state: Loading, document: dict[str, Any]) -> type[BaseModel]:
        """Return the config class of the named class if this config has no default class."""
        reference = document.get("class_type")
        if (
            CONFIG_TYPE in document
            or not isinstance(reference, str)
            or not cls.model_fields["class_type"].is_required()
            or cls.is_sparse
        ):
            return super()._class_named_in(state, document)
        kinds = admitted_classes(cls.model_fields["class_type"].annotation)
        named = state.resolve_class(reference, kinds, ("class_type",))
        if document.keys() <= cls.model_fields.keys():  # may be a config of this very class
            return find_config_class(named, cls) or cls
        return config_class_of(named, cls)

    @classmethod
    def _converted(cls, config: ConfigModel) -> ConfigModel | None:
        field = cls.model_fields["class_type"]
        named: Any = getattr(config, "class_type", None)
        if named is None or not config.is_sparse or not field.is_required():
            return None
        if not any(is_assignable(named, kind) for kind in admitted_classes(field.annotation)):
            return None
        return config_class_of(named, cls)(**field_values(config))

    def __call__(self, *args: Any, **kwargs: Any) -> T_co:
        """Return a new instance.

        Args:
            *args: Passed to the class, after the config if the class accepts one.
            **kwargs: Passed to the class instead of fields of the same name. For a class that
                accepts a config, names of fields change the config.

        Raises:
            ConfigBuildError: The arguments don't match the constructor.
        """
        return build(self, self.class_type, args, kwargs)


def is_part(data: object) -> bool:
    """Return True if a value of a document is a part."""
    return isinstance(data, dict) and any(key in data for key in PART_KEYS)


@dataclass(frozen=True)
class Part:
    """Marker for a field that holds a config of an instance of some classes.

    >>> from robo_orchard_core.utils.config import Config
    >>> class Scale(Config):
    ...     factor: Annotated[Any, Part("fractions:Fraction")]
    >>> scale = Scale.from_str(
    ...     '{"factor": {"class_type": "fractions:Fraction", "numerator": 3}}', trust="fractions"
    ... )
    >>> scale.factor()
    Fraction(3, 1)

    Attributes:
        kinds: Admitted classes. A reference (``"torch.nn.modules.module:Module"``) is imported at
            the first validation.
        functions: Use of functions: ``make`` an instance, as declared by the return annotation, or
            ``call`` the function itself with further arguments.
        given: Parameters that the caller supplies.
        unannotated: Admit functions without a return annotation that have all ``given`` parameters;
            the caller checks the result.
    """

    kinds: type | str | tuple[type | str, ...]
    functions: Literal["make", "call"] = "make"
    given: tuple[str, ...] = ()
    unannotated: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the kinds, without an import."""
        kinds = self.kinds if isinstance(self.kinds, tuple) else (self.kinds,)
        names = (kind if isinstance(kind, str) else kind.__qualname__ for kind in kinds)
        return [name.rpartition(":")[2] for name in names]

    @cached_property
    def classes(self) -> tuple[type, ...]:
        """Imported kinds."""
        kinds = self.kinds if isinstance(self.kinds, tuple) else (self.kinds,)
        return tuple(map(import_class, kinds))

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validated)

    def validated(self, data: Any) -> ConfigModel:
        """Return the config; while a document is loaded, from a mapping."""
        state = current()
        if state is not None and state.skips_parts:
            return cast("ConfigModel", data)
        if state is not None and isinstance(data, dict):
            data = self._loaded(state, data)
        if not isinstance(data, ConfigModel):
            kind = self._kind()
            wanted = self._wanted() if state else f"{kind}: a config, as of config_of()"
            raise ValueError(f"expected {wanted}, found {describe(data)}")
        config = self._as_loaded(data)
        self._check_code(config)
        if self.functions == "make" or not hasattr(config, "func"):
            self._check_arguments(config)
        return config

    def _loaded(self, state: Loading, data: dict[str, Any]) -> ConfigModel:
        named = [key for key in PART_KEYS if key in data]
        if not named:
            raise ValueError(f"expected {self._wanted()}, found the keys {', '.join(data)!r}")
        target: Any
        if CONFIG_TYPE in named:
            target = state.resolve_config_class(data[CONFIG_TYPE], ConfigModel, (CONFIG_TYPE,))
            self._check_config_class(state, target, data)
        elif len(named) == 2:
            raise ValueError("expected one of 'class_type' and 'func', found both")
        elif not isinstance(data[named[0]], str):
            raise ConfigReferenceError(
                f"expected a name like 'package.module:Name', found {describe(data[named[0]])}",
                (named[0],),
            )
        elif named == ["class_type"]:
            target = config_class_of(
                state.resolve_class(data["class_type"], self.classes, ("class_type",))
            )
        else:
            function = state.resolve_function(data["func"], Callable, ("func",))
            target = self.function_config(function)
        loaded = target.model_validate({k: v for k, v in data.items() if k != CONFIG_TYPE})
        assert isinstance(loaded, ConfigModel)
        return loaded

    def _check_config_class(
        self, state: Loading, target: type[ConfigModel], data: dict[str, Any]
    ) -> None:
        """Check the kind before a config is made, since its validators run any code."""
        field = target.model_fields.get("class_type")
        if field is None and "func" not in target.model_fields:
            raise ValueError(f"expected {self._wanted()}, found a {target.__qualname__}")
        named = data.get("class_type")
        if field is not None and isinstance(named, str):
            state.resolve_class(named, self.classes, ("class_type",))
        elif field is not None and isinstance(field.default, type):
            self._check_class(field.default)

    def _check_code(self, config: ConfigModel) -> None:
        """Check the kind of the named class or function, without a call."""
        if (cls := getattr(config, "class_type", None)) is not None:
            self._check_class(cls)
        elif (function := getattr(config, "func", None)) is None:
            raise ValueError(f"expected {self._wanted()}, found a {type(config).__qualname__}")
        elif (
            self.functions == "make"
            and self.classes != (object,)
            and not self.accepts_function(function)
        ):
            result = returned_class(function)
            found = "none" if result is None else repr(reference_to(result))
            raise ConfigReferenceError(
                f"expected a function that returns {self._kind()} by its return annotation; "
                f"that of {reference_to(function)!r} names {found}",
                ("func",),
            )

    def accepts_function(self, function: Callable[..., Any]) -> bool:
        """Return True if a function makes an instance of a kind, by its declaration."""
        if "return" not in getattr(function, "__annotations__", {}) and self.unannotated:
            return {*self.given} <= {parameter.name for parameter in parameters_of(function)}
        result = returned_class(function)
        return result is not None and any(is_assignable(result, kind) for kind in self.classes)

    def function_config(self, function: Callable[..., Any]) -> type[Config]:
        """Return the config class of a function in this part."""
        kind = self.kinds if isinstance(self.kinds, str) else ""
        return function_config_class(function, FUNCTION_BASES.get(kind, CallableConfig))

    def _as_loaded(self, config: ConfigModel) -> ConfigModel:
        """Convert the config to the class of its loaded document."""
        cls, values = getattr(config, "class_type", None), field_values(config)
        config_class = type(config)
        if cls is not None and (config.is_sparse or [*values] == ["class_type"]):
            config_class = config_class_of(cls)
        elif isinstance(config, DerivedConfig) and hasattr(config, "func"):
            config_class = self.function_config(config.func)
        return config if type(config) is config_class else config_class(**values)

    def _check_class(self, cls: type) -> None:
        if not any(is_assignable(cls, kind) for kind in self.classes):
            problem = f"expected {self._kind()}, found {reference_to(cls)!r}"
            raise ConfigReferenceError(problem, ("class_type",))
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(vars(cls)["__abstractmethods__"]))
            problem = f"{reference_to(cls)!r} is abstract, without {missing}; name a subclass"
            raise ConfigReferenceError(problem, ("class_type",))

    def _check_arguments(self, config: ConfigModel) -> None:
        values = field_values(config)
        for name in self.given:
            if name in values and config.is_sparse:
                raise ConfigFieldError("is given when it is built; leave it out", (name,))
        for name in getattr(config, "required_parameters", ()):
            if name not in values and name not in self.given:
                raise ConfigFieldError("a value is required here and none is given", (name,))

    def _kind(self) -> str:
        if self.classes == (object,):
            return "something"
        return " or ".join(f"a {name}" for name in self.names)

    def _wanted(self) -> str:
        return f"{self._kind()}: a mapping with 'class_type' or 'func'"


class _Anything:
    """Marker for plain data with parts at any depth."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validated)

    def validated(self, data: Any) -> Any:
        state = current()
        if state is None or state.skips_parts:
            return data
        if is_part(data):
            return _ANY_PART.validated(data)
        if (adapter := _CONTAINERS.get(type(data))) is None:
            return data
        try:
            return adapter.validate_python(data)
        except ValidationError as error:
            raise config_error(error, data) from error


class _Function(_Anything):
    """Marker for a function or class by name, or for a part of a callable."""

    def validated(self, data: Any) -> Any:
        state = current()
        if state is not None and state.skips_parts:
            return data
        if state is not None and isinstance(data, str):
            return state.resolve_code(data)
        if is_part(data) or callable(data):
            return super().validated(data)
        raise ValueError(
            f"expected a function: its name, like 'package.module:name', or a mapping with 'func' "
            f"or 'class_type'; found {describe(data)}"
        )


_ANY_PART = Part(object, functions="call")
Anything = Annotated[Any, _Anything()]
Function = Annotated[Any, _Function()]
_CONTAINERS: dict[type, TypeAdapter[Any]] = {
    dict: TypeAdapter(dict[str, Anything], config=ConfigDict(defer_build=True)),
    list: TypeAdapter(list[Anything], config=ConfigDict(defer_build=True)),
}

FIELD_TYPES: dict[str, Any] = {
    "numbers:Number": int | float,
    "numbers:Real": int | float,
    "numbers:Integral": int,
}
"""Field type for parameters of a class, by reference, where a part is the wrong one: names for
torch's data types, None for classes that no document can hold, such as tensors."""

UNTYPED_PARAMETERS: dict[tuple[str, str], Any] = {}
"""Field type for undeclared parameters, by top-level package and parameter name."""

_PLAIN = (
    *(int, float, str, bool, PurePath, Enum),
    *(datetime.date, datetime.time, datetime.timedelta, BaseModel),
)


def field_annotation(hint: Any) -> Any:
    """Return the field type for a parameter's type.

    Types with a plain form stay. A class without one becomes a `Part`, an undeclared type
    `Anything`. Metadata of ``Annotated`` is kept.

    >>> field_annotation(float | None)
    typing.Optional[float]
    >>> field_annotation(Annotated[float, "in metres"])
    typing.Annotated[float, 'in metres']
    """
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        annotation: Any = Annotated[(field_annotation(inner), *metadata)]
    else:
        annotation = _field_type(hint)
    try:
        TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        is_annotated = get_origin(hint) is Annotated
        return field_annotation(strip_annotated(hint)) if is_annotated else Anything
    return Anything if annotation is None else annotation


def _field_type(hint: Any) -> Any:
    """Return the field type, or None for types without a plain form, such as tensors."""
    hint = strip_annotated(hint)
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None) or origin is Literal or origin is type:
        return hint
    if len(options := union_members(hint)) > 1:
        admitted = [c for c in map(_field_type, options) if c is not None]
        return Union[tuple(admitted)] if admitted else None  # noqa: UP007 - made at run time
    if collections.abc.Callable in (hint, origin):
        return Function
    kind = origin or hint
    if not isinstance(kind, type) or kind in (Any, object, inspect.Parameter.empty):
        return Anything
    if (reference := reference_to(kind)) in FIELD_TYPES:
        return FIELD_TYPES[reference]
    if issubclass(kind, Enum) and not all(isinstance(m.value, int | str | float) for m in kind):
        return Anything  # such as torchvision's weights, which are given by name
    if issubclass(kind, _PLAIN):
        return kind
    if kind is tuple and args and args[-1] is not Ellipsis:
        return tuple.__class_getitem__(tuple(map(_item_field_type, args)))
    if is_mapping(kind):
        inner = _item_field_type(args[1] if len(args) == 2 else Any)
        return dict[str, inner]  # type: ignore[valid-type]
    item = _item_field_type(args[0] if args else Any)
    if kind is tuple:
        return tuple.__class_getitem__((item, ...))
    if is_collection(kind) and kind.__module__ in ("builtins", "collections.abc"):
        return list[item]  # type: ignore[valid-type]
    return Annotated[Any, Part(kind)]


def _item_field_type(hint: Any) -> Any:
    field_type = _field_type(hint)
    return Anything if field_type is None else field_type


class OpenDerivedConfig(DerivedConfig):
    """Derived config with ``**kwargs``, or with parameters whose names no field can have."""

    __pydantic_extra__: dict[str, Anything]
    extra_parameters: ClassVar[dict[str, Any]] = {}
    """Field types of parameters whose names no field can have."""
    accepts_any: ClassVar[bool] = True
    """True if the signature has ``**kwargs``."""

    @model_validator(mode="after")
    def _check_extra(self) -> Self:
        extra = self.model_extra or {}
        for name, value in extra.items():
            if (field_type := self.extra_parameters.get(name)) is not None:
                if (state := current()) is not None:
                    value = restore(state, field_type, value, (name,))
                extra[name] = validate_value(name, value, field_type)
            elif not self.accepts_any:
                known = {**type(self).model_fields, **self.extra_parameters}
                raise unknown_field(name, known, type(self).__qualname__)
        return self


def config_class_of(cls: type, base: type[Config] | None = None) -> type[Config]:
    """Return the config class declared in a class's module, or derived from the constructor.

    Args:
        cls: Any class.
        base: Base of the config class; default: from `CONFIG_BASES`, else `ClassConfig`. Fields of
            the base take precedence over parameters of the same name.
    """
    if base is None:
        found = (CONFIG_BASES.get(reference_to(ancestor)) for ancestor in cls.__mro__)
        base = next(filter(None, found), ClassConfig)
    return cast("type[Config]", find_config_class(cls, base) or _derived(cls, base))


@cache
def _derived(cls: type, base: type[Config]) -> type[Config]:
    return _config_class(cls, f"{cls.__name__}Config", base, class_type=(type[cls], ...))


def function_config_class(
    function: Callable[..., Any], base: type[Config] = CallableConfig
) -> type[Config]:
    """Return the config class derived from a function's signature."""
    return _derived_from_function(function, base)


@cache
def _derived_from_function(function: Callable[..., Any], base: type[Config]) -> type[Config]:
    name = "".join(word.capitalize() for word in function.__name__.split("_"))
    field = (Callable[..., Any], ...)
    made: Any = _config_class(function, f"{name}Config", base, func=field)
    made.is_factory = returned_class(function) is not None
    return cast("type[Config]", made)


def _config_class(code: Any, name: str, base: type[Config], **fields: Any) -> type[Config]:
    """Return a subclass of ``base`` with the fields, and a field per parameter."""
    declared = frozenset(base.model_fields) - fields.keys()
    var_positional, accepts_any = None, False
    required: list[str] = []
    extra_parameters: dict[str, Any] = {}
    hints, package = type_hints(code), code.__module__.partition(".")[0]
    for parameter in parameters_of(code):
        name_, default = parameter.name, parameter.default
        annotation = field_annotation(hints.get(name_, parameter.empty))
        if name_ not in hints:
            annotation = UNTYPED_PARAMETERS.get((package, name_), annotation)
        annotation = Annotated[base.adapt_parameter(annotation), StandIns()]
        if parameter.kind is parameter.VAR_KEYWORD:
            accepts_any = True
            continue
        if name_ in declared:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            var_positional, annotation, default = name_, list[annotation], []  # type: ignore[valid-type]
        if default is parameter.empty:
            required.append(name_)
            default = None
        # pydantic has no fields with a leading underscore, or named like a method.
        if name_.startswith("_") or hasattr(OpenDerivedConfig, name_):
            extra_parameters[name_] = annotation
        else:
            fields[name_] = (annotation, default)
    is_open = accepts_any or extra_parameters
    config_class: Any = create_model(
        name,
        __base__=(OpenDerivedConfig if is_open else DerivedConfig, base),
        __module__=code.__module__,
        __doc__=f"The parameters of {reference_to(code)}.",
        __cls_kwargs__={"extra": "allow" if is_open else "forbid", "validate_default": False},
        **fields,
    )
    config_class.var_positional, config_class.declared_fields = var_positional, declared
    config_class.required_parameters = tuple(required)
    if is_open:
        config_class.extra_parameters = extra_parameters
        config_class.accepts_any = accepts_any
    origin, args, _ = parametrization(base)
    config_class.made_of = (code, origin or base, args)
    config_class.__reduce__ = lambda self: (_blank, type(self).made_of, self.__getstate__())
    return cast("type[Config]", config_class)


def _blank(code: Any, base: type[Config], arguments: tuple[Any, ...]) -> Config:
    """Return a config without values, for unpickling."""
    if isinstance(code, type):
        cls = _derived(code, base[arguments] if arguments else base)  # type: ignore[index]
    else:
        cls = function_config_class(code, base)
    return cls.__new__(cls)


@overload
def config_of(code: type[T], /, **arguments: Any) -> ClassConfig[T]: ...
@overload
def config_of(code: Callable[..., T], /, **arguments: Any) -> CallableConfig[T]: ...
def config_of(code: Callable[..., T], /, **arguments: Any) -> Any:
    """Return the config of a class or function with the arguments.

    For a class, calling the config returns an instance. For a function, the call is forwarded.

    >>> from fractions import Fraction
    >>> half = config_of(Fraction, numerator=1, denominator=2)
    >>> half
    FractionConfig(class_type=<class 'fractions.Fraction'>, numerator=1, denominator=2)
    >>> half()
    Fraction(1, 2)

    Raises:
        ConfigReferenceError: No file can name the code, such as a ``functools.partial``.
        ValidationError: pydantic's, for unknown arguments and wrong types.
    """
    if not isinstance(code, Code):
        raise ConfigReferenceError(
            f"expected a class or function that a file can name, found {describe(code)}; pass "
            "arguments as keywords"
        )
    if isinstance(code, type):
        made: Any = config_class_of(code)
        return made(class_type=code, **arguments)
    made = function_config_class(code)
    return made(func=code, **arguments)


def function_of(value: Any) -> Callable[..., Any]:
    """Return the callable for a field of type `Function`.

    A function's config becomes the function with its arguments, a class's config an instance.
    """
    if not isinstance(value, Config):
        return cast("Callable[..., Any]", value)
    if isinstance(value, DerivedConfig) and hasattr(value, "func"):
        return value.bound()
    function: Any = value
    return cast("Callable[..., Any]", function() if hasattr(value, "class_type") else function)
