"""Fields for parts: what a document describes and a run is built of.

In a document, a part is a mapping with ``class_type`` (a class; the other keys are parameters of
its constructor, or fields of the config class that is declared beside it), with ``func`` (a
function and keyword arguments for it), or with ``config_type`` (as configs write themselves).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigReferenceError,
)
from robo_orchard_core.utils.config.kinds import is_kind
from robo_orchard_core.utils.config.loading import CONFIG_TYPE, Loading, current
from robo_orchard_core.utils.config.model import ConfigModel, field_values
from robo_orchard_core.utils.config.problems import config_error, shown
from robo_orchard_core.utils.config.references import reference_to

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
            raise ValueError(f"expected {wanted}, found {shown(data)}")
        config = self._of_own_class(data)
        self._check(config)
        if self.functions == "make" or not hasattr(config, "func"):
            self._check_is_complete(config)
        return config

    def _of_own_class(self, config: ConfigModel) -> ConfigModel:
        """The same, of the class that a document of it would be read as."""
        from robo_orchard_core.utils.config.derived import config_class_of

        cls, values = getattr(config, "class_type", None), field_values(config)
        if cls is None or not (config.only_what_is_set or [*values] == ["class_type"]):
            return config
        own = config_class_of(cls)
        remade = config if type(config) is own else own(**values)
        assert isinstance(remade, ConfigModel)
        return remade

    def _loaded(self, state: Loading, data: dict[str, Any]) -> ConfigModel:
        from robo_orchard_core.utils.config.derived import config_class_of, function_config_class

        named = [key for key in PART_KEYS if key in data]
        if not named:
            raise ValueError(f"expected {self._wanted()}, found the keys {', '.join(data)!r}")
        if CONFIG_TYPE in named:
            target: Any = state.config_class_at(data[CONFIG_TYPE], ConfigModel, (CONFIG_TYPE,))
            self._check_config_class(state, target, data)
        elif len(named) == 2:
            raise ValueError("expected one of 'class_type' and 'func', found both")
        elif not isinstance(data[named[0]], str):
            raise ConfigReferenceError(
                f"expected a name like 'package.module:Name', found {shown(data[named[0]])}",
                (named[0],),
            )
        elif named == ["class_type"]:
            found = state.class_at(data["class_type"], self.classes, ("class_type",))
            target = config_class_of(found)
        else:
            function = state.function_at(data["func"], Callable, ("func",))
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
            state.class_at(named, self.classes, ("class_type",))
        elif field is not None and isinstance(field.default, type):
            self._check_class(field.default)

    def _check_class(self, cls: type) -> None:
        if not any(is_kind(cls, kind) for kind in self.classes):
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
            if name in values and getattr(config, "only_what_is_set", False):
                raise ConfigFieldError("is given when it is built; leave it out", (name,))
        for name in getattr(config, "required", ()):
            if name not in values and name not in self.given:
                raise ConfigFieldError("a value is required here and none is given", (name,))

    def _check_result(self, function: Any) -> None:
        from robo_orchard_core.utils.config.building import returned_class

        result = returned_class(function)
        if result is None or not any(is_kind(result, kind) for kind in self.classes):
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
    ...     more: Annotated[Any, FieldsOf("robo_orchard_core.utils.config.base:Config")] = {}
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
            return state.code_at(data)
        if is_part(data) or callable(data):
            return super().validated(data)
        raise ValueError(
            f"expected a function: its name, like 'package.module:name', or a mapping with 'func' "
            f"or 'class_type'; found {shown(data)}"
        )


_ANY_PART = Part(object, functions="are called")
Anything = Annotated[Any, _Anything()]
Function = Annotated[Any, _Function()]
