"""Room in memory: what all images of this process together may hold, by purpose, and how it is shared out.

A leaf. Owns the bounds and the counts; must not know what is held. Whoever holds memory in proportion to what an
overlay, a server or a guest says takes it from a pool: a bound for one of them is none, for there may be any number.

A pool is shared out by *dynamic thresholds* (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998): one
may hold as much as is free, and no more. So one that holds on to what it has, such as a source that does not answer,
leaves as much as that to the others; two leave a third, and so on, without anybody having to know how many there are.
"""

from __future__ import annotations

import threading

import trio

MIB = 1 << 20
# Where the machine has plenty. One source, or one overlay, gets half of it at the most.
MOST_FETCHED_BYTES = 512 * MIB
MOST_TABLES_BYTES = 128 * MIB  # a group commit has two copies of what it writes beside it
MOST_RESTS_BYTES = 256 * MIB
MOST_ALONE_BYTES = 256 * MIB
# What a mount takes without an overlay, libraries included: 30 MiB by itself, and pages of files that it shares.
BASE_BYTES = 48 * MIB
LEAST_BYTES = 16 * MIB  # to be shared out, whatever the limit: with less nothing works


class Pool:
    """Bytes for one purpose."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()  # overlays are opened in threads
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def free_bytes(self) -> int:
        """That nobody holds; negative if the bound was lowered meanwhile."""
        return self.most_bytes - self.used_bytes

    def count(self, size: int) -> None:
        """So much more is held; less, if negative."""
        with self._lock:
            self.used_bytes += size
        if size < 0 and self._waiting:
            self._waiting.unpark_all()

    async def change(self) -> None:
        """Wait until somebody gives something back. Who waits, and who gives back then, is on the event loop."""
        await self._waiting.park()


class Share:
    """What one user holds of a pool. Who drops it gives everything back (`close`)."""

    __slots__ = ("_pool", "held_bytes")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.held_bytes = 0

    @property
    def limit_bytes(self) -> int:
        """That it may hold now."""
        return self._pool.free_bytes

    @property
    def is_over(self) -> bool:
        """Whether it holds more than it may, since others have come or the bound was lowered."""
        return self.held_bytes > self._pool.free_bytes

    @property
    def is_beyond(self) -> bool:
        """Whether it holds more than there is for all together."""
        return self.held_bytes > self._pool.most_bytes

    def fits(self, size: int) -> bool:
        """Whether it may hold so much more. Who holds nothing may take all that is free.

        What is larger than the pool fits when nobody else holds anything: it is somebody else's to refuse.
        """
        free = self._pool.free_bytes
        return self.held_bytes + size <= free or (not self.held_bytes and (size <= free or not self._pool.used_bytes))

    def take(self, size: int) -> None:
        """Hold so much more, whether it fits or not."""
        self.held_bytes += size
        self._pool.count(size)

    def give(self, size: int) -> None:
        """Hold so much less."""
        self.held_bytes -= size
        self._pool.count(-size)

    def close(self) -> None:
        """Give back whatever is held."""
        self.give(self.held_bytes)

    async def change(self) -> None:
        """Wait until somebody gives something back to the pool."""
        await self._pool.change()


FETCHED = Pool(MOST_FETCHED_BYTES)  # in flight from a source, or here and not yet adopted
TABLES = Pool(MOST_TABLES_BYTES)  # of overlays and of qcow2 images
PARTIAL_WRITES = Pool(MOST_RESTS_BYTES)  # of clusters that are written in part
ALONE = Pool(MOST_ALONE_BYTES)  # in flight into the buffers of readers for whom there was no room in FETCHED


def fit_into(limit_bytes: int) -> None:
    """Share out what the process may use of memory. The rest is for replies, threads, sockets and the interpreter."""
    spare = max(LEAST_BYTES, limit_bytes - BASE_BYTES)
    FETCHED.most_bytes = min(MOST_FETCHED_BYTES, spare // 3)
    TABLES.most_bytes = min(MOST_TABLES_BYTES, spare // 6)
    PARTIAL_WRITES.most_bytes = min(MOST_RESTS_BYTES, spare // 6)
    ALONE.most_bytes = min(MOST_ALONE_BYTES, spare // 6)


def largest_cluster() -> int:
    """Bytes of the largest clusters for which there is room: a write may need the rest of two."""
    return min(FETCHED.most_bytes, PARTIAL_WRITES.most_bytes // 2)
