"""What goes wrong with hooks, and how errors of hooks are told.

What is done here to an error happens while scopes are being left, so none of it may raise: not
every exception takes a note or an attribute.
"""

from __future__ import annotations

import logging
import textwrap
import traceback

logger = logging.getLogger(__name__)

_ATTRIBUTE = "__later_hook_errors__"
_ORIGIN = "raised in hook "


class HookRegistrationError(ValueError):
    """A hook can't be registered where it was asked to be; the message says what to do."""


class HookSignatureError(TypeError):
    """A callable can't serve as a hook: it can't be called with one argument."""


def later_errors(error: BaseException) -> tuple[BaseException, ...]:
    """The errors that hooks raised while the scopes were left that ``error`` had broken.

    They are in the order in which they were raised. ``error`` carries the text of each as a
    note, too, so that a traceback shows them.
    """
    return tuple(getattr(error, _ATTRIBUTE, ()))


def attach_later(first: BaseException, later: BaseException) -> None:
    """Keep ``later`` with ``first``, which stays the one that is raised."""
    known = later_errors(first)
    if later is first or any(later is error for error in known):
        return  # an after-hook that raises ``args.exception`` adds nothing
    try:
        setattr(first, _ATTRIBUTE, (*known, later))
        # Without its context, which is the first error with all of its notes.
        text = "".join(traceback.format_exception(later, chain=False)).rstrip()
        first.add_note("while leaving, another error was raised:\n" + textwrap.indent(text, "  | "))
    except Exception:  # it takes no attribute or note, so the log keeps the later one
        logger.exception("while leaving after %r, another error was raised", first, exc_info=later)


def add_origin(error: BaseException, origin: str) -> None:
    """Note on ``error`` which hook raised it; an error that has such a note keeps its own."""
    try:
        if origin_of(error) is None:
            error.add_note(_ORIGIN + origin)
    except Exception:  # it takes no note
        logger.error("%r was %s%s", error, _ORIGIN, origin)


def origin_of(error: BaseException) -> str | None:
    """Which hook raised ``error``, as its note says it; None where it came from no hook."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, str) and note.startswith(_ORIGIN):
            return note.removeprefix(_ORIGIN)
    return None
