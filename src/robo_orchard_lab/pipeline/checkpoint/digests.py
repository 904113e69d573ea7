"""Digests of a checkpoint's files, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import xxhash

from robo_orchard_lab.pipeline.errors import PipelineConfigError

DigestName = Literal["xxh3_128", "sha256"]
"""``xxh3_128`` finds every accident, at the speed of memory; ``sha256`` also withstands someone
who means to make two files alike, and takes about as long as writing them."""

_MAKERS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}

HEX_DIGITS = {"xxh3_128": 32, "sha256": 64}
"""How long a digest is, as text."""


def check_digest_name(name: str) -> None:
    """Refuse a name that is not a digest's.

    Raises:
        PipelineConfigError: the message has the names that there are.
    """
    if name not in _MAKERS:
        raise PipelineConfigError(f"digest must be one of {get_args(DigestName)}, got {name!r}")


def new_digest(name: str) -> Any:
    """A digest to ``update``; large updates run beside other threads."""
    return _MAKERS[name]()


def digest_of(name: str, data: bytes | bytearray | memoryview) -> str:
    """The digest of some bytes, in hexadecimal digits."""
    digest = new_digest(name)
    digest.update(data)
    return str(digest.hexdigest())
