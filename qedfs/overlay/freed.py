"""The space of discarded clusters, on its way back: to the file system, and to the allocator.

Owns the order. Must not know why a cluster was freed, nor change any entry. The data of a cluster stays as it is until

1. a barrier has made the entry durable that no longer refers to it. After a power cut, the old entry would otherwise
   show what has taken the place;
2. the session journal has no older entry of the cluster, or a later one that says that it was discarded. After a kill,
   it would do the same;
3. every read and every write in place has ended that may have looked up the place before the discard
   (`accesses.py`). It would otherwise read, or overwrite, the bytes of another cluster;
4. it is certain that no other entry refers to it (`references.py`), as one may in a damaged overlay.

Then the space is punched out of the file, and the allocator may use it again. If the file system cannot punch, it holds
old bytes, and is used only for clusters of which every byte is written. What earlier sessions have leaked follows.

A punch costs a file system much the same for one cluster as for a thousand, some 100 us. So while an overlay is laid
out anew, the punches may be put off (`put_off`): until then, many of the places have become neighbours.

A session forgets what it has not used, nor punched. That is a leak, until a later session finds it.
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
from qedfs.overlay.allocator import Allocator
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.clustermap import Freed
from qedfs.overlay.free_places import FreePlaces
from qedfs.overlay.references import References
from qedfs.overlay.storage import Storage

MOST_WAITING = 1 << 14  # clusters; more are committed, and their space is given back, before others are discarded
MOST_DURABLE = 1 << 16  # clusters whose discard is durable, and whose space is not given back yet: some MiB of memory
# Clusters whose punch is put off. If none has a neighbour, ext4 takes a second or two, and an end of the mount waits.
MOST_PUT_OFF = 1 << 14
SECONDS_AT_ONCE = 2.0  # how long one call gives space back. The caller has other work to do, such as commits.
# What a thread punches before others get its lock: at most so many places, or clusters in them. 256 places take ext4
# some ms.
RUNS_AT_ONCE = 256
CLUSTERS_AT_ONCE = 4096


class FreedClusters:
    """The freed clusters of one overlay, as offsets in the file."""

    def __init__(
        self, storage: Storage, cluster_size: int, barriers: Barriers, allocator: Allocator, references: References
    ) -> None:
        self.accesses = Accesses()
        self.discards = 0  # changes when clusters are freed, so that what was looked up before may be out of date
        self.put_off = False  # whether clusters that could be punched wait for their neighbours
        self.references = references
        self._storage = storage
        self._cluster_size = cluster_size
        self._barriers = barriers
        self._allocator = allocator
        self._waiting: Freed = {}  # whose discard is in no group of the committer yet
        self._waiting_count = 0
        self._durable: deque[tuple[int, list[int]]] = deque()  # (the first access that cannot have looked them up, ...)
        self._durable_count = 0
        self._put_off = FreePlaces(cluster_size)
        self._put_off_count = 0
        self._leaks: Iterator[int] | None = None  # of earlier sessions, once they are known, until all are given back
        self._given = 0  # how many clusters were given back
        self._lock = trio.Lock()  # held while a thread punches
        self._ended = False

    @property
    def crowded(self) -> bool:
        """Whether more are waiting than should."""
        return self._waiting_count > MOST_WAITING

    @property
    def any(self) -> bool:
        """Whether there is, or may be, space to give back. That whose punch is put off does not count."""
        if self._put_off and not self.put_off:
            return True
        return bool(self._waiting or self._durable or self._leaks is not None or not self.references.known)

    @property
    def put_off_bytes(self) -> int:
        """How much space waits because its punch was put off."""
        return self._put_off_count * self._cluster_size

    def add(self, freed: Freed) -> None:
        """Add clusters whose entries have just been set to zero in memory."""
        if freed:
            self.put_back(freed)
            self.discards += 1

    def take(self) -> Freed:
        """Take those whose discards a group is about to write. No await since its snapshot of the entries."""
        taken, self._waiting, self._waiting_count = self._waiting, {}, 0
        return taken

    def put_back(self, freed: Freed) -> None:
        """Let them wait for another group, because this one has failed."""
        for sector, offsets in freed.items():
            self._waiting.setdefault(sector, []).extend(offsets)
            self._waiting_count += len(offsets)

    def landed(self, freed: Freed) -> None:
        """Their discards are durable, and not contradicted by the journal."""
        if freed and self._durable_count < MOST_DURABLE:  # more than that become leaks
            offsets = sorted(itertools.chain.from_iterable(freed.values()))
            self._durable.append((self.accesses.next, offsets))
            self._durable_count += len(offsets)

    async def give_back(self) -> bool:
        """Give back what no access can refer to any more. Returns whether that was anything.

        Raises nothing: what cannot be given back is a leak. A second call waits for the first, whose clusters it would
        otherwise take for done. After SECONDS_AT_ONCE, or if it is cancelled, the rest stays for the next call.
        """
        if not self.any:
            return False
        try:
            self._lock.acquire_nowait()  # not `async with`, which takes a turn of the event loop even if it is free
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            before = self._given
            with trio.move_on_after(SECONDS_AT_ONCE):
                await self._give_back()
            return self._given > before
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

    async def _give_back(self) -> None:
        while self._may_go_on():
            if not self.references.known:
                try:
                    await self.references.look()
                except QedfsError:
                    return  # the disk fails; the next call goes on
                self._leaks = self._leaked()
                continue
            if self.references.problem:
                self._durable.clear()
                self._durable_count = 0
                self._put_off, self._put_off_count = FreePlaces(self._cluster_size), 0
            if not (offsets := self._next()):
                break
            if self.put_off and self._put_off_count < MOST_PUT_OFF:
                self._put_off.add(offsets)
                self._put_off_count += len(offsets)
                self._forget(offsets)
                await trio.lowlevel.checkpoint()
                continue
            runs = list(_runs(offsets, self._cluster_size))
            try:
                punched = await self._storage.in_thread(functools.partial(self._punch, runs))
            except QedfsError:
                break  # the file was truncated, and nothing more is written to it
            self._forget(offsets)
            if self._barriers.writable:
                self._allocator.recycle(offsets, blank=punched)
                self._given += len(offsets)

    def _forget(self, offsets: list[int]) -> None:
        """They are done, as `_next` has returned them. Nobody else takes from the left, because we have the lock."""
        del self._durable[0][1][: len(offsets)]
        self._durable_count -= len(offsets)

    def _take_put_off(self, most: int) -> list[int]:
        offsets = self._put_off.take_lowest(RUNS_AT_ONCE, most)
        self._put_off_count -= len(offsets)
        return offsets

    def _next(self) -> list[int]:
        """The clusters to punch next, in ascending order; none if all others have to wait."""
        while self._durable and not self._durable[0][1]:
            self._durable.popleft()
        if not self._durable and not self.put_off and (offsets := self._take_put_off(CLUSTERS_AT_ONCE)):
            self._durable.append((self.accesses.oldest, offsets))  # the accesses that mattered have ended before
            self._durable_count += len(offsets)
        # Leaks come last. As with a discard, a barrier must have come between whatever made them leaks and the punch.
        if not self._durable and self._leaks is not None and self._barriers.count:
            if leaks := list(itertools.islice(self._leaks, CLUSTERS_AT_ONCE)):
                self._durable.append((self.accesses.oldest, leaks))
                self._durable_count += len(leaks)
            else:
                self._leaks = None
        if not self._durable or self._durable[0][0] > self.accesses.oldest:
            return []
        offsets = self._durable[0][1]
        most = min(len(offsets), CLUSTERS_AT_ONCE)
        ends = (at for at in range(1, most) if offsets[at] != offsets[at - 1] + self._cluster_size)
        return offsets[: next(itertools.islice(ends, RUNS_AT_ONCE - 1, None), most)]

    def _leaked(self) -> Iterator[int]:
        """What was in nobody's use at the opening."""
        for offset, size in self.references.leaks():
            yield from range(offset, offset + size, self._cluster_size)

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
