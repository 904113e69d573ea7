"""Where the value of a field comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from robo_orchard_core.utils.config.errors import Path

Layer = Literal["command line", "environment", "code", "file", "default"]
"""What may say the value of a field, the strongest first."""


@dataclass(frozen=True)
class Origin:
    """What said the value of a field.

    >>> str(Origin("file", "digits.yaml:12")), str(Origin("command line", "--trainer.max_epoch"))
    ('digits.yaml:12', 'command line: --trainer.max_epoch')

    Attributes:
        layer: Which kind of source it is.
        where: The file and the line where it is known, the option as typed, or the variable's
            name; empty for a default.
    """

    layer: Layer
    where: str = ""

    def __str__(self) -> str:
        if self.layer == "file":
            return self.where
        return f"{self.layer}: {self.where}" if self.where else self.layer


Origins = dict[Path, Origin]
"""The origins of values, by their paths."""

DEFAULT = Origin("default")


def origin_of(path: Path, origins: Mapping[Path, Origin]) -> Origin:
    """The origin of the value at ``path``, or of the nearest one above it that has any.

    >>> origins = {("betas",): Origin("file", "a.yaml:3")}
    >>> str(origin_of(("betas", 0), origins))
    'a.yaml:3'
    >>> str(origin_of(("seed",), {}))
    'default'
    """
    for end in range(len(path), -1, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return DEFAULT
