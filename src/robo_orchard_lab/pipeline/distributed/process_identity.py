"""Which process it is, also when its number has gone to another one."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict

_SAME_START_S = 10.0  # the system's clock may be set until a process is first looked for


class ProcessIdentity(BaseModel):
    """A process that no other one is taken for."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    pid: int
    host: str
    started_at: float
    """In seconds since the epoch."""
    namespace: str | None = None
    """In which the pid means something; None where the system has none."""

    @classmethod
    def own(cls) -> ProcessIdentity:
        """That of this process."""
        import psutil  # type: ignore[import-untyped]  # here, since it takes 6 ms

        process = psutil.Process()
        return cls(
            pid=process.pid,
            host=socket.gethostname(),
            started_at=process.create_time(),
            namespace=_pid_namespace(),
        )

    def is_here(self) -> bool:
        """Whether this process can tell of it."""
        return self.host == socket.gethostname() and self.namespace == _pid_namespace()

    def keep_in_sight(self) -> None:
        """Know it from here on, however the system's clock is set."""
        self._runs()

    def is_gone(self) -> bool:
        """Whether it is certain that it runs no more; False where this machine can't tell."""
        return self._runs() is False

    def is_another_that_runs(self) -> bool:
        """Whether it is certain that it runs, and is not this one."""
        return self._runs() is True and self.pid != os.getpid()

    def _runs(self) -> bool | None:
        if not self.is_here():
            return None
        import psutil

        try:
            process = _find(self)
            runs: bool = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            return runs
        except psutil.NoSuchProcess:
            return False


@lru_cache
def _find(identity: ProcessIdentity) -> Any:
    """The process, which psutil then tells from others by the time since the system has started."""
    import psutil

    process = psutil.Process(identity.pid)
    # When it began moves with the system's clock.
    if abs(process.create_time() - identity.started_at) > _SAME_START_S:
        raise psutil.NoSuchProcess(identity.pid)
    return process


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
