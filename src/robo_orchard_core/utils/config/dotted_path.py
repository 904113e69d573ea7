"""From a dotted path, as people write it, to the keys that it leads along."""

from __future__ import annotations

import json
import re

from robo_orchard_core.utils.config.document import MAX_DEPTH, check_text
from robo_orchard_core.utils.config.errors import ConfigFieldError

_KEY = re.compile(r'"(?:[^"\\]|\\.)*"|[^."]+')


def parsed_path(text: str) -> tuple[str, ...]:
    """The keys of a dotted path; one that holds a dot or a quote is written in double quotes.

    >>> parsed_path('lr."layer1.weight".0')
    ('lr', 'layer1.weight', '0')

    Raises:
        ConfigFieldError: It isn't written as a path.
    """
    problem = f"expected keys with dots between them, like trainer.max_epoch; found {text[:80]!r}"
    path: list[str] = []
    end = 0
    while len(path) < MAX_DEPTH and (found := _KEY.match(text, end)):
        key = found[0]
        try:
            path.append(json.loads(key) if key.startswith('"') else key)
        except json.JSONDecodeError:
            raise ConfigFieldError(problem) from None
        end = found.end() + 1
        if end > len(text):
            check_text(text, ())
            return tuple(path)
        if text[end - 1] != ".":
            break
    raise ConfigFieldError(problem)
