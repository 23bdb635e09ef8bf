"""A service manager's end of the notify socket, and mounts that are started for one."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.hang import HANG_SECONDS


class Listener:
    """The socket that a service manager listens at, and what it was told so far."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.lines: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(address.replace("@", "\0", 1))

    def collect(self) -> list[str]:
        """What has come by now, nothing is waited for; all lines since the start."""
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._take()
        return self.lines

    def wait_for(self, start: str, *, count: int = 1) -> str:
        """The last of `count` lines that begin with `start`, which may have come before.

        Raises:
            TimeoutError: it did not come.
        """
        while True:
            found = [line for line in self.collect() if line.startswith(start)]
            if len(found) >= count:
                return found[count - 1]
            self._socket.settimeout(HANG_SECONDS)
            self._take()

    def close(self) -> None:
        self._socket.close()

    def _take(self) -> None:
        self.lines += self._socket.recv(4096).decode().splitlines()


@contextlib.contextmanager
def listener() -> Iterator[Listener]:
    """A listener at a path short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="qedfs-notify-"))
    found = Listener(str(folder / "notify"))
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(folder)
