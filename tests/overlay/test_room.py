"""A full disk: discards give their space back all the same, and what they free is used by whoever lacks it.

`tests/mount/test_full_disk.py` does the same on a real file system.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qedfs.errors import NoSpace
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay import discard as discard_module
from qedfs.overlay.check import check
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from qedfs.overlay.storage import Buffer
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import filled

CLUSTER = 4096
PAGE = 4096
PER_TABLE = 512
DATA = {cluster: bytes([65 + cluster]) * CLUSTER for cluster in range(6)}


class SmallDisk(MemoryStorage):
    """A file on a disk with so many pages of free space, which overwrites in place. Holes take no page."""

    def __init__(self, data: bytes | bytearray, *, free: int) -> None:
        super().__init__(data, name="disk")
        self.free = free
        self.pages = {at for at in range(0, len(data), PAGE) if any(data[at : at + PAGE])}

    def _take(self, offset: int, size: int) -> None:
        new = set(range(offset // PAGE * PAGE, offset + size, PAGE)) - self.pages
        if len(new) > self.free:
            raise NoSpace("the file system is full")
        self.free -= len(new)
        self.pages |= new

    def write(self, offset: int, data: Sequence[Buffer]) -> None:
        self._take(offset, sum(map(len, data)))
        super().write(offset, data)

    def reserve(self, offset: int, size: int) -> None:
        super().reserve(offset, size)
        self._take(offset, size)

    def punch(self, offset: int, size: int) -> bool:
        gone = self.pages & set(range(offset, offset + size, PAGE))
        self.free += len(gone)
        self.pages -= gone
        return super().punch(offset, size)

    def resize(self, size: int) -> None:
        gone = {page for page in self.pages if page >= size}
        self.free += len(gone)
        self.pages -= gone
        super().resize(size)


async def opened(journals: Path | None, *, data: dict[int, bytes] = DATA) -> tuple[SmallDisk, Overlay]:
    """An overlay of four tables, of which the first exists, on a full disk."""
    built = filled(data, image_size=4 * PER_TABLE * CLUSTER)
    disk = SmallDisk(built.data, free=8)
    overlay = await open_storage(disk, journal_folder=journals)
    disk.free = 0
    return disk, overlay


async def entry(overlay: Overlay, cluster: int) -> int:
    await overlay.load(cluster * CLUSTER, 1)
    return overlay.clusters.entry(cluster)


@pytest.mark.parametrize("journaled", [True, False])
async def test_a_discard_of_data_and_of_what_is_missing(tmp_path: Path, journaled: bool) -> None:
    """The entries of three new tables, and of L1, find their space in what the data has given back."""
    disk, overlay = await opened(tmp_path if journaled else None)
    assert await overlay.discard(0, 4 * PER_TABLE) == 4 * PER_TABLE - len(DATA)
    await overlay.flush()
    await overlay.give_space_back()
    assert [await entry(overlay, table * PER_TABLE) for table in range(4)] == [ZERO] * 4
    assert disk.free > 0
    again = MemoryStorage(disk.bytes)
    assert check(again, read_header(again)[0]).corruptions == 0


@pytest.mark.parametrize("journaled", [True, False])
async def test_where_there_is_no_space_for_entries_only_data_is_discarded(
    tmp_path: Path, journaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discard_module, "CLUSTERS_AT_ONCE", PER_TABLE // 2)
    disk, overlay = await opened(tmp_path if journaled else None, data={1: DATA[1]})
    with pytest.raises(NoSpace, match="that were missing"):
        await overlay.discard(0, 4 * PER_TABLE)
    assert await entry(overlay, 1) == ZERO
    assert await entry(overlay, 4 * PER_TABLE - 1) == MISSING
    # The guest's flushes go on to succeed.
    await overlay.flush()
    disk.free = 8
    await overlay.discard(0, 4 * PER_TABLE)
    await overlay.flush()
    assert await entry(overlay, 4 * PER_TABLE - 1) == ZERO


async def test_entries_without_space_do_not_keep_discards_from_giving_theirs(tmp_path: Path) -> None:
    """A write took the last page for its data. Its entry is in a new table, so the commit fails."""
    disk, overlay = await opened(tmp_path)
    disk.free = 1
    await overlay.write(PER_TABLE * CLUSTER, b"w" * CLUSTER, no_fill)
    with pytest.raises(NoSpace):
        await overlay.flush()
    await overlay.discard(0, 1)
    await overlay.flush()
    assert await entry(overlay, PER_TABLE) > ZERO
    assert DATA[0] not in disk.bytes
    again = await open_storage(MemoryStorage(disk.bytes), journal_folder=None)
    assert await entry(again, 0) == ZERO
    assert await entry(again, PER_TABLE) > ZERO


async def test_a_write_uses_what_a_discard_has_just_freed(tmp_path: Path) -> None:
    disk, overlay = await opened(tmp_path)
    with pytest.raises(NoSpace):
        await overlay.write(9 * CLUSTER, b"w" * CLUSTER, no_fill)
    await overlay.discard(0, 2)
    await overlay.write(9 * CLUSTER, b"w" * CLUSTER, no_fill)
    await overlay.close()
    again = MemoryStorage(disk.bytes)
    assert check(again, read_header(again)[0]).corruptions == 0


async def test_a_kill_after_a_group_of_which_only_discards_are_durable(tmp_path: Path) -> None:
    """The journal has the whole group: the write that the discard came after, too."""
    disk, overlay = await opened(tmp_path)
    disk.free = 2
    await overlay.write(7 * CLUSTER, b"7" * CLUSTER, no_fill)
    await overlay.discard(7, 1)
    await overlay.write(PER_TABLE * CLUSTER, b"w" * CLUSTER, no_fill)
    with contextlib.suppress(NoSpace):
        await overlay.committer.commit()
    await overlay.give_space_back()
    await overlay.write(8 * CLUSTER, b"8" * CLUSTER, no_fill)  # in the place of the first
    again = await open_storage(MemoryStorage(disk.bytes, name="disk"), journal_folder=tmp_path)
    assert again.journal_remark == ""
    assert await entry(again, 7) == ZERO
    for cluster, byte in ((8, b"8"), (PER_TABLE, b"w")):
        view = memoryview(bytearray(CLUSTER))
        await again.read_data(await entry(again, cluster), view)
        assert bytes(view) == byte * CLUSTER


async def test_a_barrier_comes_before_the_space_of_what_is_durable_alone_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, overlay = await opened(tmp_path)
    disk.free = 1
    await overlay.write(PER_TABLE * CLUSTER, b"w" * CLUSTER, no_fill)
    await overlay.discard(0, 1)
    order: list[str] = []
    for name in ("write", "barrier", "punch"):
        real = getattr(disk, name)

        def noting(*args: object, name: str = name, real: Callable[..., object] = real) -> object:
            order.append(name)
            return real(*args)

        monkeypatch.setattr(disk, name, noting)
    with pytest.raises(NoSpace):
        await overlay.committer.commit()
    await overlay.give_space_back()
    last_write = len(order) - 1 - order[::-1].index("write")
    assert order[last_write + 1 :] == ["barrier", "punch"]
    assert DATA[0] not in disk.bytes
