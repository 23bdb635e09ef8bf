"""Safe look-up of local paths: off the event loop, and checked against the policy without a race.

Owns the threads, which a dead file server may block for ever, and the descriptor of the file that was found. Between
two look-ups of one path somebody may replace it by a link, so the file that is checked must be the file that is used.
Must not know what the file or socket is used for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Self, TypeVar

from qedfs.source.policy import Policy
from qedfs.source.threads import in_own_thread
from qedfs.source.url import Location

T = TypeVar("T")
THREADS = 16  # per path


class Held:
    """The file or socket that a location's path led to at look-up, even if the path is replaced later.

    It is held with O_PATH, which does not open it, because a device or a FIFO would react to an open. Close it after
    use.
    """

    def __init__(self, location: Location, policy: Policy) -> None:
        """Look the path up.

        Raises:
            Refused: the policy does not allow the file that was found.
            OSError: the file does not exist, or cannot be reached.
        """
        self._fd = -1  # before anything can fail, for `__del__`
        self._fd = os.open(location.path or "", os.O_PATH | os.O_CLOEXEC)
        try:
            policy.check_path(os.readlink(self.path), location)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """A path to the same file or socket that nobody can redirect to another one."""
        return f"/proc/self/fd/{self._fd}"

    def close(self) -> None:
        """Release the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # If a thread was abandoned, nobody receives its result, so nobody else would close it.
        self.close()


async def in_thread(path: str, function: Callable[[], T]) -> T:
    """Run a call in a thread, as it may wait for the disk that holds `path`, or for ever for a dead file server.

    If the caller is cancelled, the thread is abandoned. It lasts until the server is back, but counts only against the
    limit of this path. Not even a fast call may run on the event loop: the path may lead into a mount of our own, and
    the call would wait for the event loop that it blocks.
    """
    return await in_own_thread(path, function, threads=THREADS)
