"""Room in memory for the rest of clusters that are written in part: each write holds up to two whole clusters.

Owns what one write takes of its image's share. Must not know what is done with it.
"""

from __future__ import annotations

import trio

from qedfs.host import memory_pool

# Of one image. Others may leave it less.
MOST_BYTES = 128 << 20


class RmwBudget:
    """What the writes of one image hold."""

    def __init__(self, cluster_size: int) -> None:
        self._size = 2 * cluster_size
        self._share = memory_pool.Share(memory_pool.PARTIAL_WRITES)

    def take_now(self) -> bool:
        """Take room for one write, if there is any."""
        held = self._share.held_bytes
        if (held and held + self._size > MOST_BYTES) or not self._share.fits(self._size):
            return False
        self._share.take(self._size)
        return True

    async def take(self) -> None:
        """Take room for one write as soon as there is any."""
        while not self.take_now():
            await self._share.change()

    def give_back(self) -> None:
        """Of one write."""
        self._share.give(self._size)


class RmwReservation:
    """The room of one write, taken when it first needs some, for both of its clusters."""

    def __init__(self, rests: RmwBudget) -> None:
        self._rmw_budget = rests
        self._begun: trio.Event | None = None
        self._taken = False

    def take_now(self) -> bool:
        """Take it if there is room at once; False: wait for it with `take`."""
        if not self._taken and self._begun is None:
            self._taken = self._rmw_budget.take_now()
        return self._taken

    async def take(self) -> None:
        """Wait until there is room for this write."""
        if self._begun is not None:
            await self._begun.wait()
            return
        self._begun = trio.Event()
        await self._rmw_budget.take()
        self._taken = True
        self._begun.set()

    def give_back(self) -> None:
        """The write has ended."""
        if self._taken:
            self._rmw_budget.give_back()
