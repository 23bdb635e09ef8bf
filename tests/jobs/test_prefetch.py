"""What a profile lists is brought in first, in its order, though readers wait; and nothing else is."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qedfs.errors import SourceError
from qedfs.image.image import Image
from qedfs.image.write_gate import WriteGate, Writes
from qedfs.jobs.prefetch import replay
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

MIB = 1 << 20


async def test_what_is_listed_and_nothing_else(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(bytes(range(256)) * (8 * MIB // 256))
    async with served(source) as image:
        await replay(image, [(5 * MIB + 100, 200), (CLUSTER, 2 * CLUSTER), (5 * MIB, 4096), (7 * MIB, 1)])
        assert image.fetch is not None
        await image.fetch.landed(image.consumer)
        assert sorted((pos, size) for pos, size, _ in source.reads) == [
            (CLUSTER, 2 * CLUSTER),
            (5 * MIB, CLUSTER),
            (7 * MIB, CLUSTER),
        ]
        assert image.populated == 4 * CLUSTER
        assert bytes(await image.read(5 * MIB + 100, 200)) == source.content[5 * MIB + 100 : 5 * MIB + 300]


async def test_it_goes_on_while_a_reader_waits(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"p" * (32 * MIB))
    async with served(source) as image:
        await image.read(0, 512)
        source.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.read, 16 * MIB, 512)
            nursery.start_soon(replay, image, [(pos, 512) for pos in range(MIB, 9 * MIB, MIB // 4)])
            await trio.sleep(5)
            assert source.in_flight == 1 + 32
            source.gate.set()


async def test_the_stream_stands_back_until_the_list_is_through(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"p" * (64 * MIB))
    ranges = [(pos, 512) for pos in range(63 * MIB, 32 * MIB, -CLUSTER)]
    async with served(source) as image:
        job = StreamJob(image)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replay, image, ranges)
            await trio.sleep(1.5 * source.round_trip)  # it has connected and asked
            nursery.start_soon(job.run)
        assert image.complete
        asked = [pos for pos, _, _ in source.reads]
        # The requests that fill the window together with the last of the list leave in any order.
        assert set(asked[:300]) <= {pos for pos, _ in ranges}
        assert source.bytes_read == 64 * MIB


async def test_bytes_behind_the_source_and_in_the_overlay_are_not_asked_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = FakeSource(b"p" * (MIB + 100))
    async with served(source, image_size=4 * MIB) as image:
        await image.write(0, bytes(CLUSTER))
        await replay(image, [(0, 4096), (MIB, 4 * MIB), (2 * MIB, 4096), (1 << 60, 4096)])
        assert image.fetch is not None
        await image.fetch.landed(image.consumer)
        assert [(pos, size) for pos, size, _ in source.reads] == [(MIB, 100)]


async def test_a_source_that_fails_ends_it_quietly(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"p" * MIB)
    source.fail = SourceError("gone")
    async with served(source) as image:
        await replay(image, [(0, 4096), (MIB // 2, 4096)])


async def test_nothing_is_fetched_that_would_not_be_kept(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"p" * MIB)
    async with served(source, copy_on_read=False) as image:
        await replay(image, [(0, 4096)])
        assert not source.reads


async def test_what_readers_wait_for_is_written_down(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"p" * (4 * MIB))
    async with served(source) as image:
        await image.read(MIB, 4096)
        await trio.sleep(1)
        await image.read(MIB, 4096)
        await image.read(3 * MIB + 512, 512)
        assert image.waits.ranges == [(MIB, 4096), (3 * MIB + 512, 512)]


async def test_a_source_that_says_no_is_not_asked_for_the_rest(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"p" * (64 * MIB))
    async with served(source) as image:
        await image.read(0, 512)
        source.reads.clear()
        source.fail = SourceError("gone")
        await replay(image, [(pos, 512) for pos in range(MIB, 64 * MIB, CLUSTER)])
        assert 0 < len(source.reads) < 2 * (8 * MIB // CLUSTER)


async def test_a_range_as_long_as_the_image_stops_nobody(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"p" * (64 * MIB))
    async with served(source) as image:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        await replay(image, [(0, 64 * MIB)])
        assert image.fetch is not None
        await image.fetch.landed(image.consumer)
        assert image.populated == 64 * MIB
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await replay(image, [(0, 64 * MIB)])
            nursery.cancel_scope.cancel()
        assert turns


async def test_a_disk_that_hangs_under_a_profile_holds_up_its_own_image_only(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FakeSource(b"p" * (256 * MIB))

    async def hang(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    async with served(source) as hanging:
        assert hanging.fetch is not None
        storage = MemoryStorage(
            empty(cluster_size=CLUSTER, image_size=hanging.size, backing=b"http://fake/disk.raw").data
        )
        other = Image("b.raw", await open_storage(storage), hanging.fetch)
        await other.overlay.count_missing()
        monkeypatch.setattr(hanging.overlay, "adopt", hang)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replay, hanging, [(0, hanging.size)])
            await trio.sleep(1)
            with trio.fail_after(600):
                await StreamJob(other).run()
            assert other.complete
            nursery.cancel_scope.cancel()
        await other.close()
        hanging.fetch.nursery.cancel_scope.cancel()


async def test_in_standby_a_profile_waits_for_the_activation(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"p" * (4 * CLUSTER))
    async with served(source) as image, trio.open_nursery() as nursery:
        image.gate = WriteGate(image.name, Writes.REFUSE)
        nursery.start_soon(replay, image, [(0, CLUSTER)])
        await trio.sleep(100)
        assert source.reads == []
        image.open_gate()
        await trio.sleep(1)
        assert source.reads == [(0, CLUSTER, False)]
