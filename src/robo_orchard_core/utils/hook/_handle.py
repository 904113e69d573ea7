"""The receipt for a registration."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self


class RemovableHandle:
    """Undoes one registration: by ``handle()``, ``handle.remove()`` or at the end of a ``with``.

    However often and in whichever way it is used, the result is that of using it once. A hook
    that was registered anew after its removal has a new handle; the old one leaves it alone.
    """

    __slots__ = ("_remove",)

    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove: Callable[[], None] | None = remove

    @property
    def removed(self) -> bool:
        """Whether this handle has been used."""
        return self._remove is None

    def remove(self) -> None:
        """Undo the registration. A scope that is open keeps what it entered with."""
        if self._remove is not None:
            remove, self._remove = self._remove, None
            remove()

    def __call__(self) -> None:
        self.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


#: The spelling that the tutorial's system uses; the same class.
RemoveableHandle = RemovableHandle
