"""Identity of a process, to find out later whether the process still runs."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict

_SAME_START_S = 10.0  # tolerance for a change of the system clock


class ProcessIdentity(BaseModel):
    """Identity of a process on a host."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    pid: int
    host: str
    started_at: float
    """Start time, in seconds since the epoch."""
    namespace: str | None = None
    """PID namespace; None on systems without namespaces."""

    @classmethod
    def own(cls) -> ProcessIdentity:
        """Return the identity of this process."""
        import psutil  # type: ignore[import-untyped]  # here, since it costs 6 ms

        process = psutil.Process()
        return cls(
            pid=process.pid,
            host=socket.gethostname(),
            started_at=process.create_time(),
            namespace=_pid_namespace(),
        )

    def describe_death(self) -> str:
        """Return the error of a process that ended without one."""
        return f"process {self.pid} on {self.host} died without an error: killed, or out of memory"

    def is_here(self) -> bool:
        """Return True if the process is on this host and in this PID namespace."""
        return self.host == socket.gethostname() and self.namespace == _pid_namespace()

    def track(self) -> None:
        """Look the process up now, so that later changes of the system clock don't matter."""
        self._runs()

    def is_gone(self) -> bool:
        """Return True if the process has certainly ended; False if unknown."""
        return self._runs() is False

    def is_another_running(self) -> bool:
        """Return True if the process certainly runs and is not this process."""
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
    """Return the psutil process, which identifies itself by its start since boot."""
    import psutil

    process = psutil.Process(identity.pid)
    # The start time since the epoch moves with the system clock.
    if abs(process.create_time() - identity.started_at) > _SAME_START_S:
        raise psutil.NoSuchProcess(identity.pid)
    return process


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
