"""A dead source answers its readers soon, a slow one in its own time, and neither takes the slots of others."""

from __future__ import annotations

from collections import Counter

import pytest
import trio

from qedfs.errors import Reason, SourceUnreachable
from qedfs.source.circuit_breaker import (
    ERRORS_PER_SECOND,
    GRACE_SECONDS,
    HOLD_DEADLINES,
    LEAST_SLOTS,
    MOST_HOLD_SECONDS,
    PROBE_SECONDS,
    ReaderSlots,
)
from qedfs.source.retrying import Opener, RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.source import FakeSource, remote
from tests.harness.sample import sample
from tests.served import CLUSTER, served

DEADLINE = 30.0
CONTENT = b"s" * (64 * CLUSTER)
READERS = sample(250, whole=1000)


class Readers:
    """Readers of one source, who ask for a byte each: how they ended, and when."""

    def __init__(self, found: RetryingSource) -> None:
        self.found = found
        self.errors: list[str] = []
        self.ended: list[float] = []  # seconds after they began

    async def read(self, pos: int = 0) -> None:
        """One reader."""
        began = trio.current_time()
        try:
            async with self.found.reader():
                await self.found.read(pos, memoryview(bytearray(1)), urgent=True)
        except SourceUnreachable as exc:
            self.errors.append(str(exc))
        self.ended.append(trio.current_time() - began)

    async def all(self, count: int, *, pause: float = 0.0) -> None:
        """So many at once, or with a pause in between; returns when all have ended."""
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self.read, number)
                if pause:
                    await trio.sleep(pause)


def opener(source: FakeSource) -> Opener:
    """Leads to a source at once."""

    async def connect() -> FakeSource:
        await trio.lowlevel.checkpoint()
        return source

    return connect


async def dead(source: FakeSource) -> RetryingSource:
    """A source that a reader has found dead."""
    found = remote(source, deadline_seconds=DEADLINE)
    await found.connect()
    source.gate = trio.Event()
    readers = Readers(found)
    await readers.all(1)
    assert len(readers.errors) == 1
    return found


