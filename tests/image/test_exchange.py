"""An image that gets another source while it is read and streamed: nothing of the old one is answered or kept."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import trio

from qedfs.errors import QedfsError, SourceError
from qedfs.fetch.queue import FetchQueue
from qedfs.format.record import Standby
from qedfs.image.image import Image
from qedfs.image.standby import PassThrough
from qedfs.image.standby_record import record_emptying
from qedfs.jobs.job import Action, Driver, Job
from qedfs.jobs.missing import MissingRuns
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from qedfs.source.base import Extent
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

OLD = random.Random(1).randbytes(40 * CLUSTER)
NEW = random.Random(2).randbytes(40 * CLUSTER)


def exchange(image: Image, source: FakeSource) -> None:
    """Give the image a new queue on `source`; the old source is closed later, or never."""
    assert image.fetch is not None
    image.exchange_source(FetchQueue(remote(source), CLUSTER, image.fetch.nursery))


async def test_a_read_that_waits_for_the_old_source_is_answered_by_the_new_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    old.gate = trio.Event()
    async with served(old) as image:
        answers: list[bytes] = []

        async def read(pos: int) -> None:
            answers.append(bytes(await image.read(pos, 4096)))

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(read, number * CLUSTER)
            await trio.sleep(1)
            exchange(image, new)
        assert old.in_flight  # it never answers
        old.gate.set()
        assert sorted(answers) == sorted(NEW[pos : pos + 4096] for pos in range(0, 16 * CLUSTER, CLUSTER))
        # What the old source brought afterwards is not in the overlay, what the new one brought is.
        await trio.sleep(1)
        asked = len(new.reads)
        assert bytes(await image.read(0, 16 * CLUSTER)) == NEW[: 16 * CLUSTER]
        assert len(new.reads) == asked


async def test_an_answer_of_the_old_source_that_waits_for_the_disk_is_not_given(
    autojump_clock: trio.testing.MockClock,
) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    async with served(old, copy_on_read=False) as image:
        await image.write(CLUSTER, b"g" * CLUSTER)
        read_data = image.overlay.read_data
        reading = trio.Event()

        async def slow(offset: int, view: memoryview) -> None:
            reading.set()
            await trio.sleep(10)
            await read_data(offset, view)

        image.overlay.read_data = slow  # type: ignore[method-assign]
        answer = b""

        async def read() -> None:
            nonlocal answer
            answer = bytes(await image.read(0, 2 * CLUSTER))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await reading.wait()
            exchange(image, new)
        assert answer == NEW[:CLUSTER] + b"g" * CLUSTER


async def test_an_error_of_the_old_source_reaches_nobody(autojump_clock: trio.testing.MockClock) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    async with served(old) as image:
        old.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.read, 0, 4096)
            await trio.sleep(1)
            old.fail = SourceError("the old source is broken")
            exchange(image, new)
            old.gate.set()
        await trio.sleep(1)
        assert image.condition.worst is None


async def test_what_a_flight_of_the_old_source_brings_is_not_adopted(autojump_clock: trio.testing.MockClock) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    async with served(old) as image:
        assert image.fetch is not None
        await image.read(0, 4096)
        queue, old.gate = image.fetch, trio.Event()
        queue.start(8, 4, consumer=image.consumer)
        exchange(image, new)
        old.gate.set()
        await queue.landed(image.consumer)
        assert image.overlay.all_missing(8, 4)
        assert bytes(await image.read(8 * CLUSTER, CLUSTER)) == NEW[8 * CLUSTER : 9 * CLUSTER]


async def test_an_adoption_that_still_checks_the_version_keeps_nothing(autojump_clock: trio.testing.MockClock) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    async with served(old) as image:
        assert image.version is not None
        check, checking = image.version.check, trio.Event()

        async def slow() -> object:
            checking.set()
            await trio.sleep(5)
            return await check()

        image.version.check = slow  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: image.consumer.take(0, bytearray(OLD[:CLUSTER]), CLUSTER, asked=True))
            await checking.wait()
            exchange(image, new)
        assert image.overlay.all_missing(0, 1)


async def test_the_stream_goes_on_with_the_new_source(autojump_clock: trio.testing.MockClock) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(OLD), backing=b"http://fake/disk.raw").data)
    async with served(old, storage=storage) as image:
        job = StreamJob(image, driver=Unasked())
        old.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            await trio.sleep(1)
            assert image.fetch is not None
            closing = image.exchange_source(FetchQueue(remote(new), CLUSTER, image.fetch.nursery))
            assert closing is not None
            await closing.aclose()
            job.poke()
            old.gate.set()
        assert (job.state, image.failures) == (State.COMPLETE, 0)
        assert bytes(await image.read(0, len(NEW))) == NEW


class Unasked(Driver):
    """A driver whose policy is not to be asked: the job meets no error."""

    def judge(self, job: Job, error: QedfsError) -> Action:
        """Fail the test."""
        raise AssertionError(error)


class Telling(FakeSource):
    """Tells all extents at once."""

    async def extents(self, pos: int, size: int) -> Sequence[Extent]:
        """Data in the first cluster, a hole after it."""
        return [Extent(0, CLUSTER, zero=False), Extent(CLUSTER, len(self.content) - CLUSTER, zero=True)]


async def test_extents_of_the_old_source_are_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    old, new = Telling(OLD[:CLUSTER] + bytes(39 * CLUSTER)), FakeSource(NEW)
    async with served(old) as image:
        runs = MissingRuns(image)
        assert await runs.next_run(0, len(OLD)) == (0, 1)
        exchange(image, new)
        run = await runs.next_run(1, len(NEW))
        assert run is not None
        assert run[0] == 1


async def test_a_partial_write_is_completed_with_bytes_of_the_new_source(
    autojump_clock: trio.testing.MockClock,
) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    async with served(old) as image:
        ask = image.reads._ask

        async def asked(pieces: Sequence[tuple[int, memoryview]]) -> None:
            await ask(pieces)
            image.reads._ask = ask  # type: ignore[method-assign]
            exchange(image, new)  # just after the answer, so that no wait is left to be ended

        image.reads._ask = asked  # type: ignore[method-assign]
        await image.write(100, b"guest")
        assert bytes(await image.read(0, CLUSTER)) == NEW[:100] + b"guest" + NEW[105:CLUSTER]


async def test_holes_of_the_old_source_are_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    # 4 KiB clusters: a table spans 2 MiB.
    old, new = FakeSource(bytes(8 << 20)), FakeSource(b"n" * (8 << 20))
    old.holes, new.holes = [(0, 6 << 20)], []
    old.gate = trio.Event()
    async with served(old, cluster_size=4096) as image:
        job = StreamJob(image)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            await trio.sleep(1)
            assert job.progress == 6 << 20
            assert image.fetch is not None
            image.exchange_source(FetchQueue(remote(new), 4096, image.fetch.nursery))
            assert job.progress == 0
            job.poke()
            old.gate.set()
        assert bytes(await image.read(0, 8 << 20)) == new.content


async def test_a_stream_that_still_connects_to_the_old_source_meets_no_error(
    autojump_clock: trio.testing.MockClock,
) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    async with served(old) as image:
        job = StreamJob(image, driver=Unasked())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            await trio.sleep(old.round_trip / 2)
            exchange(image, new)
        assert (job.state, image.failures) == (State.COMPLETE, 0)
        assert bytes(await image.read(0, len(NEW))) == NEW


async def test_a_read_that_waits_while_the_overlay_is_emptied_uses_no_place_of_the_old_file(
    autojump_clock: trio.testing.MockClock,
) -> None:
    old, new = FakeSource(OLD), FakeSource(NEW)
    async with served(old) as image:
        await image.read(0, CLUSTER)
        await image.overlay.flush()
        await image.overlay.change_record(lambda record: dataclasses.replace(record, standby=Standby.REVOCABLE))
        new.gate, answer = trio.Event(), b""

        async def read() -> None:
            nonlocal answer
            answer = bytes(await image.read(0, 2 * CLUSTER))

        async with trio.open_nursery() as nursery:
            old.gate = trio.Event()
            nursery.start_soon(read)
            await trio.sleep(1)
            await record_emptying(image.name, image.overlay)
            image.exchange_source(None, standby=PassThrough(lambda: remote(new), lambda _: None))
            image.replace_overlay(await open_storage(await image.overlay.empty()))
            new.gate.set()
        assert answer == NEW[: 2 * CLUSTER]
        assert image.overlay.damage is None


@pytest.mark.parametrize("where", ["source_size", "next_missing"])
async def test_a_stream_whose_source_is_taken_away_at_an_await_has_not_failed(
    where: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(FakeSource(OLD)) as image, trio.open_nursery() as nursery:
        owner: Any = image if where == "source_size" else image.overlay
        stream, whole = StreamJob(image), getattr(owner, where)

        async def then_taken(*args: int) -> Any:
            answer = await whole(*args)
            stream.cancel()
            image.exchange_source(None, standby=PassThrough(lambda: remote(FakeSource(NEW)), lambda _: None))
            return answer

        setattr(owner, where, then_taken)
        nursery.start_soon(stream.run)
        await trio.sleep(10)
        assert (stream.error, stream.state) == (None, State.OFF)
        nursery.cancel_scope.cancel()
