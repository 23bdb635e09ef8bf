"""A source that fails: how often it is asked again, counted by what stood in the way, and who waits how long."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import chain, repeat

import pytest
import trio

from qedfs.errors import Reason, SourceError, SourceUnreachable
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.source import FakeSource, remote

NONE = dict.fromkeys(Reason, 0)
LOCATION = parse_location("http://fake/disk.raw")


def failing(*reasons: Reason) -> Callable[[], Awaitable[FakeSource]]:
    """Opens a source after it has failed for these reasons."""
    found = chain(reasons, repeat(None))

    async def connect() -> FakeSource:
        await trio.lowlevel.checkpoint()
        reason = next(found)
        if reason is not None:
            raise SourceUnreachable("away", reason=reason)
        return FakeSource(b"content")

    return connect


def trouble(found: RetryingSource) -> tuple[bool, bool]:
    """Whether it is told as away, and as failing."""
    return found.is_away, found.error is not None


async def test_a_source_that_answers_is_asked_once(autojump_clock: trio.testing.MockClock) -> None:
    found = remote(FakeSource(b"content"))
    await found.read(0, memoryview(bytearray(4)))
    assert found.retries == NONE


async def test_each_failed_try_counts_under_its_reason(autojump_clock: trio.testing.MockClock) -> None:
    found = RetryingSource(LOCATION, failing(Reason.CONNECT, Reason.SERVER, Reason.CONNECT))
    await found.connect()
    assert found.retries == NONE | {Reason.CONNECT: 2, Reason.SERVER: 1}
    assert found.error is None


@pytest.mark.parametrize("seed", range(20))
async def test_the_last_try_counts_once(autojump_clock: trio.testing.MockClock, seed: int) -> None:
    calls = 0

    async def refuse() -> FakeSource:
        nonlocal calls
        await trio.sleep(0.1 * seed)
        calls += 1
        raise SourceUnreachable("away", reason=Reason.CONNECT)

    found = RetryingSource(LOCATION, refuse, deadline_seconds=3)
    with pytest.raises(SourceUnreachable):
        await found.connect()
    assert found.retries[Reason.CONNECT] == calls
    # A try that the deadline has ended was a try, too.
    assert sum(found.retries.values()) - calls == found.retries[Reason.TIMEOUT] <= 1


async def test_an_answer_that_never_comes_is_a_timeout(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"content")
    source.gate = trio.Event()
    found = remote(source, deadline_seconds=3)
    with pytest.raises(SourceUnreachable, match="gave no answer within 3 s") as caught:
        await found.read(0, memoryview(bytearray(4)))
    assert caught.value.reason is Reason.TIMEOUT
    assert found.retries == NONE | {Reason.TIMEOUT: 1}


async def test_what_asking_again_does_not_help_is_no_retry(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"content")
    source.fail = SourceError("404")
    found = remote(source)
    with pytest.raises(SourceError):
        await found.read(0, memoryview(bytearray(4)))
    assert found.retries == NONE


async def test_a_connect_that_hangs_keeps_readers_for_one_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """Also if it was a read of the background, which has ten, that began it."""
    opened = 0

    async def connect() -> FakeSource:
        nonlocal opened
        opened += 1
        if opened == 1:
            await trio.sleep_forever()
        return FakeSource(b"content")

    found = RetryingSource(LOCATION, connect, deadline_seconds=30)

    async def read_in_background() -> None:
        with pytest.raises(SourceUnreachable, match="gave no answer within 30 s"):
            await found.read(0, memoryview(bytearray(4)), patient=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_in_background)
        await trio.sleep(1)
        began = trio.current_time()
        await found.read(0, memoryview(bytearray(4)), urgent=True)
        assert trio.current_time() - began < 30
    assert opened == 2


class Counted(FakeSource):
    """Counts the connections that are open."""

    def __init__(self) -> None:
        super().__init__(b"content", round_trip=1)
        self.opened = self.closed = 0

    async def connect(self) -> FakeSource:
        self.opened += 1
        await trio.sleep(self.round_trip)
        return self

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.closed += 1


async def test_what_is_closed_stays_closed(autojump_clock: trio.testing.MockClock) -> None:
    source = Counted()
    found = RetryingSource(LOCATION, source.connect)
    await found.read(0, memoryview(bytearray(4)))
    await found.aclose()
    began = trio.current_time()
    with pytest.raises(SourceUnreachable, match="closed"):
        await found.read(0, memoryview(bytearray(4)))
    assert trio.current_time() == began
    assert (source.opened, source.closed) == (1, 1)


async def test_what_is_closed_is_not_away(autojump_clock: trio.testing.MockClock) -> None:
    """As after `qedfs populate`: its server never comes back, and no alarm may go on for ever."""
    found = RetryingSource(LOCATION, failing(*[Reason.CONNECT] * 100), deadline_seconds=5)
    found.silence()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.connect)
        await trio.sleep(3)
        found.silence()
        assert trouble(found) == (True, True)
        await found.aclose()
        nursery.cancel_scope.cancel()
    found.silence()
    assert trouble(found) == (False, False)


async def test_a_connection_that_comes_after_the_end_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    source = Counted()
    found = RetryingSource(LOCATION, source.connect)

    async def connect() -> None:
        with pytest.raises(SourceUnreachable, match="closed"):
            await found.connect()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        nursery.start_soon(connect)
        await trio.sleep(source.round_trip / 2)
        await found.aclose()
    assert (source.opened, source.closed) == (1, 1)


async def test_a_retry_under_way_ends_with_the_source(autojump_clock: trio.testing.MockClock) -> None:
    found = RetryingSource(LOCATION, failing(*[Reason.CONNECT] * 100))

    async def connect() -> None:
        with pytest.raises(SourceUnreachable):
            await found.connect()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        await trio.sleep(1)
        began = trio.current_time()
        await found.aclose()
    assert trio.current_time() - began < 5


class GatheringSource(FakeSource):
    """Notes for how long it was told to let bytes gather."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.told: list[float] = []

    def gather(self, seconds: float) -> None:
        self.told.append(seconds)


class DecodingSource(FakeSource):
    """Decodes an image in a file, which is a source that can let bytes gather."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.file = GatheringSource(content)


async def test_bytes_gather_at_the_source_unless_a_reader_waits(autojump_clock: trio.testing.MockClock) -> None:
    source = GatheringSource(b"content")
    found = remote(source)
    found.gather(0.004)  # before the first connection
    await found.connect()
    assert source.told == [0.004]
    async with found.reader():
        found.gather(0)
        found.gather(0.004)  # another queue of this source streams on
    assert source.told == [0.004, 0]
    found.gather(0.004)
    found.gather(0.004)
    assert source.told == [0.004, 0, 0.004]


async def test_bytes_gather_at_the_file_of_a_decoded_image(autojump_clock: trio.testing.MockClock) -> None:
    source = DecodingSource(b"content")
    found = remote(source)
    await found.connect()
    found.gather(0.004)
    assert source.file.told == [0, 0.004]
