"""What the board refuses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetricValueError(TypeError):
    """What was published is no single number; the message names the metric."""


class UnknownMetricError(LookupError):
    """A name that nobody has published; the message lists those that were."""

    def __init__(self, name: str, published: Iterable[str], who: str = "", hint: str = "") -> None:
        published = sorted(published)
        near = difflib.get_close_matches(name, published, n=1)
        super().__init__(
            f"no metric {name!r} was published"
            + (f", which {who} waits for" if who else "")
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" Published: {', '.join(published) or 'none'}"
            + (f". {hint}" if hint else "")
        )
