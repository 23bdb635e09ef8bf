"""Seeded workloads on a recording file: what happened, and what it must read as after a crash anywhere in it.

Owns the drawing of geometries, backings and steps from a seed, and `History`, the result of a run. Must not know how a
crash is modelled (`cuts.py`) or judged (`examine.py`).

A run opens an overlay and lets several tasks at once write (whole clusters, parts, over each other), adopt, adopt
zeros, discard, move, drop, flush, commit and store records; some close and open again, some end with a detach, some
meet a full disk.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import trio

import qedfs.overlay.loop_writes as loop_writes_module
import qedfs.overlay.table_slices as table_slices_module
from qedfs.errors import NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.geometry import Geometry
from qedfs.format.header import NEED_CHECK, decode_header
from qedfs.format.record import Pin, digest
from qedfs.format.tables import ZERO
from qedfs.host import memory_pool
from qedfs.overlay.create import create_overlay
from qedfs.overlay.loop_writes import MOST_BYTES as WRITE_NOW_BYTES
from qedfs.overlay.loop_writes import SLOW_SECONDS
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.sectors import SECTOR_ENTRIES
from qedfs.overlay.table_slices import SLICE_ENTRIES
from tests.fakes.storage import RecordingStorage
from tests.model import SECTOR, SectorModel

MOVING = 1_000_000  # from this seed on, a job moves data while guests write
DROPPING = 2_000_000  # from this one on, one drops what the backing has, too
FULL_DISKS = 5  # times that a scenario with a full disk meets it
BACKING_NAME = "base.raw"
# Long enough that the record needs all sectors of its slot: only then can it be torn.
PIN = Pin(digest(BACKING_NAME), 1 << 20, etag="e" * 500, last_modified="m" * 500)
# (cluster size, table size, most sectors of the image)
SHAPES = (
    *((4096, 1, 160), (4096, 1, 4200), (4096, 2, 100), (4096, 4, 60)),
    *((8192, 2, 160), (16384, 1, 200), (65536, 4, 520)),
)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Everything that one seed decides before the overlay is opened."""

    seed: int
    geometry: Geometry
    backing: bytes
    dirty: bool
    detach: bool
    journal: bool  # whether writes are answered before they are committed
    full_disk: int  # the first write that meets a full disk, for some others follow; 0: none
    full_disk_wrote: float  # how much of it was written all the same
    write_now: int = WRITE_NOW_BYTES  # largest write on the event loop; larger ones go to a thread
    slice_entries: int = SLICE_ENTRIES  # of a table
    bad_barrier: int = 0  # the one of a session that fails, with pages that the disk does not take; 0: none
    backed: bool = True  # otherwise the overlay has never had a backing, and what nobody wrote reads as zeros
    trims: int = 3  # discards of each trimmer
    moves: int = 0  # stretches that a job moves
    drops: int = 0  # stretches of which a job drops what is the same in the backing
    killed: str = (
        ""  # the first session is, after the disk has not taken pages: that is "unreported", or "told" to others
    )

    @classmethod
    def draw(cls, seed: int) -> Scenario:
        """The scenario of a seed."""
        rng = random.Random(seed)
        cluster_size, table_size, most = rng.choice(SHAPES)
        size = rng.randint(most // 2, most) * SECTOR
        backing_size = max(0, rng.choice((size, size - rng.randrange(size), size + 5 * cluster_size, size - 100)))
        return cls(
            seed,
            Geometry(cluster_size, table_size, size),
            _backing(rng, backing_size, cluster_size),
            dirty=rng.random() < 0.2,
            detach=rng.random() < 0.4,
            journal=rng.random() < 0.5,
            full_disk=rng.randint(1, 40) if rng.random() < 0.3 else 0,
            full_disk_wrote=rng.choice((0, 0.5, 1)),
            write_now=rng.choice((WRITE_NOW_BYTES, 2048)),
            slice_entries=rng.choice((SLICE_ENTRIES, SECTOR_ENTRIES)),
            bad_barrier=rng.randint(1, 12) if rng.random() < 0.3 else 0,
            killed=rng.choice(("", "", "", "unreported", "told")),
            moves=6 if MOVING <= seed < DROPPING else 0,
            drops=9 if seed >= DROPPING else 0,
        )

    @cached_property
    def base(self) -> bytes:
        """What the image reads as before anybody wrote to it."""
        size = self.geometry.image_size
        return self.backing[:size].ljust(size, b"\0")


@dataclasses.dataclass
class History:
    """What happened in a run."""

    scenario: Scenario
    storage: RecordingStorage
    model: SectorModel
    pinned_at: float = float("inf")  # position from which on the pin must be there
    detached_at: float = float("inf")
    fresh: bool = True  # whether the image had never been written to before
    misreads: list[str] = dataclasses.field(default_factory=list)  # what was wrong before any crash
    failed: bool = False  # whether a barrier has failed in the present session


def fresh_image(geometry: Geometry, backing: str | None = BACKING_NAME) -> bytes:
    """The bytes of a new overlay."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "new.qed")
        create_overlay(
            str(path),
            image_size=geometry.image_size,
            backing=backing,
            cluster_size=geometry.cluster_size,
            table_size=geometry.table_size,
        )
        return path.read_bytes()


def dirty_image(geometry: Geometry) -> bytes:
    """An overlay that a crash of another program left: NEED_CHECK is set, two entries point past the end."""
    image = bytearray(fresh_image(geometry))
    header = decode_header(bytes(image[:64]), len(image))
    image[:64] = dataclasses.replace(header, features=header.features | NEED_CHECK).encode()
    table = bytearray(geometry.table_bytes)
    table[:8] = (1 << 30).to_bytes(8, "little")
    table[16:24] = (1 << 30).to_bytes(8, "little")
    image[header.l1_table_offset : header.l1_table_offset + 8] = len(image).to_bytes(8, "little")
    return bytes(image + table)


async def run(scenario: Scenario) -> History:
    """Run a scenario to its end, or to the first error that no full disk explains."""
    history = _history(scenario)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        try:
            await _all_of_it(Actors(history, random.Random(scenario.seed + 1), Path(folder)))
        except* QedfsError as group:
            history.misreads.append(f"it met an error while it ran: {group.exceptions[0]!r}")
    return history


async def read_all(overlay: Overlay, base: bytes) -> bytearray:
    """The image as a reader sees it. `base` stands for the backing, and is asked only if there is one."""
    content = bytearray(base) if overlay.backing is not None else bytearray(len(base))
    view = memoryview(content)
    for run in await overlay.map(0, overlay.image_size):
        part = view[run.pos : run.pos + run.size]
        if run.offset > ZERO:
            await overlay.read_data(run.offset, part)
        elif run.offset == ZERO:
            part[:] = bytes(run.size)
    return content


class Kill(NamedTuple):
    """What a process that was killed has left: the file, its journal, and when that was (an event of the model)."""

    image: bytes
    journals: dict[str, bytes]  # by file name
    at: int


async def run_and_kill(scenario: Scenario, chance: float) -> tuple[History, list[Kill]]:
    """Run a scenario and keep what a SIGKILL would leave, before one operation in so many."""
    # Its oracle takes a write for safe when it returns, which a disk that fails revokes.
    history = _history(dataclasses.replace(scenario, bad_barrier=0, killed=""))
    model = history.model
    model.on_return = True
    kills: list[Kill] = []
    rng = random.Random(scenario.seed + 2)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:

        def perhaps() -> None:
            if rng.random() < chance:
                left = {path.name: path.read_bytes() for path in Path(folder).glob("disk-*")}
                kills.append(Kill(bytes(history.storage.bytes), left, model.events))

        history.storage.before_step = perhaps
        await _all_of_it(Actors(history, random.Random(scenario.seed + 1), Path(folder), lambda: model.events))
    return history, kills


def _history(scenario: Scenario) -> History:
    backing = BACKING_NAME if scenario.backed else None
    start = dirty_image(scenario.geometry) if scenario.dirty else fresh_image(scenario.geometry, backing)
    storage = RecordingStorage(start, name="disk" if scenario.journal else "", seed=scenario.seed)
    return History(scenario, storage, SectorModel(scenario.base))


async def _all_of_it(actors: Actors) -> None:
    await actors.open()
    actors.meet_full_disk()
    actors.meet_bad_disk()
    await actors.together()
    await (actors.die() if actors.history.scenario.killed else actors.reopen())
    actors.meet_bad_disk()
    if actors.history.scenario.detach:
        await actors.stream_all()
        # Where no guest has written in this session, no note of that brings a barrier.
        await actors.guest(3 * (actors.history.scenario.seed % 2))
        await actors.detach()
    await actors.together()
    if actors.history.failed:
        await actors.reopen()
        await actors.together()
    await actors.close()


async def run_again(image: bytes | bytearray, content: bytes, scenario: Scenario, seed: int) -> History:
    """Go on with what a crash has left, and what was read from it: the history of the time until a second crash."""
    storage = RecordingStorage(image, seed=seed)
    history = History(scenario, storage, SectorModel(content), fresh=False)
    actors = Actors(history, random.Random(seed))
    await actors.open()
    await actors.together()
    await actors.close()
    return history


def run_seed(seed: int) -> History:
    """Draw and run the scenario of a seed, the same way each time."""
    with repeatable(seed):
        return trio.run(run, Scenario.draw(seed))


@contextmanager
def process() -> Iterator[None]:
    """What runs in the block ends with it, however it ends: overlays that nobody has closed hold no room any more."""
    held = memory_pool.TABLES.used_bytes
    try:
        yield
    finally:
        memory_pool.TABLES.count(held - memory_pool.TABLES.used_bytes)


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Let trio take its tasks in an order that depends on the seed only (as in trio's own determinism test).

    What a scenario has set in the overlay layer is undone at the end.
    """
    import trio._core._run as loop

    loop._r.seed(seed)
    try:
        with process(), mock.patch.object(loop, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
            yield
    finally:
        loop_writes_module.MOST_BYTES = WRITE_NOW_BYTES
        loop_writes_module.SLOW_SECONDS = SLOW_SECONDS
        table_slices_module.SLICE_ENTRIES = SLICE_ENTRIES


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


def _backing(rng: random.Random, size: int, cluster_size: int) -> bytes:
    """Random bytes, two clusters in five of them zeros."""
    clusters = [
        bytes(cluster_size) if rng.random() < 0.4 else rng.randbytes(cluster_size)
        for _ in range(-(-size // cluster_size))
    ]
    return b"".join(clusters)[:size]
