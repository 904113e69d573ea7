"""A config that names a class and builds it."""

from __future__ import annotations

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Protocol,
    TypeAlias,
    TypeVar,
    get_origin,
    runtime_checkable,
)

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from robo_orchard_core.utils.config.config import Config
from robo_orchard_core.utils.config.errors import ConfigBuildError, ConfigReferenceError
from robo_orchard_core.utils.config.model import ConfigModel, field_values
from robo_orchard_core.utils.config.references import (
    CONFIG_TYPE,
    Loading,
    admitted_classes,
    bare,
    current,
    find_config_class,
    is_assignable,
    item_type,
    mapping_value_type,
    reference_to,
    union_members,
)

# --- building --------------------------------------------------------------------------------
# How a class or function is called with what its configuration holds.
#
# A class that takes a config gets the config itself. Any other gets the fields as keyword
# arguments; there, a `Buildable` among the values (or in a list, tuple or dict of them) is built,
# unless the parameter is declared as a config.


R = TypeVar("R")

_NAMES = ("cfg", "config")


@runtime_checkable
class Buildable(Protocol):
    """A config that stands for an instance."""

    class_type: type

    def __call__(self) -> Any:
        """The instance."""


def build(config: Config, cls: type[R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """An instance of ``cls``; ``args`` and ``kwargs`` go before what the config says.

    Raises:
        ConfigBuildError: The class doesn't take what it would get.
    """
    parameter = config_parameter(cls, config)
    if parameter is None:
        fields = field_values(config)
        del fields["class_type"]
        return call(cls, config, fields, args, kwargs)
    if parameter.name in kwargs:
        return call(cls, config, {}, args, kwargs)
    explicit = _parameters(cls)
    changes = {
        name: kwargs.pop(name)
        for name in [*kwargs]
        if name in type(config).model_fields and name not in explicit
    }
    if changes:
        config = config.replace(**changes)
    # Behind *args of a constructor that hands them on, it is taken to come first as well.
    is_first = _positional(_signature(cls))[:1] in ([], [parameter.name])
    if parameter.kind is parameter.POSITIONAL_ONLY or (args and is_first):
        return call(cls, config, {}, (config, *args), kwargs)
    return call(cls, config, {}, args, {parameter.name: config, **kwargs})


def call(
    code: Callable[..., R],
    config: ConfigModel,
    fields: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    further: Iterable[Any] = (),
) -> R:
    """What ``code`` returns for the arguments and, where they are silent, the fields.

    ``further`` are built and handed on behind ``args``.
    """
    signature = _signature(code)
    # Built only where it is needed: what a caller gives instead may be there to avoid it.
    silent = fields.keys() - kwargs.keys() - set(_positional(signature)[: len(args)])
    built = build_arguments(code, {n: value for n, value in fields.items() if n in silent})
    kwargs = {**built, **kwargs}
    behind = [_built(value, Any) for value in further]
    if signature is None:
        args = (*args, *behind)
    else:
        try:
            args, kwargs = _in_place(signature, args, kwargs, behind)
            signature.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(_parameters(code)) or "none"
            raise ConfigBuildError(
                f"{_name(code)} doesn't take what {type(config).__qualname__} gives it: {error}; "
                f"its parameters are {names}"
            ) from error
    try:
        return code(*args, **kwargs)
    except Exception as error:
        error.add_note(f"while {type(config).__qualname__} built {_name(code)}")
        raise


def _in_place(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    behind: list[Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with those in their position that can only be given there.

    Raises:
        TypeError: One of these is missing.
    """
    placed, named = [*args], dict(kwargs)
    waiting = [
        p
        for p in signature.parameters.values()
        if p.kind is p.POSITIONAL_ONLY or (behind and p.kind is p.POSITIONAL_OR_KEYWORD)
    ][len(args) :]
    while waiting and (behind or any(p.name in named for p in waiting)):
        parameter = waiting.pop(0)
        value = named.pop(parameter.name, parameter.default)
        if value is parameter.empty:
            raise TypeError(f"missing a required argument: {parameter.name!r}")
        placed.append(value)
    return (*placed, *behind), named


def build_arguments(code: Callable[..., Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for ``code``, with instances in the place of the configs that stand for them."""
    hints = type_hints(code)
    return {name: _built(value, hints.get(name, Any)) for name, value in fields.items()}


def config_parameter(cls: type, config: Config) -> inspect.Parameter | None:
    """The parameter through which ``cls`` takes its config, if it does.

    It is required or comes first, has not the name of a field, and is declared as a config class
    that admits this one, or is declared as nothing and named ``cfg`` or ``config``. A constructor
    that hands ``*args`` or ``**kwargs`` on is followed to the next one in line.
    """
    for constructor in _constructors(cls):
        signature = _signature(constructor)
        parameters = [] if signature is None else [*signature.parameters.values()][1:]
        hints = _hints(constructor)
        for index, parameter in enumerate(parameters):
            is_candidate = index == 0 or parameter.default is parameter.empty
            hint = hints.get(parameter.name, parameter.annotation)
            if is_candidate and _takes(parameter, hint, config):
                return parameter
        if all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return None
    return None


def _constructors(cls: type) -> Iterator[Callable[..., Any]]:
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            yield vars(base)["__init__"]


def _takes(parameter: inspect.Parameter, hint: Any, config: Config) -> bool:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return False
    if parameter.name in type(config).model_fields:
        return False
    if _admits(hint, config):
        return True
    undeclared = hint is parameter.empty or hint is Any or isinstance(hint, str)
    return undeclared and parameter.name in _NAMES


def _admits(hint: Any, config: ConfigModel) -> bool:
    """Whether a parameter is declared as a config class that admits this config."""
    if isinstance(hint, str):
        # Its names aren't there at run time, as under TYPE_CHECKING; so the words must do.
        bases = {base.__name__ for base in type(config).__mro__ if issubclass(base, ConfigModel)}
        return not bases.isdisjoint(re.findall(r"\w+", hint))
    return any(
        isinstance(member, type)
        and issubclass(member, ConfigModel)
        and is_assignable(type(config), member)
        for member in union_members(hint)
    )


def _built(value: Any, hint: Any) -> Any:
    """The value with instances in the place of the configs that stand for them."""
    if isinstance(value, ConfigModel):
        makes = isinstance(value, Buildable) or (
            getattr(value, "makes", False) and not _is_callable(hint)
        )
        made: Any = value
        if _admits(hint, value):
            return value
        if makes:
            return made()
        return made.bound() if value.is_sparse and hasattr(value, "func") else value
    # A text that names a config class declares what the container holds.
    if type(value) in (list, tuple):
        declared = [
            hint if isinstance(hint, str) else item_type(hint, i) for i in range(len(value))
        ]
        return type(value)(map(_built, value, declared))
    if type(value) is dict:
        inner = hint if isinstance(hint, str) else mapping_value_type(hint)
        return {key: _built(item, inner) for key, item in value.items()}
    return value


def _is_callable(hint: Any) -> bool:
    """Whether something to call is declared."""
    return any(
        collections.abc.Callable in (member, get_origin(member)) for member in union_members(hint)
    )


def type_hints(code: Any) -> dict[str, Any]:
    """The types that a function or a class's constructor declares, see `_hints`."""
    if not isinstance(code, type):
        return _hints(code)
    constructors = [_hints(getattr(code, name)) for name in ("__new__", "__init__")]
    return {name: hint for hints in constructors for name, hint in hints.items()}


def returned_class(function: Callable[..., Any]) -> type | None:
    """The class whose instances a function returns, if its annotation names one."""
    result = bare(type_hints(function).get("return"))
    result = get_origin(result) or result
    return result if isinstance(result, type) and result is not type(None) else None


def _hints(code: Any) -> dict[str, Any]:
    """The parameters' types; where names in one are missing, the text of it.

    Names of the standard library's abstract types need not be there, as they aren't where they are
    imported for type checkers alone.
    """
    try:
        return typing.get_type_hints(code, include_extras=True)
    except Exception:  # an annotation is any expression, so it can raise anything
        annotations = getattr(code, "__annotations__", {})
        names = getattr(code, "__globals__", {})
        return {name: _hint(hint, names) for name, hint in annotations.items()}


def _hint(annotation: Any, names: dict[str, Any]) -> Any:
    holder = types.SimpleNamespace(__annotations__={"hint": annotation})
    known = {**vars(typing), **vars(collections.abc), **names}
    try:
        return typing.get_type_hints(holder, known, include_extras=True)["hint"]
    except Exception:  # as above; its text is what is left to go by
        return annotation


def _signature(code: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(code)
    except (ValueError, TypeError):  # some builtins have none
        return None


def _parameters(code: Callable[..., Any]) -> list[str]:
    signature = _signature(code)
    return (
        []
        if signature is None
        else [
            p.name
            for p in signature.parameters.values()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    )


def _positional(signature: inspect.Signature | None) -> list[str]:
    """The parameters that positional arguments fill, in their order."""
    return [
        p.name
        for p in (signature.parameters.values() if signature else ())
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _name(code: Callable[..., Any]) -> str:
    return reference_to(code)  # type: ignore[arg-type]  # a class or function


# --- class config ----------------------------------------------------------------------------


# Covariant: what builds a MyHook may stand where something that builds a Hook is declared.
T_co = TypeVar("T_co", covariant=True)


class ClassConfig(Config, Generic[T_co]):
    """What a class is built from: name it in ``class_type``, declare its parameters as fields.

    >>> class Timer:
    ...     def __init__(self, interval_s: float) -> None:
    ...         self.interval_s = interval_s
    >>> class TimerConfig(ClassConfig[Timer]):
    ...     class_type: type[Timer] = Timer
    ...     interval_s: float = 0.5
    >>> TimerConfig(interval_s=2)().interval_s
    2.0

    A class whose constructor takes a config (a first or required parameter that is declared as a
    config class which admits this one, or one without a declaration that is named ``cfg`` or
    ``config``) gets this config. Any other class gets the fields as keyword arguments, with
    nested `ClassConfig` built, unless the parameter is declared as a config.

    Attributes:
        class_type: The class, or a subclass of the declared one.
    """

    class_type: type[T_co]

    @classmethod
    def _class_named_in(cls, state: Loading, document: dict[str, Any]) -> type[BaseModel]:
        """Where no class is the default, the config class of the one that is named."""
        reference = document.get("class_type")
        if (
            CONFIG_TYPE in document
            or not isinstance(reference, str)
            or not cls.model_fields["class_type"].is_required()
            or cls.is_sparse
        ):
            return super()._class_named_in(state, document)
        from robo_orchard_core.utils.config.parts import config_class_of

        kinds = admitted_classes(cls.model_fields["class_type"].annotation)
        named = state.resolve_class(reference, kinds, ("class_type",))
        if document.keys() <= cls.model_fields.keys():  # may be one of this very class
            return find_config_class(named, cls) or cls
        return config_class_of(named, cls)

    @classmethod
    def _remade(cls, config: ConfigModel) -> ConfigModel | None:
        from robo_orchard_core.utils.config.parts import config_class_of

        field = cls.model_fields["class_type"]
        named: Any = getattr(config, "class_type", None)
        if named is None or not config.is_sparse or not field.is_required():
            return None
        if not any(is_assignable(named, kind) for kind in admitted_classes(field.annotation)):
            return None
        return config_class_of(named, cls)(**field_values(config))

    def __call__(self, *args: Any, **kwargs: Any) -> T_co:
        """A new instance.

        Args:
            *args: Handed to the class, after the config where it takes one.
            **kwargs: Handed to the class, in the place of fields with the same name; for a class
                that takes a config, those that name a field and no parameter change the field.

        Raises:
            ConfigBuildError: The class doesn't take what it would get; its name and the
                parameter's are in the message.
        """
        return build(self, self.class_type, args, kwargs)


# --- callable config -------------------------------------------------------------------------
# A config that names a function and calls it.


class CallableConfig(Config, Generic[R]):
    """A function and keyword arguments for it, like ``functools.partial`` with a document.

    >>> def scaled(value: float, factor: float = 1.0) -> float:
    ...     return value * factor
    >>> class ScaleConfig(CallableConfig[float]):
    ...     func: Callable[..., float] = scaled
    ...     factor: float = 3.0
    >>> ScaleConfig()(2.0)
    6.0

    Attributes:
        func: The function, ``module:name`` in files. Where it is declared with the types of its
            parameters, as in ``Callable[[float], float]``, a function from a file must take as
            many.
    """

    func: Callable[..., R]

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """What the function returns for these arguments and, where they are silent, the fields.

        Raises:
            ConfigBuildError: The function doesn't take what it would get.
        """
        fields = field_values(self)
        del fields["func"]
        return call(self.func, self, fields, args, kwargs)


# --- fields ----------------------------------------------------------------------------------
# Types to declare fields with.


T = TypeVar("T")

ClassType: TypeAlias = type[T]
"""A class: ``ClassType[Hook]`` admits Hook and its subclasses, and is ``module:QualName`` in files.

A plain ``type[Hook]`` means the same.
"""

if TYPE_CHECKING:
    ConfigInstanceOf = Annotated[T, ...]
else:

    class ConfigInstanceOf:
        """A config of the class or of any subclass: ``hook: ConfigInstanceOf[HookConfig]``.

        In files, ``config_type`` names the class wherever it isn't the declared one. The class
        may also be one that is no config, such as an abstract base that some configs share.
        """

        def __class_getitem__(cls, kind: Any) -> Any:
            return Annotated[kind, _IsConfig()]


class _IsConfig:
    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        if isinstance(source, type) and not issubclass(source, ConfigModel):
            return core_schema.no_info_plain_validator_function(lambda data: _config(source, data))
        return handler(source)


def _config(kind: type, data: Any) -> ConfigModel:
    state = current()
    if state is not None and isinstance(data, dict):
        if CONFIG_TYPE not in data:
            raise ConfigReferenceError(f"expected {CONFIG_TYPE!r} to name the class of the config")
        target = state.resolve_config_class(data[CONFIG_TYPE], kind, (CONFIG_TYPE,))
        data = target.model_validate({k: v for k, v in data.items() if k != CONFIG_TYPE})
    if isinstance(data, ConfigModel) and is_assignable(type(data), kind):
        return data
    raise ValueError(f"expected a config that is a {kind.__qualname__}")
