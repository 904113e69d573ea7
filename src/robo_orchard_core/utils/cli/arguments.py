"""A config from what was typed and what is in the environment.

The options are made here, and not by pydantic-settings' own command-line source, because the
values have to pass the same reader as a file does: its trust, its errors that name the place.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from robo_orchard_core.utils.cli.options import Option, options_of
from robo_orchard_core.utils.cli.settings import SettingConfig
from robo_orchard_core.utils.config import Config, ConfigError, TrustLike
from robo_orchard_core.utils.config.encoding import encode_value
from robo_orchard_core.utils.config.errors import dotted

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
