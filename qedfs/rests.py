"""Room in memory for the rest of clusters that are written in part: each write holds up to two whole clusters.

Owns the bound for one image, whatever clusters its overlay has. A leaf.
"""

from __future__ import annotations

import contextlib

import trio

MOST_BYTES = 128 << 20


class Rests:
    """How many writes may hold the rest of their clusters at once."""

    def __init__(self, cluster_size: int) -> None:
        self.room = trio.Semaphore(max(1, MOST_BYTES // (2 * cluster_size)))


class Share:
    """The room of one write, taken when it first needs some, for both of its clusters."""

    def __init__(self, rests: Rests) -> None:
        self._room = rests.room
        self._begun: trio.Event | None = None
        self._taken = False

    def take_now(self) -> bool:
        """Take it if there is room at once; False: wait for it with `take`."""
        if not self._taken and self._begun is None:
            # Semaphore.acquire costs a turn of the event loop even if it is free.
            with contextlib.suppress(trio.WouldBlock):
                self._room.acquire_nowait()
                self._taken = True
        return self._taken

    async def take(self) -> None:
        """Wait until there is room for this write."""
        if self._begun is not None:
            await self._begun.wait()
            return
        self._begun = trio.Event()
        await self._room.acquire()
        self._taken = True
        self._begun.set()

    def give_back(self) -> None:
        """The write has ended."""
        if self._taken:
            self._room.release()
