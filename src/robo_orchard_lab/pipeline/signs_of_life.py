"""That work goes on where no step is counted."""

from __future__ import annotations

_signs = 0


def sign_of_life() -> None:
    """Tell that some of a longer work is done, such as a batch of an evaluation, or a file."""
    global _signs
    _signs += 1  # a sign that two threads give at once may count once, which is as good


def signs_until_now() -> int:
    """How many there were; it means something only beside another count."""
    return _signs
