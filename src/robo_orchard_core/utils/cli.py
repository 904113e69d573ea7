"""Configs from command-line options and environment variables.

Every field of a config class is an `Option`. `pydantic_from_argparse` adds the options to a parser
and builds the config. pydantic-settings' own command-line source is not used: values have to pass
the reader of files, with its trust and its errors that name the path.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from robo_orchard_core.utils.config import (
    ClassConfig,
    Config,
    ConfigError,
    FieldsOf,
    Function,
    Part,
    TrustLike,
    formats,
)
from robo_orchard_core.utils.config.errors import at_path, dotted
from robo_orchard_core.utils.config.model import encode_value
from robo_orchard_core.utils.config.references import (
    field_default,
    is_collection,
    is_mapping,
    parametrization,
    union_members,
)


@dataclass(frozen=True, eq=False)
class Option:
    """Field of a config as a command-line option.

    Attributes:
        path: Field names from the top.
        field: Declaration of the field.
        default: Default of the field, or its value in the default config that holds the field.
        required: True if there is no default.
        variable: Environment variable, or empty.
    """

    path: tuple[str, ...]
    field: FieldInfo
    default: Any
    required: bool
    variable: str

    @property
    def flag(self) -> str:
        """Option as typed: ``--dataset.data_root``."""
        return "--" + ".".join(self.path)

    @property
    def dest(self) -> str:
        """Name among argparse's results; the dots keep the parser's own names apart."""
        return ".".join(("config", *self.path))

    @property
    def type(self) -> str:
        """Type of the field in words; see `type_name`."""
        return type_name(self.field.annotation, self.field.metadata)

    @property
    def default_text(self) -> str:
        """Default as typed on the command line, or a description."""
        if self.default is PydanticUndefined:
            return "made when needed"
        if isinstance(self.default, Config):
            return f"a {type(self.default).__qualname__}"
        if isinstance(self.default, str):
            return self.default
        try:
            return json.dumps(encode_value(self.default, self.field.annotation))
        except ConfigError:
            return repr(self.default)

    def add_to(self, add_argument: Callable[..., Any]) -> None:
        """Declare the option in a parser: repeatable, and absent from the results if not given."""
        is_switch = self.field.annotation is bool
        kinds = [get_origin(kind) or kind for kind in union_members(self.field.annotation)]
        is_json = any(
            is_mapping(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel))
            for kind in kinds
        )
        add_argument(
            self.flag,
            dest=self.dest,
            action="append",
            default=argparse.SUPPRESS,
            metavar="JSON" if is_json else "VALUE",
            # "--pipeline_test" alone switches it on.
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
            help=self.help().replace("%", "%%"),
        )

    def help(self) -> str:
        """Return description, type, default and variable of the field."""
        default = "required" if self.required else f"default: {self.default_text}"
        variable = f"[env: {self.variable}]" if self.variable else ""
        summary = f"(type: {self.type}, {default})"
        return " ".join(filter(None, (self.field.description, summary, variable)))

    def parse(self, texts: list[str]) -> Any:
        """Return the value for a document: the last text, or all texts as items of a list.

        Raises:
            ConfigSyntaxError: A text begins like JSON, but is malformed.
        """
        for kind in union_members(self.field.annotation):
            is_list = (get_origin(kind) or kind) in (list, tuple, set, frozenset)
            if is_list and texts[-1][:1] != "[" and texts[-1] != "null":
                item = (get_args(kind) or (Any,))[0]
                return [_parse(text, item) for text in texts]
        return _parse(texts[-1], self.field.annotation)


def options_of(
    cls: type[BaseModel],
    variable_of: Callable[[tuple[str, ...]], str] = lambda path: "",
    path: tuple[str, ...] = (),
    holder: BaseModel | None = None,
    parents: tuple[type[BaseModel], ...] = (),
) -> Iterator[Option]:
    """Yield the options of a config class, each before the options of its nested config.

    A class that contains itself is unrolled once; deeper levels are typed as JSON.

    Args:
        cls: The config class.
        variable_of: Returns the environment variable for a path, or an empty text.
        path: Path of the field that holds the config.
        holder: Default config of that field.
        parents: Config classes on the way from the top.
    """
    for name, field in cls.model_fields.items():
        here = (*path, name)
        default = field_default(field) if holder is None else getattr(holder, name)
        required = holder is None and field.is_required()
        yield Option(here, field, default, required, variable_of(here))
        kinds = [kind for kind in union_members(field.annotation) if kind is not type(None)]
        is_config = len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Config)
        if is_config and kinds[0] not in (cls, *parents):
            held = default if isinstance(default, kinds[0]) else None
            # A default of a subclass has options of its own.
            kind = kinds[0] if held is None else type(held)
            yield from options_of(kind, variable_of, here, held, (cls, *parents))


def type_name(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return a type in words, without module names; choices are listed.

    >>> from pathlib import Path
    >>> type_name(dict[str, Path] | None), type_name(Literal["sgd", "adam"])
    ('Path by name | null', "'sgd' | 'adam'")
    >>> type_name(list[Annotated[Any, Part("torch.nn:Module")]])
    'list of Module'

    Args:
        annotation: Type of a field.
        metadata: Metadata that pydantic took from the type's ``Annotated``.
    """
    for marker in metadata:
        if name := _marker_name(marker):
            return name
    if get_origin(annotation) is Annotated:
        inner, *markers = get_args(annotation)
        return type_name(inner, markers)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if len(members := union_members(annotation)) > 1:
        return " | ".join(map(type_name, arguments or members))
    if is_mapping(origin) and len(arguments) == 2:
        return f"{type_name(arguments[1])} by name"
    if is_collection(origin) and arguments:
        return f"list of {type_name(arguments[0])}"
    if origin is Literal:
        return " | ".join(repr(getattr(value, "value", value)) for value in arguments)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "anything"
    if not isinstance(annotation, type) or arguments:
        return re.sub(r"(\w+\.|<locals>\.)+", "", str(annotation))
    if issubclass(annotation, Enum):
        return " | ".join(repr(member.value) for member in annotation)
    if issubclass(annotation, ClassConfig) and parametrization(annotation)[1]:
        (built,) = parametrization(annotation)[1]
        return built.__name__ if isinstance(built, type) and built is not Any else "part"
    return annotation.__name__


