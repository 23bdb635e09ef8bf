"""Reads of overlay bytes that are not in the page cache: a few tries on the event loop, then a worker thread.

Owns the decision between the two. Must not know clusters or images.

The first try of `Storage.read_now` has already started the I/O: Linux begins readahead also for RWF_NOWAIT, and returns
EAGAIN until the pages are there. An SSD takes some 80 us for that, and a trip through a worker thread costs 120 to 190
us of processor time. So it pays to let other tasks run once or a few times and to try again. On a slow disk it does
not, so the tries are suspended when they fail.
"""

from __future__ import annotations

import trio

from qedfs.overlay.storage import Storage

MOST_BYTES = 128 << 10  # of a read with tries: Linux reads ahead this much by default (read_ahead_kb)
TRIES = 16  # trips through the scheduler: about 10 us each if no other task is ready
CREDIT = 4  # fruitless reads in a row before the tries are suspended
PAUSE = 64  # reads without tries before the next attempt


class ColdReads:
    """The cold reads of one overlay file."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._credit = CREDIT  # negative: the number of reads before tries are made again

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` after `Storage.read_now` has returned False for it. Raises what `Storage.read` raises."""
        if len(view) > MOST_BYTES or not await self._tried(offset, view):
            await self._storage.in_thread(lambda: self._storage.read(offset, view))

    async def _tried(self, offset: int, view: memoryview) -> bool:
        if self._credit < 0:
            self._credit += 1
            return False
        for _ in range(TRIES):
            await trio.lowlevel.checkpoint()
            if self._storage.read_now(offset, view):
                self._credit = CREDIT
                return True
        self._credit = self._credit - 1 if self._credit > 1 else -PAUSE
        return False
