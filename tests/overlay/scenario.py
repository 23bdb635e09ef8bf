"""Seeded workloads on a recording file: what happened, and what it must read as after a crash anywhere in it.

Owns the drawing of geometries, backings and troubles from a seed, and `History`, the result of a run. Must not know
what the tasks of a run do (`actors.py`), in which order (`runs.py`), how a crash is modelled (`cuts.py`) or judged
(`examine.py`).
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from unittest import mock

import qedfs.overlay.loop_writes as loop_writes_module
import qedfs.overlay.table_slices as table_slices_module
from qedfs.format.geometry import Geometry
from qedfs.format.header import NEED_CHECK, decode_header
from qedfs.format.record import Pin, digest
from qedfs.format.tables import ZERO
from qedfs.host import memory_pool
from qedfs.overlay.create import create_overlay
from qedfs.overlay.loop_writes import MOST_BYTES as WRITE_NOW_BYTES
from qedfs.overlay.loop_writes import SLOW_SECONDS
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


def _backing(rng: random.Random, size: int, cluster_size: int) -> bytes:
    """Random bytes, two clusters in five of them zeros."""
    clusters = [
        bytes(cluster_size) if rng.random() < 0.4 else rng.randbytes(cluster_size)
        for _ in range(-(-size // cluster_size))
    ]
    return b"".join(clusters)[:size]
