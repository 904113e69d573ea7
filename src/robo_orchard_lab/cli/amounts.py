"""Numbers of bytes, seconds and things, as people read them."""

from __future__ import annotations

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_SECONDS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def bytes_text(count: float) -> str:
    """A number of bytes.

    >>> bytes_text(512), bytes_text(1536), bytes_text(5 * 2**30)
    ('512 B', '1.5 KiB', '5.0 GiB')
    """
    unit = 0
    while count >= 1024 and unit < len(_BYTES) - 1:
        count /= 1024
        unit += 1
    return f"{count:.1f} {_BYTES[unit]}" if unit else f"{count:.0f} B"


def age_text(seconds: float) -> str:
    """How long ago something was, in its largest unit.

    >>> age_text(0.4), age_text(150), age_text(3 * 86400)
    ('now', '2 min ago', '3 d ago')
    """
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "now"


def count_text(count: int, thing: str) -> str:
    """So many things.

    >>> count_text(1, "step"), count_text(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
