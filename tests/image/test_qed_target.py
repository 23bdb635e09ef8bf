"""A QED image as the backing that is written to: what it reads as before, during and after its session."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.errors import InUse, QedfsError, SourceError, SourceUnreachable, UsageError
from qedfs.format.record import Record
from qedfs.image.backing_file import find_file, open_qed
from qedfs.image.qed_target import QedTarget, StillQed
from qedfs.overlay.session import read_header
from qedfs.overlay.storage import Storage
from qedfs.source.policy import Policy
from qedfs.source.samples import Samples
from qedfs.source.url import parse_location
from tests.fakes.storage import BarrierEnded, MemoryStorage, RecordingStorage
from tests.image.commits import disk_of
from tests.overlay.images import Built, filled

CLUSTER = 4096
TABLE = 512  # clusters
SIZE = (TABLE + 40) * CLUSTER
DATA = {n: random.Random(n).randbytes(CLUSTER) for n in (0, 1, 5, TABLE - 1, TABLE + 3)}


def built() -> Built:
    return filled({**DATA, 2: 1, TABLE: 1}, image_size=SIZE, backing=b"")


def disk() -> bytes:
    whole = bytearray(SIZE)
    for cluster, data in DATA.items():
        whole[cluster * CLUSTER : (cluster + 1) * CLUSTER] = data
    return bytes(whole)


class Waiting(MemoryStorage):
    """The page cache has nothing of it, unless it was `read`."""

    warm = False

    def read_now(self, offset: int, view: memoryview) -> bool:
        return self.warm and super().read_now(offset, view)


def still_of(storage: Storage) -> StillQed:
    return StillQed(storage, read_header(storage)[0], "/base")


def test_a_file_at_rest_is_read_across_tables_and_holes() -> None:
    storage = Waiting(built().data)
    still, whole, numbers = still_of(storage), disk(), random.Random(3)
    for number in range(200):
        storage.warm = number % 2 == 0
        pos = numbers.choice((0, CLUSTER, 4 * CLUSTER, (TABLE - 2) * CLUSTER)) + numbers.randrange(5000)
        view = memoryview(bytearray(b"\xa5" * numbers.randint(1, 8 * CLUSTER)))
        if storage.warm:
            assert still.read_now(pos, view)
        else:
            assert not still.read_now(pos, view)
            still.read_waiting(pos, view)
        assert view == whole[pos : pos + len(view)]
    assert still.hole_end(2 * CLUSTER + 7) == 3 * CLUSTER
    assert still.hole_end(5 * CLUSTER + 7) == 5 * CLUSTER + 7


def test_a_damaged_entry_is_an_error_that_names_the_backing() -> None:
    made = built()
    made.put_u64(made.header.l1_table_offset + 8, 512)
    with pytest.raises(SourceError, match="backing /base has an L2 table at 0x200"):
        still_of(MemoryStorage(made.data)).read_waiting(TABLE * CLUSTER, memoryview(bytearray(1)))


async def target_of(storage: MemoryStorage) -> QedTarget:
    def reopened() -> MemoryStorage:
        storage.closed = False
        storage.barrier()
        return storage

    return await QedTarget.of("/base", storage, reopened)


async def test_its_samples_are_of_places_that_keep_what_they_have() -> None:
    storage = RecordingStorage(built().data)
    target, samples = await target_of(storage), Samples()
    taken = {}
    for pos in range(0, SIZE, 4 * CLUSTER):
        taken.update(await target.sample(pos, 4 * CLUSTER, samples))
    assert {pos // CLUSTER for pos in taken.values()} == {0, 5, TABLE - 1, TABLE + 3}
    assert sorted(taken) == samples.places
    assert storage.log == []
    await target.begin()
    for pos in (CLUSTER, 7 * CLUSTER, (TABLE + 20) * CLUSTER):
        await target.store(pos, memoryview(b"n" * 2 * CLUSTER))
    await target.zero(3 * CLUSTER, CLUSTER)
    for _ in range(2):
        assert await samples.difference(target.read_file, target.file_size) is None
        await target.rest()
    await target.close()


async def test_it_reads_right_at_any_time_and_comes_to_rest_durably() -> None:
    storage, wanted = RecordingStorage(built().data), bytearray(disk())
    target = await target_of(storage)

    async def right() -> None:
        view = memoryview(bytearray(8 * CLUSTER))
        for pos in (0, (TABLE - 4) * CLUSTER):
            await target.read(pos, view)
            assert view == wanted[pos : pos + len(view)]

    await right()
    await target.begin()
    await right()
    await target.store(6 * CLUSTER, memoryview(b"n" * CLUSTER))
    wanted[6 * CLUSTER : 7 * CLUSTER] = b"n" * CLUSTER
    await right()
    await target.sync()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(right)
        nursery.start_soon(target.rest)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(right)
    assert isinstance(storage.log[-1], BarrierEnded)
    length = len(storage.log)
    await target.rest()
    await target.sync()
    view = memoryview(bytearray(CLUSTER))
    assert target.read_now(6 * CLUSTER, view)
    assert view == b"n" * CLUSTER
    await target.close()
    assert len(storage.log) == length
    assert await disk_of(bytes(storage.bytes)) == wanted


async def test_what_fails_on_the_way_to_rest_is_told_each_time() -> None:
    def fails() -> Storage:
        raise QedfsError("cannot sync")

    target = await QedTarget.of("/base", MemoryStorage(built().data), fails)
    await target.begin()
    for _ in range(2):
        with pytest.raises(QedfsError, match="cannot sync"):
            await target.rest()
    with pytest.raises(SourceUnreachable, match="backing /base: cannot sync"):
        await target.read(0, memoryview(bytearray(1)))
    await target.close()


async def test_who_changes_the_file_while_nobody_has_it_locked_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "base"
    location, policy = parse_location(str(path)), Policy((str(tmp_path),))
    for changed in (False, True):
        path.write_bytes(built().data)
        target = await open_qed(location, await find_file(location, policy, probes=True))
        with pytest.raises(InUse):
            await open_qed(location, await find_file(location, policy, probes=True))
        await target.begin()
        reopened = target._reopened

        def replaced(reopened: Callable[[], Storage] = reopened) -> Storage:
            other = path.with_name("other")
            other.write_bytes(path.read_bytes())
            other.replace(path)
            return reopened()

        if changed:
            target._reopened = replaced
            with pytest.raises(InUse, match="another program has changed it meanwhile"):
                await target.rest()
        else:
            await target.rest()
            with pytest.raises(InUse):
                await open_qed(location, await find_file(location, policy, probes=True))
        await target.close()
        assert await disk_of(await trio.Path(path).read_bytes()) == disk()


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (Record(sequence=1), ""),
        (Record(sequence=1, session="ab" * 8), ""),  # a commit that was killed: it has no journal
        (
            Record(sequence=1, session="ab" * 8, journal="x"),
            "a mount of it was killed; unmount the image, and use qedfs commit OVERLAY",
        ),
    ],
)
async def test_a_file_that_an_opening_would_change_is_told(record: Record, told: str) -> None:
    target = await target_of(MemoryStorage(built().data))
    target._record = record
    if told:
        with pytest.raises(UsageError, match=told):
            target.check_settled()
    else:
        target.check_settled()
