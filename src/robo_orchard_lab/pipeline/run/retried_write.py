"""Writes that fail for a moment, as on a full disk: reported once, tried again, then complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from robo_orchard_lab.pipeline.run.durable import make_folder, replace_file, replace_folder

_logger = logging.getLogger(__name__)


class RetriedWrite:
    """Report of the failed writes of one output, which do not end the run.

    The first failure is logged as an error, with the writer and the output; so is a later failure
    for another reason. The next success is logged as a warning. The writer tries again by itself.

    Args:
        by: name of the writer, such as a hook.
        logger: logger of the reports.
    """

    def __init__(
        self,
        by: str,
        logger: logging.Logger | logging.LoggerAdapter[logging.Logger] = _logger,
    ) -> None:
        self.by = by
        self.failure: Exception | None = None
        """Error of the last write; None after a success."""
        self._logger = logger
        self._count = 0

    def failed(self, what: str, error: Exception, then: str) -> None:
        """Report a failed write.

        Args:
            what: description of the write, with the file.
            error: the reason.
            then: effect on the run.
        """
        reason = _reason(error)
        if self.failure is None or reason != _reason(self.failure):
            self._logger.error("%s: %s failed; %s: %s", self.by, what, then, reason)
        self.failure = error
        self._count += 1

    def succeeded(self, what: object) -> None:
        """Report a write that succeeded after failures."""
        if self.failure is not None:
            self._logger.warning(
                "%s: %s is written, after %d failed attempts", self.by, what, self._count
            )
            self.failure, self._count = None, 0


def _reason(error: Exception) -> str:
    """Return the text of an error without the names of temporary files."""
    if isinstance(error, OSError):
        text = f"[Errno {error.errno}] {error.strerror}" if error.strerror else str(error)
        return f"{type(error).__name__}: {text}"
    return str(error)


class OutputFile(RetriedWrite):
    """File or folder that is replaced atomically; contents that can't be written stay in memory.

    Args:
        path: path of the file or folder; missing parents are created.
        by: name of the writer.
        is_required: a run that ends without the file fails.
        restore: keep the contents, and write them again if the file disappears.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        by: str,
        *,
        is_required: bool = True,
        restore: bool = False,
    ) -> None:
        super().__init__(by)
        self.path = Path(path)
        self._is_required = is_required
        self._restore = restore
        self._replace: Callable[[], None] | None = None

    def write(self, data: bytes | memoryview) -> bool:
        """Write new contents of a file; return True if they are on the disk."""
        self._replace = partial(replace_file, self.path, data)
        return self._attempt()

    def write_folder(self, write: Callable[[Path], object]) -> bool:
        """Write new contents of a folder; return True if they are on the disk."""
        self._replace = partial(replace_folder, self.path, write)
        return self._attempt()

    def retry(self) -> bool:
        """Write the contents that failed before; return True if the file is complete."""
        is_missing = self._restore and not self.path.exists()
        return self._attempt() if self.failure is not None or is_missing else True

    def error(self) -> OSError | None:
        """Return the error for a run that ends without the file, or None."""
        found = self.failure
        if found is None or not self._is_required:
            return None
        code = found.errno if isinstance(found, OSError) else None
        error = OSError(code, f"{self.by} could not write {self.path}: {_reason(found)}")
        error.__cause__ = found
        return error

    def _attempt(self) -> bool:
        assert self._replace is not None
        try:
            make_folder(self.path.parent)
            self._replace()
        except OSError as error:
            then = "the run continues, and tries again at its next writes"
            self.failed(f"writing {self.path}", error, then)
            return False
        self.succeeded(self.path)
        if not self._restore:
            self._replace = None
        return True
