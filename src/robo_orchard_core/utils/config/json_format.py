"""Documents as JSON: RFC 8259 and nothing more, so no NaN and no repeated keys."""

from __future__ import annotations

import json
from contextlib import suppress

from robo_orchard_core.utils.config import yaml_format
from robo_orchard_core.utils.config.document import Lines, Plain, RepeatedKey
from robo_orchard_core.utils.config.errors import ConfigSyntaxError


def write(document: dict[str, Plain]) -> str:
    """Indented JSON without a newline at its end, so that every shorter text is a broken one."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def read(text: str, lines: Lines | None = None) -> object:
    """What the text says; the caller checks it with `document.check`.

    NaN and Infinity come out as floats, which the check refuses with their place.

    Args:
        text: The document.
        lines: Is given the line of each value, by its path.

    Raises:
        ConfigSyntaxError: The text is no JSON, or is nested too deep for the parser.
    """
    try:
        value = json.loads(text, object_pairs_hook=_mapping)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise ConfigSyntaxError(f"broken JSON: {error.msg}", position=position) from error
    except RecursionError:
        raise ConfigSyntaxError("the document is nested too deep to be read") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigSyntaxError(f"broken JSON: {error}") from error
    if lines is not None:
        # Python's parser tells no lines; YAML's does, and nearly all JSON is YAML.
        with suppress(ConfigSyntaxError):
            yaml_format.read(text, lines)
    return value


def _mapping(pairs: list[tuple[str, Plain]]) -> dict[str, Plain]:
    mapping: dict[str, Plain] = {}
    for key, value in pairs:
        if key in mapping:
            return RepeatedKey(key)
        mapping[key] = value
    return mapping
