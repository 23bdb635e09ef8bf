"""Memory pools: how much all images of this process together may hold for each purpose, and how they share it.

Owns the bounds and the counters; must not know what the memory holds. Imports nothing of the project. Code whose memory
use is set by an overlay, a server or a guest must take that memory from a pool. A bound per image is not enough,
because the number of images is not bounded.

A pool is divided by *dynamic thresholds* (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998): each
user may hold as much as is currently free, and no more. So a user that gives nothing back, such as a source that does
not answer, leaves half of the pool to the others; two of them leave a third, and so on. Nobody has to know how many
users there are.
"""

from __future__ import annotations

import threading

import trio

MIB = 1 << 20
# The bounds on a machine with plenty of memory. A single source or overlay gets at most half of a pool.
MOST_FETCHED_BYTES = 512 * MIB
MOST_TABLES_BYTES = 128 * MIB  # not counted: the two copies that a group commit makes of the tables it writes
MOST_PARTIAL_WRITES_BYTES = 256 * MIB
MOST_ALONE_BYTES = 256 * MIB
# A mount without overlays, libraries included: 30 MiB of its own, and shared pages of files.
BASE_BYTES = 48 * MIB
LEAST_BYTES = 16 * MIB  # for the pools, however low the limit: nothing works with less


class Pool:
    """The bytes that all users together may hold for one purpose."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()  # overlays are opened in threads
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody holds; negative if the bound has been lowered."""
        return self.most_bytes - self.used_bytes

    def count(self, size: int) -> None:
        """Add `size` to the bytes held; a negative size gives bytes back and wakes the waiters."""
        with self._lock:
            self.used_bytes += size
        if size < 0 and self._waiting:
            self._waiting.unpark_all()

    async def change(self) -> None:
        """Wait until a user gives bytes back. Both sides must run on the event loop while anyone waits."""
        await self._waiting.park()


class Share:
    """The bytes that one user holds of a pool. Close it before dropping it."""

    __slots__ = ("_pool", "held_bytes")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.held_bytes = 0

    @property
    def limit_bytes(self) -> int:
        """How many bytes this user may hold now."""
        return self._pool.free_bytes

    @property
    def is_over(self) -> bool:
        """Whether it holds more than its limit, because other users have come or the bound has been lowered."""
        return self.held_bytes > self._pool.free_bytes

    @property
    def is_beyond(self) -> bool:
        """Whether it alone holds more than the bound of the whole pool."""
        return self.held_bytes > self._pool.most_bytes

    def fits(self, size: int) -> bool:
        """Whether it may take `size` more bytes. A user that holds nothing may take all that is free.

        A size larger than the whole pool fits while nobody holds anything: the pool does not refuse it, the caller may.
        """
        free = self._pool.free_bytes
        return self.held_bytes + size <= free or (not self.held_bytes and (size <= free or not self._pool.used_bytes))

    def take(self, size: int) -> None:
        """Take `size` bytes from the pool, whether they fit or not."""
        self.held_bytes += size
        self._pool.count(size)

    def give(self, size: int) -> None:
        """Give `size` bytes back."""
        self.held_bytes -= size
        self._pool.count(-size)

    def close(self) -> None:
        """Give back everything."""
        self.give(self.held_bytes)

    async def change(self) -> None:
        """Wait until any user of the pool gives bytes back."""
        await self._pool.change()


FETCHED = Pool(MOST_FETCHED_BYTES)  # requested from a source, or received and not yet adopted
TABLES = Pool(MOST_TABLES_BYTES)  # tables of overlays, and of sources in qcow2 or QED format
PARTIAL_WRITES = Pool(MOST_PARTIAL_WRITES_BYTES)  # the rest of clusters that a guest writes in part
ALONE = Pool(MOST_ALONE_BYTES)  # fetched straight into a reader's own buffer, because FETCHED was full


def fit_into(limit_bytes: int) -> None:
    """Set the bounds of the pools so that they fit into the memory limit of the process.

    What the pools do not get is for replies, threads, sockets and the interpreter.
    """
    spare = max(LEAST_BYTES, limit_bytes - BASE_BYTES)
    FETCHED.most_bytes = min(MOST_FETCHED_BYTES, spare // 3)
    TABLES.most_bytes = min(MOST_TABLES_BYTES, spare // 6)
    PARTIAL_WRITES.most_bytes = min(MOST_PARTIAL_WRITES_BYTES, spare // 6)
    ALONE.most_bytes = min(MOST_ALONE_BYTES, spare // 6)


def largest_cluster() -> int:
    """The largest cluster size, in bytes, that the pools can handle: one write may need the rest of two clusters."""
    return min(FETCHED.most_bytes, PARTIAL_WRITES.most_bytes // 2)
