"""The names in a store's root: of checkpoints, and of what a crash may leave."""

from __future__ import annotations

import re
import uuid

LOCK = ".lock"
LAST = "last"
BEST = "best"

_STEP = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,18})")
# With what is named by durable.temporary_name.
_LEFTOVER = re.compile(r"\.(step_[0-9]{8,19}|last|best)\.[0-9a-f]{32}\.(tmp|old|trash)")


def step_folder(step: int) -> str:
    """The name of a checkpoint's folder.

    >>> step_folder(1234)
    'step_00001234'
    """
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder is named for; None for any other name.

    >>> step_of("step_00001234"), step_of("step_1234"), step_of("last")
    (1234, None, None)
    """
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def set_aside_name(name: str) -> str:
    """What ``name`` is called while another takes its place; without that other, it is put back."""
    return f".{name}.{uuid.uuid4().hex}.old"


def trash_name(name: str) -> str:
    """What ``name`` is called while its files are removed."""
    return f".{name}.{uuid.uuid4().hex}.trash"


def kept_name(name: str) -> str:
    """What ``name`` is called, from when another takes its place, where it is never removed."""
    return f"{name}.kept-{uuid.uuid4().hex[:8]}"


def leftover_of(name: str) -> tuple[str, str] | None:
    """The name it was to have, and the kind, of what a crash has left; None for any other name.

    >>> leftover_of(".step_00000003.0123456789abcdef0123456789abcdef.tmp")
    ('step_00000003', 'tmp')
    """
    found = _LEFTOVER.fullmatch(name)
    return (found[1], found[2]) if found else None
