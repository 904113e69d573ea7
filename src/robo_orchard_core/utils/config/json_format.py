"""Documents as JSON: RFC 8259 and nothing more, so no NaN and no repeated keys."""

from __future__ import annotations

import json

from robo_orchard_core.utils.config.document import Plain, RepeatedKey
from robo_orchard_core.utils.config.errors import ConfigSyntaxError


def write(document: dict[str, Plain]) -> str:
    """Indented JSON without a newline at its end, so that every shorter text is a broken one."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def read(text: str) -> object:
    """What the text says; the caller checks it with `document.check`.

    NaN and Infinity come out as floats, which the check refuses with their place.

    Raises:
        ConfigSyntaxError: The text is no JSON, or is nested too deep for the parser.
    """
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise ConfigSyntaxError(f"broken JSON: {error.msg}", position=position) from error
    except RecursionError:
        raise ConfigSyntaxError("the document is nested too deep to be read") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigSyntaxError(f"broken JSON: {error}") from error


def _mapping(pairs: list[tuple[str, Plain]]) -> dict[str, Plain]:
    mapping: dict[str, Plain] = {}
    for key, value in pairs:
        if key in mapping:
            return RepeatedKey(key)
        mapping[key] = value
    return mapping