async def test_all_who_wait_get_their_error_when_the_first_has_waited_in_vain(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = FakeSource(CONTENT)
    source.gate = trio.Event()
    readers = Readers(remote(source, deadline_seconds=DEADLINE))
    began = trio.current_time()
    await readers.all(READERS, pause=20 / READERS)  # the last ones come when the first have waited for 20 s
    assert len(readers.errors) == READERS
    assert trio.current_time() - began < DEADLINE + MOST_HOLD_SECONDS + 2 * GRACE_SECONDS
    assert min(readers.ended) < DEADLINE / 2


@pytest.mark.parametrize("refused", [False, True])
async def test_the_errors_come_one_by_one(autojump_clock: trio.testing.MockClock, refused: bool) -> None:
    source = FakeSource(CONTENT)
    found = remote(source, deadline_seconds=DEADLINE)
    await found.connect()
    source.gate = trio.Event()
    if refused:
        source.gate, source.fail = None, SourceUnreachable("away")
    readers = Readers(found)
    await readers.all(READERS, pause=0.0001)
    # No tenth of a second with more than its share, or to answer would be what others wait for.
    tenths = Counter(int(10 * seconds) for seconds in readers.ended)
    assert max(tenths.values()) < 3 * READERS / (10 * MOST_HOLD_SECONDS)
    assert max(readers.ended) < DEADLINE + MOST_HOLD_SECONDS + 1


@pytest.mark.parametrize("deadline", [1.0, pytest.param(2.0, marks=pytest.mark.slow), 5.0])
@pytest.mark.parametrize("refused", [False, True])
async def test_a_crowd_waits_little_longer_than_the_deadline(
    autojump_clock: trio.testing.MockClock, deadline: float, refused: bool
) -> None:
    source = FakeSource(CONTENT)
    found = remote(source, deadline_seconds=deadline)
    await found.connect()
    source.gate = trio.Event()
    if refused:
        source.gate, source.fail = None, SourceUnreachable("away")
    readers = Readers(found)
    await readers.all(READERS)
    assert len(readers.errors) == READERS
    assert max(readers.ended) < (1.01 + HOLD_DEADLINES) * deadline  # on a mock clock


async def test_who_comes_later_waits_for_a_moment_only(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    readers = Readers(await dead(source))
    asked = len(source.reads)
    await readers.all(READERS)
    assert len(readers.errors) == READERS
    assert max(readers.ended) <= MOST_HOLD_SECONDS
    assert len(source.reads) - asked <= 1 + MOST_HOLD_SECONDS / PROBE_SECONDS  # and not a thousand times


async def test_it_is_asked_now_and_then_while_readers_come(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    readers = Readers(await dead(source))
    asked = len(source.reads)
    await readers.all(200, pause=0.1)
    assert 15 <= len(source.reads) - asked <= 25
    assert len(readers.errors) == 200


async def test_readers_who_come_again_at_once_get_a_bounded_number_of_errors(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = FakeSource(CONTENT)
    found = remote(source, deadline_seconds=5)
    await found.connect()
    source.gate = trio.Event()
    readers = Readers(found)

    async def again_and_again(number: int) -> None:
        while True:
            await readers.read(number)

    async with trio.open_nursery() as nursery:
        for number in range(READERS):
            nursery.start_soon(again_and_again, number)
        await trio.sleep(20)
        before = len(readers.errors)
        await trio.sleep(20)
        assert 0 < len(readers.errors) - before < 20 * 2 * ERRORS_PER_SECOND
        nursery.cancel_scope.cancel()


async def test_the_first_answer_lets_all_go_on(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    readers = Readers(await dead(source))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readers.all, READERS)
        await trio.sleep(0.5)
        assert not readers.errors
        assert source.gate is not None
        source.gate.set()
    assert not readers.errors
    assert max(readers.ended) < 1


class SlowlyBack(FakeSource):
    """Away, and slow from the moment on at which it is back."""

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if pos:
            await trio.sleep(2 * MOST_HOLD_SECONDS)
        await super().read(pos, buffer, urgent=urgent)


async def test_who_was_about_to_get_an_error_goes_on_at_the_first_answer(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.5)
    source = SlowlyBack(CONTENT)
    found = remote(source, deadline_seconds=DEADLINE)
    await found.connect()
    source.gate = trio.Event()
    first, second = Readers(found), Readers(found)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.read)
        await trio.sleep(DEADLINE - 1)
        nursery.start_soon(second.all, 8)
        await trio.sleep(1.1)
        assert found._breaker.dead is not None
        source.gate.set()
    assert (len(first.errors), second.errors) == (1, [])
    assert max(second.ended) > 1 + MOST_HOLD_SECONDS


async def test_who_asks_a_dead_source_has_its_own_deadline_when_that_is_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = SlowlyBack(CONTENT)
    found = remote(source, deadline_seconds=DEADLINE)
    await found.connect()
    source.gate = trio.Event()
    await Readers(found).read()
    await trio.sleep(2 * PROBE_SECONDS)
    readers = Readers(found)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readers.read, 1)
        await trio.sleep(1)
        source.gate.set()
        await found.read(0, memoryview(bytearray(1)))  # somebody else's answer: it is alive
    assert readers.errors == []


async def test_a_reader_who_comes_alone_asks(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    readers = Readers(await dead(source))
    await trio.sleep(10 * DEADLINE)
    assert source.gate is not None
    source.gate.set()
    await readers.all(1)
    assert not readers.errors


async def test_a_slow_source_gets_the_whole_deadline_for_each(autojump_clock: trio.testing.MockClock) -> None:
    class Slow(FakeSource):
        """One reader after the other, each within the deadline if it were alone."""

        def __init__(self) -> None:
            super().__init__(CONTENT)
            self.line = trio.Lock()

        async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
            async with self.line:
                await trio.sleep(DEADLINE / 2)
                await super().read(pos, buffer, urgent=urgent)

    readers = Readers(remote(Slow(), deadline_seconds=DEADLINE))
    await readers.all(10, pause=DEADLINE / 10)
    late = [seconds for seconds in readers.ended if seconds >= DEADLINE]
    assert len(late) == len(readers.errors) > 0  # nobody had an error before
    assert len(readers.ended) - len(late) >= 2


async def test_a_part_of_an_answer_is_a_sign_of_life(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    source.gate = trio.Event()
    readers = Readers(remote(source, deadline_seconds=DEADLINE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readers.all, 1)
        await trio.sleep(DEADLINE / 2)
        nursery.start_soon(readers.all, 1)
        source.received += 1
    assert sorted(readers.ended) == pytest.approx([DEADLINE, DEADLINE])


# Places.


async def test_a_silent_source_keeps_no_more_than_its_slots(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    source.gate = trio.Event()
    slots = ReaderSlots(4 * 100)
    found = RetryingSource(parse_location("http://fake/"), opener(source), deadline_seconds=DEADLINE, slots=slots)
    readers = Readers(found)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readers.all, READERS)
        await trio.sleep(MOST_HOLD_SECONDS + 1)
        assert len(readers.errors) == READERS - 100
        source.gate.set()
    assert len(readers.errors) == READERS - 100


async def test_a_source_that_answers_has_room_for_everybody(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=1)
    slots = ReaderSlots(4 * 100)
    found = RetryingSource(parse_location("http://fake/"), opener(source), deadline_seconds=DEADLINE, slots=slots)
    readers = Readers(found)
    await readers.all(READERS)
    assert not readers.errors
    assert source.most_in_flight == 100
    assert slots.sources == 0


def test_sources_share_the_slots() -> None:
    slots = ReaderSlots(4096)
    shares = []
    for sources in (0, 1, 2, 4, 1000):
        slots.sources = sources
        shares.append(slots.share)
    assert shares == [1024, 1024, 1024, 512, LEAST_SLOTS]


# Through an image.


async def test_the_page_after_its_read_ahead_does_not_wait_again(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source, deadline_seconds=DEADLINE) as image:
        await image.read(0, 512)
        source.gate = trio.Event()
        began = trio.current_time()
        # As the kernel asks: a window, and after its error the page alone.
        for size in (128 << 10, 4096):
            with pytest.raises(SourceUnreachable) as caught:
                await image.read(8 * CLUSTER, size)
            assert caught.value.reason is Reason.TIMEOUT
        assert trio.current_time() - began < DEADLINE + MOST_HOLD_SECONDS + 2 * GRACE_SECONDS


async def test_silence_counts_while_somebody_waits_and_nothing_comes(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=0.5)
    found = remote(source)

    async def heard_for(seconds: float) -> list[int]:
        """What the look once a second sees."""
        seen = []
        for _ in range(int(seconds)):
            await trio.sleep(1)
            seen.append(round(found.silence().seconds))
        return seen

    assert await heard_for(5) == [0] * 5  # nobody asks
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            for pos in range(8):
                await found.read(pos, memoryview(bytearray(1)))

        nursery.start_soon(read)
        assert max(await heard_for(4)) <= 1  # there are answers
    source.round_trip = 60.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.read, 0, memoryview(bytearray(1)))
        assert (await heard_for(6))[-2:] == [4, 5]
        nursery.cancel_scope.cancel()
    # A stream that was asking may only pause: the source stays away until it answers.
    assert await heard_for(2) == [6, 7]
    assert found.is_away
    source.round_trip = 0.5
    await found.read(0, memoryview(bytearray(1)))
    assert await heard_for(2) == [0, 0]
    assert not found.is_away
