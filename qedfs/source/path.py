"""Local paths: looked up off the event loop, and judged by what they turn out to lead to.

Owns the threads that a dead file server may keep for ever, and the hold on what was found: between two look-ups of
one name somebody may put a link in its place, so what is judged must be what is used. Must not know what becomes of
the file or socket.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Self, TypeVar

from qedfs.source.policy import Policy
from qedfs.source.threads import in_own_thread
from qedfs.source.url import Location

T = TypeVar("T")
THREADS = 16  # for each path


class Held:
    """What a location's path led to when it was looked up, whatever becomes of the name. To be closed.

    Nothing is opened by that (O_PATH): a device or a FIFO would notice.
    """

    def __init__(self, location: Location, policy: Policy) -> None:
        """Look the path up, once.

        Raises:
            Refused: the policy does not allow what was found.
            OSError: there is nothing, or no way to it.
        """
        self._fd = -1  # first of all: `__del__` looks at it
        self._fd = os.open(location.path or "", os.O_PATH | os.O_CLOEXEC)
        try:
            policy.check_path(os.readlink(self.path), location)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """Another path of the same file or socket, without a name that could be given to something else."""
        return f"/proc/self/fd/{self._fd}"

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # The result of a thread that was given up reaches nobody who could close it.
        self.close()


async def in_thread(path: str, function: Callable[[], T]) -> T:
    """Run a call that may wait for the disk behind `path`, or for ever for a dead file server.

    Such a thread is abandoned at the deadline and stays until the server is back; it takes its place from nobody but
    others at the same path. Never on the event loop: a path may lead into a mount of our own, which would wait for us.
    """
    return await in_own_thread(path, function, threads=THREADS)
