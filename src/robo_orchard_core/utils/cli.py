"""Configs from the command line and the environment."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from robo_orchard_core.utils.config import Config, ConfigError, TrustLike, formats
from robo_orchard_core.utils.config.encoding import encode_value
from robo_orchard_core.utils.config.errors import dotted
from robo_orchard_core.utils.config.references import field_default, is_mapping, union_members

# --- options ---------------------------------------------------------------------------------
# The fields of a config class as options: their names, their help, their values.


@dataclass(frozen=True, eq=False)
class Option:
    """One field as an option and, where ``variable`` isn't empty, an environment variable.

    Attributes:
        path: The field and those that hold it, from the top.
        field: Its declaration.
        default: Its default, or what the default config that holds it has there.
        required: Whether it has no default.
        variable: The environment variable; empty where the environment isn't read.
    """

    path: tuple[str, ...]
    field: FieldInfo
    default: Any
    required: bool
    variable: str

    @property
    def flag(self) -> str:
        """As it is typed: ``--dataset.data_root``."""
        return "--" + ".".join(self.path)

    @property
    def dest(self) -> str:
        """Its name among argparse's results; no argument of the user's has a dot in its name."""
        return ".".join(("config", *self.path))

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Declare it to argparse: any number of times, absent unless it is typed."""
        is_switch = self.field.annotation is bool
        group.add_argument(
            self.flag,
            dest=self.dest,
            action="append",
            default=argparse.SUPPRESS,
            metavar="JSON"
            if any(map(_is_mapped, union_members(self.field.annotation)))
            else "VALUE",
            # "--pipeline_test" alone switches it on.
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
            help=self.help().replace("%", "%%"),
        )

    def help(self) -> str:
        """Description, type, default and variable of the field."""
        default = "required" if self.required else f"default: {self._shown_default()}"
        about = f"(type: {type_name(self.field.annotation)}, {default})"
        variable = f"[env: {self.variable}]" if self.variable else ""
        return " ".join(filter(None, (self.field.description, about, variable)))

    def _shown_default(self) -> str:
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

    def parsed(self, texts: list[str]) -> Any:
        """The value for a document: the last text, or for a list the items that all of them are.

        Raises:
            ConfigSyntaxError: A text begins like JSON and isn't.
        """
        item = _item_annotation(self.field.annotation)
        if item is None or texts[-1][:1] == "[" or texts[-1] == "null":
            return _parsed(texts[-1], self.field.annotation)
        return [_parsed(text, item) for text in texts]


def options_of(
    cls: type[BaseModel],
    variable_of: Callable[[tuple[str, ...]], str],
    path: tuple[str, ...] = (),
    holder: BaseModel | None = None,
    above: tuple[type[BaseModel], ...] = (),
) -> Iterator[Option]:
    """The options of a config class, each before those of the config that its field holds.

    A class that holds itself is unrolled once; deeper levels are given as JSON.

    Args:
        cls: The config class.
        variable_of: The environment variable of a path; empty: none.
        path: Of the field that holds the config.
        holder: The config that this field holds by default.
        above: The classes on the way here.
    """
    for name, field in cls.model_fields.items():
        here = (*path, name)
        default = field_default(field) if holder is None else getattr(holder, name)
        required = holder is None and field.is_required()
        yield Option(here, field, default, required, variable_of(here))
        inner = _config_class(field.annotation)
        if inner is not None and inner not in (cls, *above):
            held = default if isinstance(default, inner) else None
            # What is there by default may be a subclass, with options of its own.
            kind = inner if held is None else type(held)
            yield from options_of(kind, variable_of, here, held, (cls, *above))


def type_name(annotation: Any) -> str:
    """The type in a few words, without modules; the values themselves where it lists them.

    >>> from pathlib import Path
    >>> type_name(dict[str, Path] | None), type_name(Literal["sgd", "adam"])
    ('dict[str, Path] | None', "'sgd' | 'adam'")
    """
    return " | ".join(map(_name, union_members(annotation)))


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(repr(getattr(value, "value", value)) for value in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(repr(member.value) for member in kind)
    if kind is type(None):
        return "None"
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return re.sub(r"(\w+\.|<locals>\.)+", "", str(kind))


def _config_class(annotation: Any) -> type[Config] | None:
    """The config class of a field that admits one, and maybe None."""
    kinds = [kind for kind in union_members(annotation) if kind is not type(None)]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Config):
        return kinds[0]
    return None


