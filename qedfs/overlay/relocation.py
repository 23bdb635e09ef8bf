"""Moves data inside the file, so that neighbours in the image become neighbours in the file.

Owns the order of a move, and what a guest's write to a cluster that is moved means. Must not know why a cluster is
moved (`jobs/defrag.py`). The protocol is at the top of `overlay.py`.

1. The data is copied to a new place. From the look-up of the old place to the new entry in the session journal and in
   memory, there is no await. So no write, discard or adoption on the event loop comes in between, and a guest's bytes
   always win: whatever was written before is copied, and whatever follows goes to the new place. Only a write in a
   thread may still be under way at the old place. A move waits for its end before it looks the place up.
   The journal comes first. If it does not take the entry, nothing is moved until it is void: a kill in the middle of
   the next commit would leave an entry in the file that the journal contradicts, so that all of it would be refused.
2. A commit writes the entry after a barrier, which covers the copy. Without it, the cluster could read as what was in
   the new place before, after a power cut, although the old place has the guest's flushed bytes.
3. The old place is free as that of a discarded cluster is (`freed.py`): after a second barrier, and after the last
   access that may have looked it up. A power cut could otherwise bring the old entry back, over another cluster's data.

The copy is made on the event loop, in pieces of PIECE_BYTES: 60 us for 128 KiB from and to the page cache. A thread
would need a note of every write that comes meanwhile, at the expense of all writes. What is not in the page cache is
read in a thread first. No piece is copied where a write on the event loop could wait (`loop_writes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Self

import trio

from qedfs.format.tables import ZERO
from qedfs.overlay.clustermap import Freed
from qedfs.overlay.journal import moved_to
from qedfs.overlay.loop_writes import MOST_BYTES
from qedfs.overlay.parts import Parts

PIECE_BYTES = 128 << 10
ROOM_BYTES = 1 << 30
CROWDED_SECONDS = 0.05  # until a write on the event loop is tried again, if it could have waited for the disk


class Layout(NamedTuple):
    """How the data of a stretch of the image lies in the file."""

    clusters: int  # that have data
    pieces: int  # of neighbours in the file, in the order of the image
    first: int  # the offset of the first one


class Relocation:
    """The moves of one overlay."""

    def __init__(self, parts: Parts) -> None:
        self._storage = parts.storage
        self._map = parts.clusters
        self._committer = parts.committer
        self._barriers = parts.barriers
        self._journal = parts.journal
        self._session = parts.session
        self._allocator = parts.allocator
        self._pending = parts.pending
        self._freed = parts.freed
        self._loop_writes = parts.loop_writes
        self._cluster_size = parts.clusters.geometry.cluster_size
        self.most_clusters = MOST_BYTES // self._cluster_size  # of one piece; 0: clusters are too large

    @property
    def problem(self) -> str:
        """Why the places that moves leave are not used again; "" if they are, as far as is known."""
        return self._freed.references.problem

    async def put_off_punches(self) -> None:
        """Punch old places later, when many are neighbours, as long as the file system has room for that meanwhile.

        Up to half of the free space is used so, and ROOM_BYTES are left to others. Call this again and again.
        """
        free = await self._storage.in_thread(self._storage.free_bytes)
        self._freed.put_off = free - self._freed.put_off_bytes >= ROOM_BYTES

    def punch_again(self) -> None:
        """Put off no more punches. `give_space_back` then has those that were."""
        self._freed.put_off = False

    def find_leaks(self) -> None:
        """Let `give_space_back` have what earlier sessions have leaked, such as one that was killed during a move."""
        self._freed.references.begin()

    @property
    def put_off_bytes(self) -> int:
        """How much space waits for a punch that was put off."""
        return self._freed.put_off_bytes

    async def layout(self, first: int, count: int) -> Layout:
        """How the data of these clusters lies in the file. Raises BadOverlay for an invalid table."""
        await self._load(first, count)
        places = [self._map.entry(cluster) for cluster in self._map.data_in(first, count)]
        expected = [0, *(place + self._cluster_size for place in places[:-1])]
        pieces = sum(place != follows for place, follows in zip(places, expected, strict=False))
        return Layout(len(places), pieces, places[0] if places else 0)

    async def gather(self, first: int, count: int) -> Gathering | None:
        """Begin to move the data of these clusters to one place at the end of the file. None if they have none.

        Raises what `Overlay.write` raises. Nothing has changed then.
        """
        data = await self._ready(first, count)
        if not data:
            return None
        size = len(data) * self._cluster_size
        return Gathering(self, data, self._allocator.zeros(size), size)

    async def lower(self, first: int, count: int, below: int) -> Gathering | None:
        """Likewise, to the lowest free place before offset `below`. None if none is large enough."""
        data = await self._ready(first, count)
        if not data or (offset := self._allocator.low_blank(len(data), below)) is None:
            return None
        return Gathering(self, data, offset, len(data) * self._cluster_size)

    async def _ready(self, first: int, count: int) -> list[int]:
        """The clusters with data among these, when the file may grow. No await follows the check of either."""
        await self._session.ready()
        await self._load(first, count)
        while await self._committer.secure_marks():
            await self._load(first, count)
        self._barriers.check_writable()
        return self._map.data_in(first, count)

    async def _load(self, first: int, count: int) -> None:
        pos, size = first * self._cluster_size, count * self._cluster_size
        while not self._map.is_loaded(pos, size):
            await self._map.load(pos, size)

    async def move(self, clusters: list[int], offset: int) -> int | None:
        """Move those of these clusters that still have data, one after the other from `offset` on. Returns how many.

        None: not now, as the event loop could have to wait for the disk. Call it again, unless that is not wanted any
        more. Raises NoSpace: no entry has changed, and nobody uses what is at `offset`.
        """
        buffer = memoryview(bytearray(len(clusters) * self._cluster_size))
        cold = False
        while True:
            data = await self._settled(clusters)
            size = len(data) * self._cluster_size
            if not data:
                return 0
            # The reads count, too: some file systems keep no pages, and let each of them wait for a server.
            if not self._loop_writes.may_begin(0):
                await trio.sleep(CROWDED_SECONDS)
                return None
            # No await since `_settled`, nor before the end of `_publish`.
            try:
                if found := self._read(data, buffer, cold=cold):
                    self._storage.write(offset, (buffer[:size],))
            finally:
                self._loop_writes.ended()
            if not found:
                await self._warm(data, buffer)
                cold = True
            elif self._publish(found, offset):
                break
        if cold:
            self._committer.note_cold(offset, size)
        # No await since `_publish`, either. A caller that is cancelled would free the place, to which entries refer.
        return len(data)

    async def _settled(self, clusters: list[int]) -> list[int]:
        """Those that have data, once something may be stored and nobody writes to their places in a thread."""
        first, last = clusters[0], clusters[-1]
        while True:
            await self._load(first, last + 1 - first)
            if self._pending.hold is not None:
                await self._pending.hold.wait()  # the file is being copied
                continue
            if self._journal.outlived:
                # It would contradict the new entry, and take nothing that explains it.
                await self._session.give_up_journal()
                continue
            self._barriers.check_writable()
            data = [cluster for cluster in clusters if self._map.entry(cluster) > ZERO]
            under_way = (self._pending.write_into(self._place(cluster), self._cluster_size) for cluster in data)
            if (done := next((event for event in under_way if event is not None), None)) is None:
                return data
            await done.wait()

    def _place(self, cluster: int) -> int:
        return self._map.checked(self._map.entry(cluster), cluster)

    def _read(self, data: list[int], buffer: memoryview, *, cold: bool) -> list[tuple[int, int]]:
        """Fill the buffer with their data. Returns (cluster, place) of each; nothing if a read would have to wait.

        `cold`: a thread has just read it. If it is still not to be had at once, the file system never says so.
        """
        found = [(cluster, self._place(cluster)) for cluster in data]
        size = self._cluster_size
        for number, (_, place) in enumerate(found):
            view = buffer[number * size : (number + 1) * size]
            if not self._storage.read_now(place, view):
                if not cold:
                    return []
                self._storage.read(place, view)
        return found

    async def _warm(self, data: list[int], buffer: memoryview) -> None:
        """Bring their data into the page cache."""
        size = self._cluster_size
        places = [self._place(cluster) for cluster in data]

        def read_all() -> None:
            for number, place in enumerate(places):
                self._storage.read(place, buffer[number * size : (number + 1) * size])

        with self._freed.accesses.running():
            await self._storage.in_thread(read_all)

    def _publish(self, found: list[tuple[int, int]], offset: int) -> bool:
        """Set the new entries. Returns False if the journal does not take them: nothing has changed then."""
        entries = [(cluster, offset + number * self._cluster_size) for number, (cluster, _) in enumerate(found)]
        self._journal.append([(cluster, moved_to(place)) for cluster, place in entries])
        if self._journal.outlived:
            return False
        first, last = found[0][0], found[-1][0]
        self._freed.references.before_discard(first, last + 1 - first)
        freed: Freed = {}
        for cluster, place in entries:
            self._map.move(cluster, place, freed)
        self._committer.note_data(len(entries) * self._cluster_size)
        self._freed.add(freed)
        return True

    def give_back(self, places: Iterable[int]) -> None:
        """Free what was allocated for a move and not used."""
        self._allocator.give_back(places)


class Gathering:
    """A stretch of the image whose data is being moved to one place. Leave the context to give back what is left."""

    def __init__(self, relocation: Relocation, clusters: list[int], offset: int, size: int) -> None:
        self._relocation = relocation
        self._left = clusters
        self._offset = offset
        self._end = offset + size
        self._cluster_size = size // len(clusters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._offset < self._end:
            self._relocation.give_back(range(self._offset, self._end, self._cluster_size))

    @property
    def ended(self) -> bool:
        """Whether nothing is left to move."""
        return not self._left

    @property
    def next(self) -> int:
        """The first cluster that is left to move. Only if it has not `ended`."""
        return self._left[0]

    async def step(self, most_bytes: float = PIECE_BYTES) -> int:
        """Move the next piece, of at most so many bytes, but one cluster at least. Returns how many bytes were moved.

        0 if that has to wait for the disk (a frozen file system, many dirty pages), after CROWDED_SECONDS. Raises what
        `Overlay.write` raises. What was moved before stays moved, and nothing is lost.
        """
        most = max(1, int(min(most_bytes, PIECE_BYTES)) // self._cluster_size)
        piece = self._left[:most]
        count = await self._relocation.move(piece, self._offset)
        moved = (count or 0) * self._cluster_size
        self._offset += moved
        if count is not None:
            del self._left[: len(piece)]
        return moved
