"""One piece of work beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")


class Background(Generic[ResultT]):
    """Runs one function at a time in a thread; its result, or its error, waits to be collected.

    >>> background = Background("adding")
    >>> background.start(lambda: 1 + 1)
    >>> background.collect()
    2

    The thread does not keep the process alive: collect what must not be lost.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: threading.Thread | None = None
        self._result: ResultT | None = None
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether the function that was started last is still running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def done(self) -> bool:
        """Whether there is something to collect without waiting."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, work: Callable[[], ResultT]) -> None:
        """Begin; what was started before must be collected."""
        assert self._thread is None

        def run() -> None:
            try:
                self._result = work()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=self.name, daemon=True)
        self._thread.start()

    def collect(self) -> ResultT | None:
        """Wait for its end: the result, or its error raised; None if nothing was started."""
        thread, self._thread = self._thread, None
        if thread is None:
            return None
        thread.join()
        result, self._result = self._result, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return result
