"""Servers of disks that `qedfs migrate` leaves running on purpose, and which must not outlive their test."""

from __future__ import annotations

import contextlib
import os
import select
import signal


class Left:
    """Those that a test knows of."""

    def __init__(self) -> None:
        self._servers: list[int] = []

    def add(self, pid: int | None) -> None:
        """Remember a process. None is no process."""
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                self._servers.append(os.pidfd_open(pid))

    def kill(self) -> None:
        """End all that still run; returns when they have ended."""
        for server in self._servers:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(server, signal.SIGKILL)
            select.select([server], [], [])
            os.close(server)
        self._servers.clear()
