"""Places in the file: what a failed write leaves there is never seen, and nothing leaks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from qedfs.errors import NoSpace, QedfsError
from qedfs.overlay.check import check
from qedfs.overlay.open import open_storage
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill, read
from tests.overlay.images import empty

T = TypeVar("T")
CLUSTER = 4096


def leaks(storage: MemoryStorage) -> int:
    """Clusters of the file that nothing refers to."""
    as_it_is = MemoryStorage(storage.bytes, writable=False)
    return check(as_it_is, read_header(as_it_is)[0]).leaks


async def test_a_failed_write_leaves_no_trace_where_a_table_may_come() -> None:
    """The place of a failed cluster is used again; what was written there must not become entries of a table."""
    built = empty(image_size=4 << 20, backing=b"")
    storage = MemoryStorage(built.data)
    overlay = await open_storage(storage)
    await overlay.write(0, b"a" * CLUSTER, no_fill)
    end = len(storage.bytes)
    storage.fail("write", NoSpace("full"))
    with pytest.raises(NoSpace):
        await overlay.write(CLUSTER, b"\x10\x20" * 2048, no_fill)
    assert len(storage.bytes) == end
    await overlay.write(2 << 20, b"b" * CLUSTER, no_fill)
    assert await read(overlay, (2 << 20) + CLUSTER, CLUSTER) == bytes(CLUSTER)
    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    assert await again.map((2 << 20) + CLUSTER, CLUSTER) == await overlay.map((2 << 20) + CLUSTER, CLUSTER)


async def test_a_place_that_cannot_be_cut_off_is_no_table() -> None:
    storage = MemoryStorage(empty(image_size=4 << 20, backing=b"").data)
    overlay = await open_storage(storage)
    await overlay.write(0, b"a" * CLUSTER, no_fill)
    storage.fail("write", NoSpace("full"))
    storage.fail("resize", QedfsError("cannot resize"))
    with pytest.raises(NoSpace):
        await overlay.write(CLUSTER, b"\x10\x20" * 2048, no_fill)
    await overlay.write(2 << 20, b"b" * CLUSTER, no_fill)
    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    assert await read(again, (2 << 20) + CLUSTER, CLUSTER) == bytes(CLUSTER)
    await overlay.flush()
    assert leaks(storage) == 0


class Gated(MemoryStorage):
    """Its threads wait at a gate."""

    gate = trio.Event()
    gate.set()

    async def in_thread(self, function: Callable[[], T]) -> T:
        await self.gate.wait()
        return await super().in_thread(function)


async def test_what_a_failed_write_left_is_never_seen(tmp_path: Path) -> None:
    """Its place, with others behind it, takes a whole cluster; no table, and none that is zeros where nobody wrote."""
    storage = Gated(empty(image_size=4 << 20).data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.adopt_zeros(0, 3)
    place = overlay.tables.file_end

    async def meet_full_disk() -> None:
        with pytest.raises(NoSpace):
            await overlay.adopt(8 * CLUSTER, bytearray(b"\x10\x20" * 2048), CLUSTER)

    async with trio.open_nursery() as nursery:
        storage.gate = trio.Event()
        nursery.start_soon(meet_full_disk)
        await trio.testing.wait_all_tasks_blocked()
        await overlay.write(0, b"z" * 512, no_fill)
        storage.fail("write", NoSpace("full"))
        storage.gate.set()
    assert any(storage.bytes[place : place + CLUSTER])
    await overlay.write(CLUSTER, b"y" * 512, no_fill)
    await overlay.write(2 << 20, b"x" * CLUSTER, no_fill)
    assert (await overlay.map(2 << 20, CLUSTER))[0].offset == place
    await overlay.flush()
    assert leaks(storage) == 0

    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    for cluster, expected in ((0, b"z" * 512), (1, b"y" * 512), (512, b"x" * CLUSTER), (513, b""), (8, b"")):
        assert await read(again, cluster * CLUSTER, CLUSTER) == expected.ljust(CLUSTER, b"\0")


@pytest.mark.parametrize("seed", range(20))
async def test_writes_that_failed_together_leave_no_leak(seed: int) -> None:
    """Several adoptions and a guest meet a full disk beside those that do not; all come again when there is room."""
    image = 64 * CLUSTER
    storage = MemoryStorage(empty(image_size=image).data, seed=seed)
    overlay = await open_storage(storage)
    backing = b"b" * CLUSTER
    failures = 0

    async def attempt(write: Callable[[], Awaitable[object]]) -> None:
        nonlocal failures
        try:
            await write()
        except NoSpace:
            failures += 1

    async def everything() -> None:
        async with trio.open_nursery() as nursery:
            for first in range(0, 60, 4):
                data = bytearray(backing * 4)
                nursery.start_soon(attempt, partial(overlay.adopt, first * CLUSTER, data, len(data)))
            nursery.start_soon(attempt, partial(overlay.write, 60 * CLUSTER, b"g" * 4 * CLUSTER, no_fill))

    for nth in (2, 3, 4, 6, 9, 10):
        storage.fail("write", NoSpace("full"), nth=nth, wrote=0.5)
    await everything()
    assert failures >= 5
    storage.mend()
    await everything()
    await overlay.flush()
    assert leaks(storage) == 0
    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    assert await read(again, 0, image) == backing * 60 + b"g" * 4 * CLUSTER
