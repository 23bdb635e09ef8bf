"""The tasks of a run: guests, an adopter, a trimmer, jobs, somebody who flushes, all of them on one overlay at once.

Owns what each of them does, and tells the model of it. Must not know in which order a run calls them (`runs.py`).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

import qedfs.overlay.loop_writes as loop_writes_module
import qedfs.overlay.table_slices as table_slices_module
from qedfs.errors import NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.tables import ZERO
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.model import SECTOR
from tests.overlay.scenario import FULL_DISKS, PIN, History, read_all


class Actors:
    """The tasks of a run."""

    def __init__(
        self,
        history: History,
        rng: random.Random,
        journals: Path | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        """`clock` tells the model's time; by default the length of the log."""
        loop_writes_module.MOST_BYTES = history.scenario.write_now
        loop_writes_module.SLOW_SECONDS = math.inf  # a seed must not depend on how fast this machine is
        table_slices_module.SLICE_ENTRIES = history.scenario.slice_entries
        self.history = history
        self._now = clock or (lambda: len(self._storage.log))
        self._journals = journals
        self._model = history.model
        self._rng = rng
        self._storage = history.storage
        self._geometry = history.scenario.geometry
        self._focus = self._hot_clusters()
        self._serial = 0
        self.overlay: Overlay

    def _hot_clusters(self) -> list[int]:
        """Few clusters, so that tasks meet: at the start, around the border of two L2 tables or slices, the last."""
        clusters = self._geometry.clusters
        entries = min(self._geometry.entries, self.history.scenario.slice_entries)
        border = entries if clusters > entries else clusters // 2
        return sorted({c for c in (0, 1, 2, border - 1, border, border + 1, clusters - 1) if 0 <= c < clusters})

    async def open(self) -> None:
        self.overlay = await open_storage(self._storage, journal_folder=self._journals)
        self.overlay.tables._cache_slices = 2

    def meet_full_disk(self) -> None:
        scenario = self.history.scenario
        for number in range(FULL_DISKS if scenario.full_disk else 0):
            nth = scenario.full_disk + 4 * number
            self._storage.fail("write", NoSpace("full"), nth=nth, wrote=scenario.full_disk_wrote)

    def meet_bad_disk(self) -> None:
        if self.history.scenario.bad_barrier:
            rng = random.Random(self._rng.randrange(1 << 30))
            self._storage.lose_at(self.history.scenario.bad_barrier, rng, self._lost)

    def _lost(self) -> None:
        self.history.failed = True
        self._model.lost()

    async def close(self) -> None:
        with self._trouble_allowed():
            await self.overlay.close()

    async def reopen(self) -> None:
        """Close and open. A close that met a full disk leaves what a crash leaves."""
        await self.flush()
        await self.close()
        await self._open_again()

    async def die(self) -> None:
        """Be killed and open, after the kernel has lost pages; the first to open may have to be told."""
        for _ in range(8):  # into clusters that nobody has written to, most likely: only the journal has their entries
            sector = self._rng.randrange(self._geometry.image_size // SECTOR)
            await self.write(sector * SECTOR, SECTOR)
        self._storage.lose_now(self._rng, told=self.history.scenario.killed == "told")
        self._lost()
        self.overlay._journal.close(remove=False)
        try:
            await self._open_again()
        except QedfsError:
            await self._open_again()

    async def _open_again(self) -> None:
        self._storage = self.history.storage = self._storage.reopened(seed=self._rng.randrange(1 << 30))
        await self.open()
        if self.history.failed:
            self.history.failed = False
            content = await read_all(self.overlay, self.history.scenario.base)
            if fault := self._model.fault(content, self._now()):
                self.history.misreads.append(f"opened again after a failed barrier: {fault}")
            self._model.settled(content, self._now())

    async def together(self) -> None:
        """Writers, an adopter and somebody who flushes, all at once."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.guest, 5)
            nursery.start_soon(self.guest, 4)
            nursery.start_soon(self.trimmer, self.history.scenario.trims)
            nursery.start_soon(self.adopter, 4)
            nursery.start_soon(self.syncer, 5)
            nursery.start_soon(self.recorder, 2)
            nursery.start_soon(self.reader, 4)
            if self.history.scenario.moves:
                nursery.start_soon(self.mover, self.history.scenario.moves)
            if self.history.scenario.drops:
                nursery.start_soon(self.dropper, self.history.scenario.drops)

    async def pause(self) -> None:
        for _ in range(self._rng.randrange(12)):
            await trio.lowlevel.checkpoint()

    async def guest(self, count: int) -> None:
        for _ in range(count):
            await self.pause()
            await self.write(*self._extent())

    async def trimmer(self, count: int) -> None:
        """Discard some clusters, sometimes all of them."""
        for _ in range(count):
            await self.pause()
            first = self._rng.choice(self._focus)
            many = self._geometry.clusters if self._rng.random() < 0.1 else self._rng.randint(1, 3)
            await self.discard(first, min(many, self._geometry.clusters - first))

    async def discard(self, first: int, count: int) -> None:
        pos = first * self._geometry.cluster_size
        size = min(count * self._geometry.cluster_size, self._geometry.image_size - pos)
        version = self._model.begin(self._now(), pos, bytes(size))
        with self._trouble_allowed():
            await self.overlay.discard(first, count)
            self._model.returned(version)

    async def mover(self, count: int) -> None:
        """Move stretches of the image to the end of the file, or to a free place, as a defragmentation does."""
        relocation = self.overlay.relocation
        for _ in range(count):
            await self.pause()
            first = self._rng.choice(self._focus)
            many = self._rng.randint(1, min(6, self._geometry.clusters - first))
            if first % 3:
                relocation.punch_again()
            else:
                await relocation.put_off_punches()
            with self._trouble_allowed():
                low = self._rng.random() < 0.3
                gathering = await (relocation.lower(first, many, 1 << 40) if low else relocation.gather(first, many))
                if gathering is not None:
                    with gathering:
                        while not gathering.ended and self._rng.random() < 0.9:
                            await gathering.step(self._rng.choice((1, 1 << 20)))
            if self._rng.random() < 0.3:
                await self.overlay.give_space_back()

    async def dropper(self, count: int) -> None:
        """Drop what the backing has, too, as the end of a commit into it does."""
        for _ in range(count):
            await self.pause()
            if self.overlay.backing is None:
                return
            first = self._rng.choice(self._focus)
            many = self._rng.randint(1, min(6, self._geometry.clusters - first))
            with self._trouble_allowed():
                self.overlay.dropping.allow()
                await self.overlay.dropping.drop(first, many, StillBacking(self.history.scenario.base))
            self.overlay.dropping.forbid()
            if self._rng.random() < 0.3:
                await self.overlay.give_space_back()

    async def reader(self, count: int) -> None:
        """Read beside everything else, and hold what comes back against what had been written by then."""
        base = self.history.scenario.base
        for _ in range(count):
            await self.pause()
            pos, length = self._extent()
            since = self._model.events
            epoch = -1
            while epoch != self.overlay.epoch:
                found = bytearray(base[pos : pos + length])
                runs = await self.overlay.map(pos, length)
                epoch = self.overlay.epoch
                with self.overlay.reading():
                    for run in runs:
                        await self.pause()
                        part = memoryview(found)[run.pos - pos : run.pos - pos + run.size]
                        if run.offset > ZERO:
                            await self.overlay.read_data(run.offset, part)
                        elif run.offset == ZERO or self.overlay.backing is None:
                            part[:] = bytes(run.size)
            for start in range(0, length, SECTOR):
                legal = self._model.legal_read((pos + start) // SECTOR, since, self._model.events)
                if found[start : start + SECTOR] not in legal:
                    self.history.misreads.append(f"sector {(pos + start) // SECTOR} was read wrong while it ran")

    def _extent(self) -> tuple[int, int]:
        """Where to write: part of a cluster, a whole one, several, or the tail."""
        cluster_size, size = self._geometry.cluster_size, self._geometry.image_size
        pos = self._rng.choice(self._focus) * cluster_size
        kind = self._rng.randrange(4)
        if kind == 0:
            length = cluster_size
        elif kind == 1:
            pos += self._rng.randrange(0, cluster_size, SECTOR)
            length = SECTOR * self._rng.randint(1, 3)
        elif kind == 2:
            length = cluster_size * 3
        else:
            pos += self._rng.randrange(0, cluster_size, SECTOR)
            length = cluster_size + SECTOR
        pos = min(pos, size - SECTOR)
        return pos, min(length, size - pos)

    async def write(self, pos: int, length: int) -> None:
        """One write of bytes that nobody else writes."""
        self._serial += 1
        stamp = self._serial.to_bytes(2, "little") + b"guest."
        data = b"".join((stamp + sector.to_bytes(8, "little")) * 32 for sector in range(length // SECTOR))
        version = self._model.begin(self._now(), pos, data)
        with self._trouble_allowed():
            await self.overlay.write(pos, data, self.fill)
            self._model.returned(version)

    async def fill(self, cluster: int) -> bytes:
        """The backing's bytes of a cluster, a while later, with junk behind the image's end."""
        await self.pause()
        cluster_size = self._geometry.cluster_size
        return self.history.scenario.base[cluster * cluster_size :][:cluster_size].ljust(cluster_size, b"J")

    async def adopter(self, count: int) -> None:
        for _ in range(count):
            if self.overlay.backing is not None:
                await self.adopt(self._rng.choice(self._focus), self._rng.randint(1, 3))

    async def adopt(self, first: int, count: int) -> None:
        """What a fetch does: the bytes are those of some time before."""
        cluster_size = self._geometry.cluster_size
        count = min(count, self._geometry.clusters - first)
        data = bytearray(self.history.scenario.base[first * cluster_size : (first + count) * cluster_size])
        await self.pause()
        with self._trouble_allowed():
            if any(data):
                await self.overlay.adopt(first * cluster_size, data, len(data), cold=self._rng.random() < 0.5)
            else:
                await self.overlay.adopt_zeros(first, count)

    async def stream_all(self) -> None:
        """Adopt whatever is missing, as the stream does."""
        with self._trouble_allowed():
            cluster = 0
            while (found := await self.overlay.clusters.next_missing(cluster, 4)) is not None:
                await self.adopt(*found)
                cluster = found[0]

    async def syncer(self, count: int) -> None:
        for _ in range(count):
            await self.pause()
            if self._rng.random() < 0.3:
                with self._trouble_allowed():
                    await self.overlay.commit()
            else:
                await self.flush()
            await self.overlay.give_space_back()

    async def flush(self) -> None:
        since = self._model.flushing()
        with self._trouble_allowed():
            await flush(self.overlay)
            self._model.flushed(since, self._now())

    async def recorder(self, count: int) -> None:
        """Store the pin again and again, each time with another wish of the user."""
        for number in range(count):
            await self.pause()
            if self.overlay.backing is None:
                return
            fields = {"pin": PIN, "paused": bool(number % 2)}
            with self._trouble_allowed():
                await self.overlay.change_record(partial(dataclasses.replace, **fields))
                self.history.pinned_at = min(self.history.pinned_at, self._now())

    async def detach(self) -> None:
        since = self._model.flushing()
        with self._trouble_allowed():
            await self.overlay.detach()
            self.history.detached_at = self._now()
            self._model.flushed(since, self._now())

    @contextmanager
    def _trouble_allowed(self) -> Iterator[None]:
        """A full disk, or one that has failed a barrier."""
        try:
            yield
        except NoSpace:
            return
        except ReadOnlyOverlay:
            if not self.history.failed:
                raise


class StillBacking:
    """A backing that nobody changes, for a drop (`Below`)."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read_now(self, pos: int, view: memoryview) -> bool:
        self.read_waiting(pos, view)
        return True

    def read_waiting(self, pos: int, view: memoryview) -> None:
        view[:] = self._content[pos : pos + len(view)]

    def hole_end(self, pos: int) -> int:
        return pos if any(self._content[pos : pos + 4096]) else pos + 4096


async def flush(overlay: Overlay) -> None:
    """As an fsync does: the short way if possible."""
    ended = trio.Event()
    errors: list[Exception | None] = []

    def done(error: Exception | None) -> None:
        errors.append(error)
        ended.set()

    if not overlay.flush_now(done):
        await overlay.flush()
        return
    await ended.wait()
    if errors[0] is not None:
        raise errors[0]
