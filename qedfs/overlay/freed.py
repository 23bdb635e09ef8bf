"""The space of discarded clusters, on its way back: to the file system, and to the allocator.

Owns the order. The data of a cluster stays as it is until

1. a barrier has made the entry durable that no longer refers to it. After a power cut, the old entry would otherwise
   show what has taken the place;
2. the session journal has no older entry of the cluster. After a kill, it would do the same;
3. every read and every write in place has ended that may have looked up the place before the discard
   (`accesses.py`). It would otherwise read, or overwrite, the bytes of another cluster.

Then the space is punched out of the file, and the allocator may use it again. If the file system cannot punch, it holds
old bytes, and is used only for clusters of which every byte is written. A session forgets what it has not used; then it
is a leak, which takes no space. What a killed session leaves does; `qedfs check --repair` gives it back.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence

import trio

from qedfs.errors import QedfsError
from qedfs.overlay.accesses import Accesses
from qedfs.overlay.allocator import MOST_BLANK, Allocator
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.storage import Storage


class FreedClusters:
    """The freed clusters of one overlay, as offsets in the file."""

    def __init__(self, storage: Storage, cluster_size: int, barriers: Barriers, allocator: Allocator) -> None:
        self.accesses = Accesses()
        self.discards = 0  # changes when clusters are freed, so that what was looked up before may be out of date
        self._storage = storage
        self._cluster_size = cluster_size
        self._barriers = barriers
        self._allocator = allocator
        self._waiting: list[int] = []  # whose discard is in no group of the committer yet
        self._durable: deque[tuple[int, list[int]]] = deque()  # (the first access that cannot have looked them up, ...)
        self._durable_count = 0
        self._lock = trio.Lock()  # held while a thread punches
        self._ended = False

    @property
    def crowded(self) -> bool:
        """Whether more are waiting than should."""
        return len(self._waiting) > MOST_BLANK

    def add(self, offsets: list[int]) -> None:
        """Add clusters whose entries have just been set to zero in memory."""
        if offsets:
            self._waiting += offsets
            self.discards += 1

    def take(self) -> list[int]:
        """Take those whose discards a group is about to write. No await since its snapshot of the entries."""
        taken, self._waiting = self._waiting, []
        return taken

    def put_back(self, offsets: list[int]) -> None:
        """Wait for another group, because this one has failed."""
        self._waiting += offsets

    def landed(self, offsets: list[int]) -> None:
        """Their discards are durable, and not contradicted by the journal."""
        if offsets and self._durable_count < MOST_BLANK:  # more than that become leaks
            self._durable.append((self.accesses.next, offsets))
            self._durable_count += len(offsets)

    async def give_back(self) -> None:
        """Give back what no access can refer to any more. Raises nothing: what cannot be given back is a leak.

        A second call waits for the first, whose clusters it would otherwise take for done. If it is cancelled, the rest
        stays for the next call.
        """
        try:
            self._lock.acquire_nowait()  # not `async with`, which takes a turn of the event loop even if it is free
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            while self._may_go_on() and self._durable and self._durable[0][0] <= self.accesses.oldest:
                offsets = self._durable[0][1]
                runs = list(_runs(sorted(offsets), self._cluster_size))
                try:
                    punched = await self._storage.in_thread(functools.partial(self._punch, runs))
                except QedfsError:
                    return  # the file was truncated, and nothing more is written to it
                # Nobody else takes from the left, because we have the lock.
                self._durable.popleft()
                self._durable_count -= len(offsets)
                if self._barriers.writable:
                    self._allocator.recycle(offsets, blank=punched)
        finally:
            self._lock.release()

    @contextlib.asynccontextmanager
    async def ended(self) -> AsyncIterator[None]:
        """Wait for the thread that gives space back, and give nothing back any more. Holds the lock."""
        # The caller is about to close the descriptor. Its number may then be that of another file, in which a thread
        # that goes on would punch holes.
        async with self._lock:
            self._ended = True
            yield

    def _may_go_on(self) -> bool:
        return self._barriers.writable and not self._ended

    def _punch(self, runs: Sequence[tuple[int, int]]) -> bool:
        """Whether all of them read as zeros now."""
        return sum(self._storage.punch(offset, size) for offset, size in runs) == len(runs)


def _runs(offsets: Sequence[int], cluster_size: int) -> Iterator[tuple[int, int]]:
    """Neighbouring clusters as (offset, size)."""
    for _, group in itertools.groupby(enumerate(offsets), lambda pair: pair[1] - pair[0] * cluster_size):
        places = [offset for _, offset in group]
        yield places[0], len(places) * cluster_size
