"""A commit of an overlay into its backing on two recording disks: both files at any moment, for power cuts of both."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from qedfs.format.record import Pin, digest, shortened
from qedfs.format.tables import ZERO
from qedfs.image.commit_down import Committed, Pinning, commit_down
from qedfs.image.commit_target import RawTarget, Target
from qedfs.image.qed_target import QedTarget
from qedfs.overlay.clustermap import Run
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.source.qed import QedSource
from qedfs.source.samples import Samples
from tests.fakes.source import FakeSource
from tests.fakes.storage import Entry, MemoryStorage, RecordingStorage
from tests.overlay.cuts import Disk
from tests.overlay.images import BACKING, filled

CLUSTER = 4096
SIZE = 40 * CLUSTER
BASE = random.Random(1).randbytes(24 * CLUSTER)  # it ends inside the image
OWN: dict[int, bytes | int] = {
    0: random.Random(2).randbytes(CLUSTER),
    1: ZERO,
    5: random.Random(3).randbytes(CLUSTER),
    7: BASE[7 * CLUSTER : 8 * CLUSTER],  # fetched, and never written
    23: ZERO,
    30: random.Random(4).randbytes(CLUSTER),  # past the end of the backing
    31: ZERO,
}
DATA, ZEROS = 4 * CLUSTER, 3 * CLUSTER
CHANGED = 3 * CLUSTER + 2 * CLUSTER  # the zeros past the end are there already


def wanted() -> bytes:
    """What the image reads as, before and after."""
    image = bytearray(BASE.ljust(SIZE, b"\0"))
    for cluster, content in OWN.items():
        image[cluster * CLUSTER : (cluster + 1) * CLUSTER] = content if isinstance(content, bytes) else bytes(CLUSTER)
    return bytes(image)


class Log(list[Entry]):
    """Notes at each entry how long both logs are."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def append(self, entry: Entry) -> None:
        super().append(entry)
        self._note()


class Two:
    """An overlay and its backing, and the moments of a commit: the lengths of both logs."""

    def __init__(self, overlay: bytes, backing: bytes = BASE, *, qed: bool = False) -> None:
        self.qed = qed
        self.overlay, self.backing = RecordingStorage(overlay), RecordingStorage(backing)
        self.moments: list[tuple[int, int]] = []
        for storage in (self.overlay, self.backing):
            storage.log = Log(self._note)

    def _note(self) -> None:
        self.moments.append((len(self.overlay.log), len(self.backing.log)))

    async def commit(self, *, keep: bool = False) -> Committed:
        overlay = await open_storage(self.overlay)
        target = await self.target()

        async def renewed(samples: str) -> Pin:
            return Pin(digest(BACKING.decode()), target.size, last_modified="new", samples=samples)

        pinning = Pinning(renewed)
        return await commit_down(overlay, await runs_of(overlay), target, pinning, lambda _: None, keep=keep)

    async def target(self) -> Target:
        if not self.qed:
            return await RawTarget.of(self.backing, lambda: None)

        self.backing.closed = False
        return await QedTarget.of("/base", self.backing, self._reopened)

    def _reopened(self) -> RecordingStorage:
        self.backing.closed = False
        self.backing.barrier()
        return self.backing

    def states(self, rng: random.Random, most: int = 4) -> Iterator[tuple[bytes, bytes]]:
        """Both files after a power cut."""
        return ((overlay, backing) for _, overlay, backing in self.states_at(rng, most))

    def states_at(self, rng: random.Random, most: int = 4) -> Iterator[tuple[int, bytes, bytes]]:
        """The moment of a power cut, and both files after it."""
        overlay, backing = (Disk(storage.start, storage.log) for storage in (self.overlay, self.backing))
        for moment, places in enumerate(self.moments, 1):
            overlay.advance(places[0])
            backing.advance(places[1])
            others = list(backing.cuts(most, rng))
            for cut in overlay.cuts(most, rng):
                # Where the backing grew it has holes, never what a deleted file has left.
                other = rng.choice(others)._replace(garbage=False)
                yield moment, bytes(overlay.build(cut)), bytes(backing.build(other))


def qed_base(cluster_size: int = CLUSTER) -> bytes:
    """BASE as the disk of a QED image."""
    parts: dict[int, bytes | int] = {
        pos // cluster_size: BASE[pos : pos + cluster_size] for pos in range(0, len(BASE), cluster_size)
    }
    return bytes(filled(parts, cluster_size=cluster_size, image_size=len(BASE), backing=b"").data)


async def disk_of(backing: bytes) -> bytes:
    """The disk in a QED image, as a mount reads it."""
    source = await QedSource.open(FakeSource(backing, round_trip=0), "/base")
    disk = bytearray(source.identity.size)
    await source.read(0, memoryview(disk))
    return bytes(disk)


async def started_over_qed(base: bytes | None = None) -> Two:
    """An overlay over a QED image, as a mount has pinned it."""
    base = qed_base() if base is None else base
    source = await QedSource.open(FakeSource(base, round_trip=0, etag=None, last_modified="old"), "/base")
    modified = shortened(source.identity.last_modified) or ""
    return Two(await started(modified=modified), base, qed=True)


async def runs_of(overlay: Overlay) -> list[Run]:
    return await overlay.map(0, overlay.image_size)


async def started(
    own: dict[int, bytes | int] = OWN, *, size: int = SIZE, backing_size: int = len(BASE), modified: str = "old"
) -> bytes:
    """An overlay that is pinned to the backing."""
    storage = MemoryStorage(filled(own, image_size=size).data)
    overlay = await open_storage(storage)
    pin = Pin(digest(BACKING.decode()), backing_size, last_modified=modified)
    await overlay.change_record(lambda record: dataclasses.replace(record, pin=pin))
    await overlay.close()
    return bytes(storage.bytes)


async def differs(pin: Pin, backing: bytes) -> bool:
    samples = Samples.decode(pin.samples)
    assert len(samples)

    async def read(pos: int, view: memoryview) -> None:
        view[:] = backing[pos : pos + len(view)]

    return await samples.difference(read, len(backing)) is not None
