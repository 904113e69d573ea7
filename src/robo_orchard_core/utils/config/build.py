"""Build instances from configs: match fields to parameters, build nested configs, call.

A class that accepts a config receives the config itself; any other class or function receives the
fields as keyword arguments, with nested configs built, unless a parameter is declared as a config.
An annotation with a name that is missing at run time, as for imports under ``TYPE_CHECKING``,
counts as undeclared.
"""

from __future__ import annotations

import collections.abc
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    TypeAlias,
    TypeVar,
    cast,
    get_origin,
)

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from robo_orchard_core.utils.config.config import Config
from robo_orchard_core.utils.config.errors import ConfigBuildError, ConfigReferenceError
from robo_orchard_core.utils.config.model import ConfigModel, field_values
from robo_orchard_core.utils.config.references import (
    CONFIG_TYPE,
    current,
    is_assignable,
    item_type,
    mapping_value_type,
    reference_to,
    strip_annotated,
    union_members,
)

R = TypeVar("R")
T = TypeVar("T")

_RESERVED = frozenset({CONFIG_TYPE, "class_type", "func"})


def type_hints(code: Any) -> dict[str, Any]:
    """Return the evaluated annotations of a function or of a class's constructor.

    Annotations that can't be evaluated are absent. Names of `typing` and `collections.abc` are
    known even if the module imports the names for type checkers only.
    """
    if isinstance(code, type):
        constructors = [type_hints(getattr(code, name)) for name in ("__new__", "__init__")]
        return {name: hint for hints in constructors for name, hint in hints.items()}
    try:
        return typing.get_type_hints(code, include_extras=True)
    except Exception:  # an annotation is any expression, and can raise anything
        names = {**vars(typing), **vars(collections.abc), **getattr(code, "__globals__", {})}
        hints: dict[str, Any] = {}
        for name, annotation in getattr(code, "__annotations__", {}).items():
            holder = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                hints |= typing.get_type_hints(holder, names, include_extras=True)
            except Exception:  # as above: this annotation alone stays absent
                continue
        return hints


def returned_class(function: Callable[..., Any]) -> type | None:
    """Return the class that a function's return annotation names, or None."""
    result = strip_annotated(type_hints(function).get("return"))
    result = get_origin(result) or result
    return result if isinstance(result, type) and result is not type(None) else None


def parameters_of(code: Any) -> list[inspect.Parameter]:
    """Return the parameters of a function, or of a class's constructor."""
    try:
        parameters = [*inspect.signature(code).parameters.values()]
    except (ValueError, TypeError) as error:
        problem = f"{reference_to(code)!r} has no signature that Python can read"
        raise ConfigReferenceError(problem) from error
    if reserved := _RESERVED.intersection(parameter.name for parameter in parameters):
        problem = f"{reference_to(code)!r} has a parameter {min(reserved)!r}, a word of documents"
        raise ConfigReferenceError(problem)
    return parameters


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)


