"""Which process it is, also when its number has gone to another one."""

from __future__ import annotations

import os
import socket

from pydantic import BaseModel, ConfigDict

_SAME_START_S = 10.0  # the system's clock may be set meanwhile


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
            process = psutil.Process(self.pid)
            apart_s: float = abs(process.create_time() - self.started_at)
            return apart_s <= _SAME_START_S and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