def _marker_name(marker: Any) -> str:
    """Return the name of a field type of the config package, or an empty text."""
    if isinstance(marker, Part):
        return " | ".join(marker.names)
    if isinstance(marker, FieldsOf):
        return marker.reference.rpartition(":")[2].removesuffix("Config") + "'s fields"
    return "function" if marker in get_args(Function)[1:] else ""


def _parse(text: str, annotation: Any) -> Any:
    kinds = union_members(annotation)
    if text == "null" and type(None) in kinds:
        return None
    # pydantic converts other text to numbers, booleans, dates and paths.
    return formats.read_json(text) if text[:1] in ("[", "{") and str not in kinds else text


# Config is the last base, since pydantic lets the last base decide on options that both set.
class SettingConfig(BaseSettings, Config):
    """Config that `pydantic_from_argparse` also fills from environment variables.

    The variable of ``dataset.data_root`` is ``DATASET__DATA_ROOT``, after
    ``model_config["env_prefix"]`` if set. Construction in code and loading from files ignore the
    environment. Override ``settings_customise_sources`` to read pydantic-settings' sources.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_nested_delimiter="__")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the constructor's arguments as the only source."""
        return (init_settings,)


C = TypeVar("C", bound=Config)

_log = logging.getLogger(__name__)


def pydantic_from_argparse(
    cls: type[C],
    parser: argparse.ArgumentParser,
    args: Sequence[str] | None = None,
    *,
    trust: TrustLike = (),
) -> C:
    """Build a config from the command line.

    Every field becomes an option: ``--batch_size 4``, ``--dataset.data_root X``. Nested configs,
    lists and mappings are accepted as JSON, a list also item by item by repeating the option.
    ``null`` is None if the field admits None. ``parser.parse_args()`` still returns the parser's
    own arguments.

    The command line overrides the environment, which overrides defaults. Only a `SettingConfig`
    reads the environment. Each variable in use is logged; without a prefix, as a warning.

    >>> class Data(SettingConfig):
    ...     root: str
    ...     batch_size: int = 128
    >>> parser = argparse.ArgumentParser()
    >>> pydantic_from_argparse(Data, parser, ["--root", "images", "--batch_size", "4"])
    Data(root='images', batch_size=4)

    Args:
        cls: Class of the config.
        parser: Receives the options, and a short usage line if none is set.
        args: Default: ``sys.argv[1:]``.
        trust: Code that references may reach, as in `Config.from_dict`.

    Raises:
        SystemExit: With 2, after a line that names the option; with 0, after ``--help``.
    """
    settings: Any = cls.model_config if issubclass(cls, SettingConfig) else {}
    prefix, delimiter = settings.get("env_prefix") or "", settings.get("env_nested_delimiter")

    def variable_of(path: tuple[str, ...]) -> str:
        return (prefix + (delimiter or "__").join(path)).upper()

    options = {
        option.path: option
        for option in (options_of(cls, variable_of) if settings else options_of(cls))
    }
    if parser.usage is None:
        # argparse would list every option: a screenful for the smallest mistake.
        own = parser.format_usage().partition(":")[2].split()
        parser.usage = " ".join([*own, "[--FIELD VALUE ...]"]).replace("%", "%%")
    groups: dict[tuple[str, ...], Callable[..., Any]] = {}
    for option in options.values():
        holder = option.path[:-1]
        if holder not in groups:
            group = parser.add_argument_group(".".join(holder) or cls.__qualname__)
            groups[holder] = group.add_argument
        option.add_to(groups[holder])
    typed = vars(parser.parse_args(args))
    # The environment comes first: an option for a nested config replaces all of its fields.
    given: list[tuple[Option, list[str], str]] = []
    for option in options.values():
        if option.variable in os.environ:
            source = f"environment variable {option.variable}"
            given.append((option, [os.environ[option.variable]], source))
            # Without a prefix, the variable may be meant for another program.
            level = logging.INFO if prefix else logging.WARNING
            _log.log(level, "%s is set by the %s", option.flag, source)
    given += [
        (option, typed[option.dest], f"argument {option.flag}")
        for option in options.values()
        if option.dest in typed
    ]
    document: dict[str, Any] = {}
    try:
        for option, texts, _ in given:
            _put(document, option, texts, options)
        return cls.from_dict(document, trust=trust)
    except ConfigError as error:
        sources = {option.path: source for option, _, source in given}
        _refuse(
            parser, error, {path: f"argument {o.flag}" for path, o in options.items()} | sources
        )


def _put(
    document: dict[str, Any],
    option: Option,
    texts: list[str],
    options: Mapping[tuple[str, ...], Option],
) -> None:
    """Set a value in a document. A nested config starts from its default."""
    for depth, name in enumerate(option.path[:-1], start=1):
        if not isinstance(document.get(name), dict):
            held = options[option.path[:depth]]
            is_config = isinstance(held.default, Config)
            document[name] = encode_value(held.default, held.field.annotation) if is_config else {}
        document = document[name]
    with at_path(*option.path):
        document[option.path[-1]] = option.parse(texts)


def _refuse(
    parser: argparse.ArgumentParser, error: ConfigError, sources: Mapping[Any, str]
) -> NoReturn:
    """Exit with 2, after a line with the source of the wrong value."""
    message = error.problem
    for length in range(len(error.path), 0, -1):
        if (source := sources.get(error.path[:length])) is not None:
            inner = dotted(error.path[length:])
            message = f"{source}: {inner + ': ' if inner else ''}{message}"
            break
    parser.exit(2, f"{parser.prog}: error: {message} (see --help)\n")


__all__ = ["SettingConfig", "pydantic_from_argparse"]
