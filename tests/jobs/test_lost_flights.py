"""What a stream asks for and does not get: it says why, and never asks again without a rest."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import BadOverlay, NoSpace, QedfsError, SourceUnreachable
from qedfs.image.image import Image
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

from .support import Told

CONTENT = b"s" * (40 * CLUSTER)


class Broken(FakeSource):
    """A source with a fault of ours: it raises what no caller expects."""

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        self.reads.append((pos, len(buffer), urgent))
        await trio.sleep(self.round_trip)
        raise KeyError("a fault")


async def test_a_fault_while_bytes_are_fetched_ends_the_stream_and_says_so(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    source = Broken(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        job = StreamJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(10)
        assert job.state is State.FAILED
        assert "internal error" in job.reason
        assert len(source.reads) < 40
        assert len(caplog.records) < 40
        assert "a fault" in caplog.text
        nursery.cancel_scope.cancel()


async def test_a_fault_while_bytes_are_kept_ends_the_stream_and_says_so(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, cold: bool) -> int:
        raise KeyError("a fault")

    source = FakeSource(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        monkeypatch.setattr(image.overlay, "adopt", broken)
        job = StreamJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(10)
        assert job.state is State.FAILED
        assert "internal error" in job.reason
        assert source.bytes_read <= len(CONTENT)
        nursery.cancel_scope.cancel()


async def test_what_is_not_kept_is_asked_for_with_growing_pauses(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forgets(*_: object, cold: bool) -> int:
        await trio.lowlevel.checkpoint()
        return 0

    source = FakeSource(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            patch.setattr(image.overlay, "adopt", forgets)
            nursery.start_soon(StreamJob(image).run)
            await trio.sleep(60)
            assert source.bytes_read <= 8 * len(CONTENT)
            await trio.sleep(300)
            assert source.bytes_read <= 19 * len(CONTENT)
        with trio.fail_after(40):
            await complete(image)


@pytest.mark.parametrize(
    ("error", "state"),
    [(SourceUnreachable("connection refused"), State.WAITING), (NoSpace("the disk is full"), State.PAUSED)],
)
async def test_it_says_what_it_waits_for_until_bytes_come(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, error: QedfsError, state: State
) -> None:
    async def full(*_: object, cold: bool) -> int:
        await trio.lowlevel.checkpoint()
        raise error

    source = FakeSource(CONTENT)
    async with served(source, deadline_seconds=0.5) as image, trio.open_nursery() as nursery:
        driver = Told()
        told = driver.changes
        job = StreamJob(image, driver=driver)
        with monkeypatch.context() as patch:
            if isinstance(error, NoSpace):
                patch.setattr(image.overlay, "adopt", full)
            else:
                source.fail = error
            nursery.start_soon(job.run)
            await trio.sleep(120)
            assert told == [(State.RUNNING, ""), (state, str(error))]
            tried = len(source.reads)
            await trio.sleep(60)
            assert tried < len(source.reads)
            assert told[2:] == []
        source.fail = None
        with trio.fail_after(40):
            await complete(image)
        assert told[2:] == [(State.RUNNING, ""), (State.COMPLETE, "")]


@pytest.mark.parametrize("before", [NoSpace("the disk is full"), BadOverlay("the disk has failed")])
async def test_it_stops_for_what_fails_now_not_for_an_earlier_failure(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    before: QedfsError,
) -> None:
    """The condition tells of a full disk until something is kept again. That is not why the source has failed since."""

    async def broken(*_: object, cold: bool) -> int:
        await trio.lowlevel.checkpoint()
        raise before

    source = FakeSource(CONTENT)
    async with served(source, deadline_seconds=0.5) as image, trio.open_nursery() as nursery:
        job = StreamJob(image)
        with monkeypatch.context() as patch:
            patch.setattr(image.overlay, "adopt", broken)
            nursery.start_soon(job.run)
            await trio.sleep(20)
        assert job.reason == str(before)
        source.fail = SourceUnreachable("connection refused")
        job.start()
        await trio.sleep(60)
        assert (job.state, job.reason) == (State.WAITING, "connection refused")
        source.fail = None
        with trio.fail_after(40):
            await complete(image)
        nursery.cancel_scope.cancel()


async def test_a_user_who_resumes_it_sees_it_try(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    source.fail = SourceUnreachable("connection refused")
    async with served(source, deadline_seconds=0.5) as image, trio.open_nursery() as nursery:
        job = StreamJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(60)
        await job.pause()
        await trio.sleep(1)
        told = Told()
        job.attach(told)
        await job.resume()
        await trio.sleep(60)
        assert told.states == [State.RUNNING, State.WAITING]
        nursery.cancel_scope.cancel()


async def complete(image: Image) -> None:
    while not image.complete:  # noqa: ASYNC110
        await trio.sleep(1)