def _signature(code: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(code)
    except (ValueError, TypeError):  # some builtins have none
        return None


def _names(signature: inspect.Signature | None, kinds: tuple[Any, ...] = _NAMED) -> list[str]:
    """Return the names of the parameters of some kinds."""
    parameters = signature.parameters.values() if signature else ()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def config_parameter(cls: type, config: Config) -> inspect.Parameter | None:
    """Return the constructor parameter for the config, or None.

    The parameter is required or the first, and no field has its name. It is declared as a class of
    the config, or undeclared and named ``cfg`` or ``config``. If the constructor has ``*args`` or
    ``**kwargs``, the base class's constructor is searched as well.
    """
    fields = type(config).model_fields
    for constructor in (vars(base).get("__init__") for base in cls.__mro__[:-1]):
        if constructor is None:
            continue
        signature, hints = _signature(constructor), type_hints(constructor)
        parameters = [] if signature is None else [*signature.parameters.values()][1:]
        for index, parameter in enumerate(parameters):
            name, hint = parameter.name, hints.get(parameter.name, Any)
            is_candidate = index == 0 or parameter.default is parameter.empty
            if not is_candidate or parameter.kind not in _NAMED or name in fields:
                continue
            if _admits(hint, config) or (hint is Any and name in ("cfg", "config")):
                return parameter
        if all(parameter.kind in _NAMED for parameter in parameters):
            return None
    return None


def _admits(hint: Any, config: ConfigModel) -> bool:
    """Return True if a parameter is declared as a config class of this config."""
    return any(
        isinstance(member, type)
        and issubclass(member, ConfigModel)
        and is_assignable(type(config), member)
        for member in union_members(hint)
    )


def build(config: Config, cls: type[R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """Return an instance of ``cls``; ``args`` and ``kwargs`` override the config."""
    parameter = config_parameter(cls, config)
    if parameter is None:
        fields = field_values(config)
        del fields["class_type"]
        return call(cls, config, fields, args, kwargs)
    if parameter.name in kwargs:
        return call(cls, config, {}, args, kwargs)
    signature = _signature(cls)
    explicit = _names(signature)
    changes = {
        name: kwargs.pop(name)
        for name in [*kwargs]
        if name in type(config).model_fields and name not in explicit
    }
    if changes:
        config = config.replace(**changes)
    # A constructor that passes *args on is taken to accept the config first, too.
    is_first = _names(signature, _POSITIONAL)[:1] in ([], [parameter.name])
    if parameter.kind is parameter.POSITIONAL_ONLY or (args and is_first):
        return call(cls, config, {}, (config, *args), kwargs)
    return call(cls, config, {}, args, {parameter.name: config, **kwargs})


def call(
    code: Callable[..., R],
    config: ConfigModel,
    fields: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    var_args: Iterable[Any] = (),
) -> R:
    """Call ``code`` with the arguments, and with fields for parameters without an argument.

    ``var_args`` are built and passed after all positional arguments.
    """
    signature, name = _signature(code), reference_to(code)  # type: ignore[arg-type]  # a class or function
    # Fields that an argument overrides are not built: the argument may be there to avoid that.
    overridden = {*kwargs, *_names(signature, _POSITIONAL)[: len(args)]}
    built = build_arguments(code, {n: v for n, v in fields.items() if n not in overridden})
    kwargs = {**built, **kwargs}
    var_args = [_built(value, Any) for value in var_args]
    if signature is None:
        args = (*args, *var_args)
    else:
        try:
            args, kwargs = _by_position(signature, args, kwargs, var_args)
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigBuildError(
                f"{name} doesn't accept the arguments of {type(config).__qualname__}: "
                f"{error}; its parameters are {', '.join(_names(signature)) or 'none'}"
            ) from error
    try:
        return code(*args, **kwargs)
    except Exception as error:
        error.add_note(f"while {type(config).__qualname__} built {name}")
        raise


def _by_position(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    var_args: list[Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move keyword arguments of positional-only parameters, and of all before ``*args``."""
    positional, keywords = [*args], dict(kwargs)
    remaining = [
        p
        for p in signature.parameters.values()
        if p.kind is p.POSITIONAL_ONLY or (var_args and p.kind is p.POSITIONAL_OR_KEYWORD)
    ][len(args) :]
    while remaining and (var_args or any(p.name in keywords for p in remaining)):
        parameter = remaining.pop(0)
        value = keywords.pop(parameter.name, parameter.default)
        if value is parameter.empty:
            raise TypeError(f"missing a required argument: {parameter.name!r}")
        positional.append(value)
    return (*positional, *var_args), keywords


def build_arguments(code: Callable[..., Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as arguments, with nested configs built."""
    hints = type_hints(code)
    return {name: _built(value, hints.get(name, Any)) for name, value in fields.items()}


def _built(value: Any, hint: Any) -> Any:
    if isinstance(value, ConfigModel):
        made: Any = value
        if _admits(hint, value):
            return value
        takes_function = any(
            collections.abc.Callable in (member, get_origin(member))
            for member in union_members(hint)
        )
        is_factory = getattr(value, "is_factory", False) and not takes_function
        if (hasattr(value, "class_type") and callable(value)) or is_factory:
            return made()
        return made.bound() if value.is_sparse and hasattr(value, "func") else value
    if type(value) in (list, tuple):
        return type(value)(_built(item, item_type(hint, i)) for i, item in enumerate(value))
    if type(value) is dict:
        inner = mapping_value_type(hint)
        return {key: _built(item, inner) for key, item in value.items()}
    return value


class CallableConfig(Config, Generic[R]):
    """Config of a function and its keyword arguments, as a serializable ``functools.partial``.

    >>> def scaled(value: float, factor: float = 1.0) -> float:
    ...     return value * factor
    >>> class ScaleConfig(CallableConfig[float]):
    ...     func: Callable[..., float] = scaled
    ...     factor: float = 3.0
    >>> ScaleConfig()(2.0)
    6.0

    Attributes:
        func: The function, ``module:name`` in files. A declaration with parameter types, as in
            ``Callable[[float], float]``, refuses functions of another number of parameters.
    """

    func: Callable[..., R]

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """Call the function with the arguments, and with fields for the other parameters."""
        fields = field_values(self)
        del fields["func"]
        return call(self.func, self, fields, args, kwargs)


class DerivedConfig(Config):
    """Base of configs derived from a signature; see `config_of`.

    Only arguments that were set count for equality and in documents.

    Attributes:
        var_positional: Name of the ``*args`` parameter.
        required_parameters: Parameters without a default; the caller may supply these as well.
        is_factory: True for a function with a class as return annotation: the config builds an
            instance.
        declared_fields: Fields that are no arguments, but belong to the declared base config.
        made_of: Code and base config of this class; used for pickling, since no module holds the
            class.
    """

    is_sparse: ClassVar[bool] = True
    var_positional: ClassVar[str | None] = None
    required_parameters: ClassVar[tuple[str, ...]] = ()
    is_factory: ClassVar[bool] = False
    declared_fields: ClassVar[frozenset[str]] = frozenset()
    made_of: ClassVar[tuple[Any, ...]] = ()

    def arguments(self) -> dict[str, Any]:
        """Return explicitly set arguments by name; nested configs are not built."""
        no_arguments = self.declared_fields | {"class_type", "func"}
        return {k: value for k, value in field_values(self).items() if k not in no_arguments}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class or function; ``args`` and ``kwargs`` override the config."""
        given = self.arguments()
        var_args = given.pop(self.var_positional, ()) if self.var_positional else ()
        return call(code_of(self), self, given, args, kwargs, var_args)

    def bound(self) -> Callable[..., Any]:
        """Return the function with its arguments built once, for repeated calls."""
        code, given = code_of(self), self.arguments()
        by_position = {p.name for p in parameters_of(code) if p.kind is p.POSITIONAL_ONLY}
        if self.var_positional in given or by_position & given.keys():
            return self
        arguments = build_arguments(code, given)
        return partial(code, **arguments) if arguments else cast("Callable[..., Any]", code)

    def __repr_args__(self) -> Any:
        return [*field_values(self).items()]


def code_of(config: Config) -> Any:
    """Return the class or function of a config."""
    return getattr(config, "class_type", None) or getattr(config, "func", None)


ClassType: TypeAlias = type[T]
"""Class: ``ClassType[Hook]`` admits Hook and its subclasses, and is ``module:QualName`` in files.

Identical to ``type[Hook]``.
"""

if TYPE_CHECKING:
    ConfigInstanceOf = Annotated[T, ...]
else:

    class ConfigInstanceOf:
        """Config of a class or any subclass: ``hook: ConfigInstanceOf[HookConfig]``.

        In files, ``config_type`` names a class other than the declared one. The declared class may
        be an abstract base that is not a config, but that some configs inherit from.
        """

        def __class_getitem__(cls, kind: Any) -> Any:
            return Annotated[kind, _IsConfig()]


class _IsConfig:
    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        if isinstance(source, type) and not issubclass(source, ConfigModel):
            return core_schema.no_info_plain_validator_function(partial(_config_of_kind, source))
        return handler(source)


def _config_of_kind(kind: type, data: Any) -> ConfigModel:
    state = current()
    if state is not None and isinstance(data, dict):
        if CONFIG_TYPE not in data:
            raise ConfigReferenceError(f"expected {CONFIG_TYPE!r} to name the class of the config")
        target = state.resolve_config_class(data[CONFIG_TYPE], kind, (CONFIG_TYPE,))
        data = target.model_validate({k: v for k, v in data.items() if k != CONFIG_TYPE})
    if isinstance(data, ConfigModel) and is_assignable(type(data), kind):
        return data
    raise ValueError(f"expected a config that is a {kind.__qualname__}")


@dataclass(frozen=True)
class FieldsOf:
    """Marker for a field that holds a config of a class imported at the first validation.

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
        """Imported config class."""
        return import_class(self.reference)

    def validated(self, data: Any) -> ConfigModel:
        """Return a config of the class."""
        state = current()
        if state is not None and state.skips_parts:
            return cast("ConfigModel", data)
        return self.config_class.model_validate(data)


def import_class(code: type | str) -> type:
    """Import a class from a reference in this project's own code."""
    try:
        found: type = pkgutil.resolve_name(code) if isinstance(code, str) else code
    except ModuleNotFoundError as error:
        package = (error.name or str(code)).partition(".")[0]
        raise ConfigReferenceError(f"this needs the package {package!r}; install it") from error
    return found
