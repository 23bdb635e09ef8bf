"""In which order one read of an image asks the disk and the source, with stand-ins for both."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

from qedfs.fetch.queue import FetchQueue
from qedfs.format.record import Record
from qedfs.format.tables import MISSING
from qedfs.image.image import Image
from qedfs.overlay.clustermap import Run
from qedfs.overlay.overlay import Overlay
from qedfs.source.base import Identity

CLUSTER_SIZE = 65536


class HalfFilled:
    """An overlay whose first cluster is there, not in the page cache, and whose second is missing."""

    writable = False
    backing = "http://source/"
    image_size = 2 * CLUSTER_SIZE
    cluster_size = CLUSTER_SIZE
    epoch = 0
    discards = 0
    record = Record()

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def read_now(self, pos: int, size: int) -> None:
        """Not in the page cache."""

    async def map(self, pos: int, size: int) -> list[Run]:
        return [Run(CLUSTER_SIZE * 8, 0, CLUSTER_SIZE), Run(MISSING, CLUSTER_SIZE, CLUSTER_SIZE)]

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def read_data(self, offset: int, view: memoryview) -> None:
        self._asked.append("disk")
        view[:] = b"d" * len(view)


class Elsewhere:
    """The queue of a source."""

    remote = SimpleNamespace(identity=Identity(2 * CLUSTER_SIZE))
    nursery = None  # nobody looks at the source on its own

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def read(self, pieces: Sequence[tuple[int, memoryview]], **_: Any) -> None:
        self._asked.append("source")
        for _pos, view in pieces:
            view[:] = b"s" * len(view)


async def test_the_source_is_asked_before_anything_waits_for_the_disk() -> None:
    """Else the stream may bring a cluster in meanwhile, and the reader, whose look at the map is old, a second time."""
    asked: list[str] = []
    image = Image("disk.raw", cast("Overlay", HalfFilled(asked)), cast("FetchQueue", Elsewhere(asked)))
    assert image.version is not None
    image.version.identity = Elsewhere.remote.identity
    assert bytes(await image.read(0, 2 * CLUSTER_SIZE)) == b"d" * CLUSTER_SIZE + b"s" * CLUSTER_SIZE
    assert asked == ["source", "disk"]
