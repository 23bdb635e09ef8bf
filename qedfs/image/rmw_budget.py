"""The memory budget of partial writes: each fetches up to two whole clusters, and holds them until it ends.

Owns how much of the image's share one write takes. A write waits here while there is no room. Must not know what the
memory contains.
"""

from __future__ import annotations

import trio

from qedfs.host import memory_pool

# For one image. It may get less, because other images share the pool.
MOST_BYTES = 128 << 20


class RmwBudget:
    """The budget of one image."""

    def __init__(self, cluster_size: int) -> None:
        self._size = 2 * cluster_size
        self._share = memory_pool.Share(memory_pool.PARTIAL_WRITES)

    def take_now(self) -> bool:
        """Reserve memory for one write if there is room. Returns whether it did."""
        held = self._share.held_bytes
        if (held and held + self._size > MOST_BYTES) or not self._share.fits(self._size):
            return False
        self._share.take(self._size)
        return True

    async def take(self) -> None:
        """Reserve memory for one write; waits until there is room."""
        while not self.take_now():
            await self._share.change()

    def give_back(self) -> None:
        """Release the memory of one write."""
        self._share.give(self._size)


class RmwReservation:
    """The reservation of one write. The memory is reserved when the write first needs any, once for both clusters."""

    def __init__(self, budget: RmwBudget) -> None:
        self._rmw_budget = budget
        self._begun: trio.Event | None = None
        self._taken = False

    def take_now(self) -> bool:
        """Reserve if there is room. If it returns False, wait with `take`."""
        if not self._taken and self._begun is None:
            self._taken = self._rmw_budget.take_now()
        return self._taken

    async def take(self) -> None:
        """Reserve; waits until there is room."""
        if self._begun is not None:
            await self._begun.wait()
            return
        self._begun = trio.Event()
        await self._rmw_budget.take()
        self._taken = True
        self._begun.set()

    def give_back(self) -> None:
        """Release the memory, if any, after the write has ended."""
        if self._taken:
            self._rmw_budget.give_back()
