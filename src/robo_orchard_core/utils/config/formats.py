"""One document, three formats, each read back before it is handed out."""

from __future__ import annotations

import os
from typing import Literal, get_args

from robo_orchard_core.utils.config import json_format, toml_format, yaml_format
from robo_orchard_core.utils.config.document import (
    MAX_BYTES,
    Lines,
    Plain,
    check,
    check_text,
    first_difference,
)
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigSaveError,
    ConfigSyntaxError,
)

Format = Literal["json", "yaml", "toml"]

_MODULES = {"json": json_format, "yaml": yaml_format, "toml": toml_format}
_SUFFIXES: dict[str, Format] = {
    ".json": "json",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
}


def format_of(path: str | os.PathLike[str]) -> Format:
    """The format that the file's suffix says.

    Raises:
        ConfigError: It says none of them.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _SUFFIXES:
        known = ", ".join(_SUFFIXES)
        raise ConfigError(f"expected a file name that ends in {known}; found {os.fspath(path)!r}")
    return _SUFFIXES[suffix]


def check_format(name: str) -> Format:
    """The name, once it is one of ours.

    Raises:
        ConfigError: It isn't.
    """
    for known in get_args(Format):
        if name == known:
            return known  # type: ignore[no-any-return]  # get_args lists formats
    raise ConfigError(f"expected a format out of {get_args(Format)}, found {name!r}")


def write(document: dict[str, Plain], format: Format) -> str:  # noqa: A002 - the public word
    """The document as text that `read` turns into exactly this document.

    Raises:
        ConfigSaveError: The format can't hold it, with the place of what it can't hold.
    """
    text: str = _MODULES[check_format(format)].write(document)
    try:
        difference = first_difference(document, read(text, format))
    except ConfigSyntaxError as error:
        raise ConfigSaveError(f"{format} can't hold this: {error.problem}", error.path) from error
    if difference is not None:
        raise ConfigSaveError(f"{format} can't hold this value exactly", difference)
    return text


def decoded(content: bytes) -> str:
    """The text of a document's file.

    Raises:
        ConfigSyntaxError: It is no UTF-8, or larger than `MAX_BYTES`.
    """
    if len(content) > MAX_BYTES:
        raise ConfigSyntaxError(f"the document is larger than {MAX_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigSyntaxError(f"expected UTF-8: {error}") from error


def read(
    text: str,
    format: Format,  # noqa: A002 - the public word
    lines: Lines | None = None,
) -> dict[str, Plain]:
    """The document that the text holds.

    Args:
        text: The document.
        format: What it is written in.
        lines: Is given the line in which each value begins, by its path, as far as it is known.

    Raises:
        ConfigSyntaxError: It holds none, or breaks a rule of `document`.
    """
    reader = _MODULES[check_format(format)]
    # A text that UTF-8 can't hold crashes libyaml's parser before its events come.
    check_text(text, ())
    if len(text.encode()) > MAX_BYTES:
        raise ConfigSyntaxError(f"the document is larger than {MAX_BYTES} bytes")
    document = check(reader.read(text, lines))
    if not isinstance(document, dict):
        found = type(document).__qualname__
        raise ConfigSyntaxError(f"expected a mapping of fields at the top, found {found}")
    return document