def _is_mapped(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return is_mapping(origin) or (isinstance(origin, type) and issubclass(origin, BaseModel))


def _item_annotation(annotation: Any) -> Any:
    """How the items of a list, set or tuple are declared; None where the field holds neither."""
    for kind in union_members(annotation):
        if (get_origin(kind) or kind) in (list, tuple, set, frozenset):
            return (get_args(kind) or (Any,))[0]
    return None


def _parsed(text: str, annotation: Any) -> Any:
    kinds = union_members(annotation)
    if text == "null" and type(None) in kinds:
        return None
    # Other texts go to pydantic, which reads numbers, booleans, dates and paths from text.
    return formats.read_json(text) if text[:1] in ("[", "{") and str not in kinds else text


# --- settings --------------------------------------------------------------------------------
# `SettingConfig`: a config that is also pydantic-settings.


# Config comes last because pydantic lets the last base decide on options that both set.
class SettingConfig(BaseSettings, Config):
    """A config that can also be filled from the command line and the environment.

    Building one in code, or loading it from a file, never looks at the environment: only
    `pydantic_from_argparse` does. There, the variable of the field ``dataset.data_root`` is
    ``DATASET__DATA_ROOT``, behind ``model_config["env_prefix"]`` where the class sets one. To
    have pydantic-settings read its sources whenever one is built, override
    ``settings_customise_sources``.
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
        """The constructor's arguments and nothing else."""
        return (init_settings,)


# --- arguments -------------------------------------------------------------------------------
# A config from what was typed and what is in the environment.
#
# The options are made here, and not by pydantic-settings' own command-line source, because the
# values have to pass the same reader as a file does: its trust, its errors that name the place.


C = TypeVar("C", bound=Config)

_log = logging.getLogger(__name__)


def pydantic_from_argparse(
    cls: type[C],
    parser: argparse.ArgumentParser,
    args: Sequence[str] | None = None,
    *,
    trust: TrustLike = (),
) -> C:
    """The config that the command line describes.

    Every field becomes an option of the parser: ``--batch_size 4``, ``--dataset.data_root X``.
    A nested config, list or mapping can be given whole as JSON, a list also item by item by
    repeating its option; ``null`` is None where the field admits it. The parser's own arguments
    stay what they are: ``parser.parse_args()`` returns them after this call as well.

    The command line goes before the environment (of a `SettingConfig`, which says how its
    variables are named), and this before the defaults. What the environment sets is logged, as a
    warning where no prefix shows that it is meant for this program.

    >>> class Data(SettingConfig):
    ...     root: str
    ...     batch_size: int = 128
    >>> parser = argparse.ArgumentParser()
    >>> pydantic_from_argparse(Data, parser, ["--root", "images", "--batch_size", "4"])
    Data(root='images', batch_size=4)

    Args:
        cls: What to build.
        parser: Gets the options, and a short usage line where it has none of its own.
        args: Default: what was typed, ``sys.argv[1:]``.
        trust: What references may reach, as in `Config.from_dict`.

    Raises:
        SystemExit: With 2, after a line that names the option; with 0, after ``--help``.
    """
    options = list(options_of(cls, lambda path: _variable(cls, path)))
    _add_options(parser, options, cls.__qualname__)
    typed = vars(parser.parse_args(args))
    draft = _Draft(options, parser)
    # All of the environment first: an option for a whole config replaces what is beneath it.
    for option in options:
        if option.variable in os.environ:
            source = f"environment variable {option.variable}"
            draft.put(option, [os.environ[option.variable]], source)
            # Without a prefix, the variable may be meant for another program.
            level = logging.INFO if cls.model_config.get("env_prefix") else logging.WARNING
            _log.log(level, "%s is set by the %s", option.flag, source)
    for option in options:
        if option.dest in typed:
            draft.put(option, typed[option.dest], f"argument {option.flag}")
    try:
        return cls.from_dict(draft.document, trust=trust)
    except ConfigError as error:
        draft.refuse(error)


def _variable(cls: type[Config], path: tuple[str, ...]) -> str:
    """The environment variable of a field; empty for a class that reads none."""
    if not issubclass(cls, SettingConfig):
        return ""
    settings = cls.model_config
    prefix, delimiter = settings.get("env_prefix") or "", settings.get("env_nested_delimiter")
    return (prefix + (delimiter or "__").join(path)).upper()


def _add_options(parser: argparse.ArgumentParser, options: list[Option], title: str) -> None:
    if parser.usage is None:
        # argparse would list every option there, a screenful for the smallest mistake.
        own = parser.format_usage().partition(":")[2].split()
        parser.usage = " ".join([*own, "[--FIELD VALUE ...]"]).replace("%", "%%")
    groups: dict[tuple[str, ...], argparse._ArgumentGroup] = {}
    for option in options:
        holder = option.path[:-1]
        if holder not in groups:
            groups[holder] = parser.add_argument_group(".".join(holder) or title)
        option.add_to(groups[holder])


class _Draft:
    """The document while it is put together, with the source of each of its values."""

    def __init__(self, options: list[Option], parser: argparse.ArgumentParser) -> None:
        self.document: dict[str, Any] = {}
        self._options = {option.path: option for option in options}
        self._sources: dict[tuple[str | int, ...], str] = {}
        self._parser = parser

    def put(self, option: Option, texts: list[str], source: str) -> None:
        """Set one value; a nested config starts from the one that is there by default."""
        self._sources[option.path] = source
        node = self.document
        for depth, name in enumerate(option.path[:-1], start=1):
            if not isinstance(node.get(name), dict):
                held = self._options[option.path[:depth]]
                default = held.default
                node[name] = (
                    encode_value(default, held.field.annotation)
                    if isinstance(default, Config)
                    else {}
                )
            node = node[name]
        try:
            node[option.path[-1]] = option.parsed(texts)
        except ConfigError as error:
            self.refuse(error.under(option.path))

    def refuse(self, error: ConfigError) -> NoReturn:
        """Exit with 2, after one line that names the option or variable that is wrong."""
        for length in range(len(error.path), 0, -1):
            path = error.path[:length]
            if path in self._sources or path in self._options:
                source = self._sources.get(path, "argument --" + dotted(path))
                inner = dotted(error.path[length:])
                message = f"{source}: {inner + ': ' if inner else ''}{error.problem}"
                break
        else:
            message = error.problem
        self._parser.exit(2, f"{self._parser.prog}: error: {message} (see --help)\n")


__all__ = ["SettingConfig", "pydantic_from_argparse"]
