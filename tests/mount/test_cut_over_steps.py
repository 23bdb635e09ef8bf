"""Each step of a cut-over hangs or fails in turn, by the mock clock: the guest never stands still for two seconds."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio

from qedfs.errors import InStandby, QedfsError, ReadOnlyOverlay, SourceChanged, SourceUnreachable, TimedOut
from qedfs.format.record import Standby
from qedfs.image.image import Image
from qedfs.image.stalls import Stalls
from qedfs.image.standby_record import put_in_standby
from qedfs.image.write_gate import WriteGate, Writes
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.mount import cut_over
from qedfs.mount.cut_over import CutOver
from qedfs.mount.held import HolderLink
from qedfs.mount.late_records import LateRecords
from qedfs.mount.open_images import OpenImages
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.mount.source_pool import SourcePool
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.source.pinning import Pinning
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import Location
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage, T
from tests.overlay.images import empty

CLUSTER = 1 << 16
SIZE = 8 * CLUSTER
OLD = random.Random(1).randbytes(SIZE)
NEW = random.Random(2).randbytes(SIZE)
HUNG = 1e6  # seconds of a round trip that nobody waits for


class Disk(MemoryStorage):
    """An overlay's file whose threads wait at a gate, as those of a disk that hangs."""

    gate: trio.Event | None = None

    async def in_thread(self, function: Callable[[], T]) -> T:
        if self.gate is not None:
            await self.gate.wait()
        return await super().in_thread(function)


class Pool(SourcePool):
    """Sources in memory: each connection leads to the source that is current then."""

    source: FakeSource

    def _source(
        self,
        location: Location,
        overlay: Overlay,
        deadline_seconds: float,
        pinning: Pinning,
        told: set[str] | None = None,
    ) -> RetryingSource:
        return remote(self.source, deadline_seconds=deadline_seconds, pinning=pinning)

    async def _check_policy(self, location: Location) -> None:
        pass


class Scene:
    """An image in standby, whose source is going to be another one."""

    def __init__(self, pool: Pool, served: Served, cuts: CutOver, disk: Disk, new: FakeSource) -> None:
        self.pool = pool
        self.served = served
        self.cuts = cuts
        self.disk = disk
        self.new = new  # what new connections lead to
        self.drops = 0  # how often the kernel has dropped its pages
        self.dropping: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    @property
    def image(self) -> Image:
        assert self.served.image is not None
        return self.served.image

    async def drop_pages(self, served: Served) -> None:
        """Stands for `KernelPages.drop`."""
        await self.dropping()
        self.drops += 1

    async def fails(self, error: type[QedfsError], match: str) -> QedfsError:
        """Activate it, which fails in less than two seconds and leaves it in standby, as does a look before."""
        began = trio.current_time()
        with pytest.raises(error, match=match) as caught:
            await self.cuts.activate(self.served)
        assert trio.current_time() - began < 2
        assert self.image.in_standby
        assert self.image.overlay.record.standby is Standby.WAITING or self.served.recording is not None
        return caught.value

    async def succeeds(self) -> None:
        """Activate it, in less than two seconds: it reads as the new source, and the record says so."""
        began = trio.current_time()
        await self.cuts.activate(self.served)
        assert trio.current_time() - began < 2
        assert not self.image.in_standby
        assert not self.served.stale_pages
        assert await stored(self.disk) is Standby.REVOCABLE
        assert bytes(await self.image.read(0, SIZE)) == NEW


async def stored(disk: MemoryStorage) -> Standby:
    """What a mount finds after a kill at this moment."""
    overlay = await open_storage(MemoryStorage(disk.bytes, writable=False))
    found = overlay.record.standby
    await overlay.close()
    return found


@contextlib.asynccontextmanager
async def standby(*, writes: Writes = Writes.REFUSE, stream: bool = False) -> AsyncIterator[Scene]:
    """The image, and its jobs, until the block is left."""
    disk = Disk(empty(cluster_size=CLUSTER, image_size=SIZE, backing=b"http://fake/disk.raw").data)
    new, images, options = FakeSource(NEW), OpenImages(), Options(stream=stream, standby_writes=writes)
    async with trio.open_nursery() as nursery:
        pool = Pool("/overlays", Policy(), 30, nursery)
        pool.source = FakeSource(OLD)
        overlay = await open_storage(disk)
        await put_in_standby("disk.qed", overlay)
        through, gate = await pool.pass_through_for(overlay, overlays=1), WriteGate("disk.raw", writes)
        image = Image("disk.raw", overlay, None, standby=(through, gate))
        images.add(image)
        served = Served("disk.raw", "/overlays/disk.qed", 7, (1, 2, 3), image=image)
        served.jobs = ImageJobs(StreamJob(image, enabled=False))
        nursery.start_soon(served.jobs.run)
        nursery.start_soon(served.jobs.stream.run)

        async def drop_pages(served: Served) -> None:
            await scene.drop_pages(served)

        cuts = CutOver(pool, images, options, nursery, drop_pages, LateRecords(HolderLink(), {}))
        gate.activate = cuts.activation(served)
        scene = Scene(pool, served, cuts, disk, new)
        # Some reads before: what they have brought must not be shown later.
        assert bytes(await image.read(0, SIZE)) == OLD
        pool.source = new
        yield scene
        if disk.gate is not None:
            disk.gate.set()
        with contextlib.suppress(ReadOnlyOverlay):  # of a barrier that has failed
            await image.close()
        nursery.cancel_scope.cancel()


async def test_nothing_hangs(autojump_clock: trio.testing.MockClock) -> None:
    async with standby() as scene:
        await scene.cuts.check(scene.served)
        assert scene.image.in_standby
        assert bytes(await scene.image.read(0, SIZE)) == OLD
        await scene.succeeds()
        assert scene.drops == 1
        await scene.cuts.activate(scene.served)  # once more: there is nothing to do
        await scene.cuts.check(scene.served)
        assert scene.drops == 1


async def test_the_new_connection_hangs(autojump_clock: trio.testing.MockClock) -> None:
    async with standby() as scene:
        scene.new.round_trip = HUNG
        error = await scene.fails(SourceUnreachable, "gave no answer within 1 s")
        assert (error.exit_code, error.errno) == (4, errno.EIO)
        with pytest.raises(SourceUnreachable, match="gave no answer within 1 s"):
            await scene.cuts.check(scene.served)
        assert bytes(await scene.image.read(0, SIZE)) == OLD  # by its old connection
        assert scene.drops == 0
        scene.new.round_trip = 0.02
        await scene.succeeds()


async def test_another_size(autojump_clock: trio.testing.MockClock) -> None:
    async with standby() as scene:
        scene.pool.source = FakeSource(NEW[:-CLUSTER])
        error = await scene.fails(SourceChanged, "bytes, and the image")
        assert error.exit_code == 5
        with pytest.raises(SourceChanged):
            await scene.cuts.check(scene.served)
        scene.pool.source = scene.new
        await scene.succeeds()


async def test_reads_that_wait_are_not_answered_by_the_new_connection(autojump_clock: trio.testing.MockClock) -> None:
    async with standby() as scene:
        old = scene.image.source
        for source in (scene.pool.source, scene.new):
            source.gate = trio.Event()
        scene.pool.source = FakeSource(OLD)
        waiting = scene.pool.source.gate = trio.Event()
        answers: list[bytes] = []

        async def read() -> None:
            with contextlib.suppress(SourceUnreachable):  # of the standby, after a second
                answers.append(bytes(await scene.image.read(CLUSTER, 4096)))

        assert scene.image.standby is not None
        scene.image.standby.remote = remote(scene.pool.source, deadline_seconds=HUNG)
        scene.pool.source = scene.new
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(0.1)
            error = await scene.fails(SourceUnreachable, "connects, but does not deliver")
            assert (error.exit_code, error.errno) == (4, errno.EIO)
            assert answers == []
            waiting.set()
        assert answers == [OLD[CLUSTER : CLUSTER + 4096]]
        assert scene.image.source is not old
        assert scene.new.gate is not None
        scene.new.gate.set()
        await scene.succeeds()


async def test_the_disk_does_not_take_the_record(autojump_clock: trio.testing.MockClock) -> None:
    """What it takes later does not count: the management was told that the image is in standby."""
    async with standby() as scene:
        hung = scene.disk.gate = trio.Event()
        await scene.fails(QedfsError, "stays in standby: the disk of its overlay")
        await scene.fails(QedfsError, "has not ended an earlier activation")
        with pytest.raises(QedfsError, match="has not ended an earlier activation"):
            await scene.cuts.check(scene.served)
        undone = trio.Event()

        async def undo() -> None:
            await scene.cuts.deactivate(scene.served)
            undone.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(undo)
            await trio.sleep(10)
            assert not undone.is_set()  # as nobody could say yet what a later mount finds
            scene.disk.gate = None
            hung.set()
        assert await stored(scene.disk) is Standby.WAITING
        pin = scene.image.overlay.record.pin
        assert pin is not None
        assert (pin.size, pin.etag) == (SIZE, None)  # as the source goes on changing
        await scene.succeeds()


async def test_a_disk_that_fails_while_a_late_record_is_taken_back(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The record of the activation is durable, and must not count all the same: the guest went on at the source."""
    async with standby() as scene:
        hung = scene.disk.gate = trio.Event()
        await scene.fails(QedfsError, "stays in standby: the disk of its overlay")
        scene.disk.fail("barrier", QedfsError("cannot sync: Input/output error"), nth=2)
        scene.disk.gate = None
        hung.set()
        await scene.cuts.deactivate(scene.served)
        assert await stored(scene.disk) is Standby.WAITING
        assert "its activation may count at the next mount: cannot sync" in caplog.text


async def test_a_record_that_the_disk_has_although_its_barrier_has_failed_does_not_count(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with standby() as scene:
        scene.disk.fail("barrier", QedfsError("cannot sync: Input/output error"))
        error = await scene.fails(ReadOnlyOverlay, "cannot sync")
        assert error.errno == errno.EROFS
        assert bytes(await scene.image.read(0, 4096)) == OLD[:4096]  # by its old connection
        with pytest.raises(ReadOnlyOverlay, match="so that it stays in standby"):
            await scene.cuts.activate(scene.served)
        # A kill, and the next mount: the guest may be running at the source again.
        assert await stored(scene.disk) is Standby.WAITING


async def test_the_kernel_waits_for_a_read_that_the_source_does_not_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A read that came after the exchange has locked its page, and the source hangs again."""
    async with standby() as scene:
        errors: list[QedfsError] = []
        answered = trio.Event()

        async def read() -> None:
            with pytest.raises(SourceUnreachable) as caught:
                await scene.image.read(CLUSTER, 4096)
            errors.append(caught.value)
            answered.set()

        async def dropping() -> None:
            scene.new.gate = trio.Event()
            nursery.start_soon(read)
            await answered.wait()

        scene.dropping = dropping
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            await scene.cuts.activate(scene.served)
            assert trio.current_time() - began < 2
        assert len(errors) == 1
        assert not scene.image.in_standby
        assert not scene.served.stale_pages


async def test_the_kernel_keeps_its_pages(autojump_clock: trio.testing.MockClock) -> None:
    """It is active, and that cannot be taken back; the next call drops them."""
    async with standby(stream=True) as scene:
        scene.dropping = trio.sleep_forever
        with pytest.raises(QedfsError, match="is active, but the kernel still has old pages of it; activate it again"):
            await scene.cuts.activate(scene.served)
        assert not scene.image.in_standby
        assert scene.served.stale_pages
        assert scene.served.job is not None
        assert scene.served.job.state is State.OFF
        scene.dropping = trio.lowlevel.checkpoint
        await scene.succeeds()
        await trio.sleep(60)
        assert scene.image.complete


@pytest.mark.parametrize("fails", [False, True])
async def test_pages_that_an_earlier_server_has_left(
    fails: bool, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with standby() as scene:
        await scene.cuts.refresh(scene.served)
        assert scene.drops == 0
        scene.served.stale_pages = True
        scene.dropping = trio.sleep_forever if fails else trio.lowlevel.checkpoint
        await scene.cuts.refresh(scene.served)
        assert (scene.drops, scene.served.stale_pages) == ((0, True) if fails else (1, False))
        assert ("still has old pages" in caplog.text) == fails


async def test_the_way_back_drops_what_was_kept_and_the_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with standby(stream=True) as scene:
        stream = scene.served.job
        assert stream is not None
        stream.set_limit(CLUSTER)  # so slow that it does not end meanwhile
        await scene.cuts.activate(scene.served)
        assert bytes(await scene.image.read(0, CLUSTER)) == NEW[:CLUSTER]
        await trio.sleep(3)
        assert scene.image.populated > CLUSTER
        scene.pool.source = FakeSource(OLD)
        await scene.cuts.deactivate(scene.served)
        assert (scene.image.in_standby, stream.state, scene.image.populated) == (True, State.OFF, 0)
        assert await stored(scene.disk) is Standby.WAITING
        assert bytes(await scene.image.read(0, SIZE)) == OLD
        drops = scene.drops
        await scene.cuts.deactivate(scene.served)  # once more: there is nothing to do
        assert scene.drops == drops
        scene.served.stale_pages = True
        await scene.cuts.deactivate(scene.served)
        assert scene.drops == drops + 1
        scene.pool.source = scene.new
        await scene.cuts.activate(scene.served)
        await scene.image.write(0, b"guest")
        with pytest.raises(QedfsError, match="a guest has written"):
            await scene.cuts.deactivate(scene.served)
        assert not scene.image.in_standby


async def test_after_the_way_back_a_write_is_held_as_long_as_the_kernel_allows(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with standby(writes=Writes.HOLD) as scene:
        scene.image.stalls = Stalls(kernel_seconds=55)
        await scene.cuts.activate(scene.served)
        await scene.cuts.deactivate(scene.served)
        with pytest.raises(InStandby, match="not activated within 55 s"):
            await scene.image.write(0, b"guest")


async def test_a_way_back_that_cannot_be_recorded_leaves_it_active(autojump_clock: trio.testing.MockClock) -> None:
    async with standby() as scene:
        await scene.cuts.activate(scene.served)
        scene.disk.fail("barrier", QedfsError("cannot sync: Input/output error"))
        with pytest.raises(ReadOnlyOverlay):
            await scene.cuts.deactivate(scene.served)
        assert not scene.image.in_standby
        assert bytes(await scene.image.read(0, SIZE)) == NEW
        assert await stored(scene.disk) is Standby.REVOCABLE


async def test_the_disk_does_not_take_the_way_back(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever asks is told so, or goes away, as at the end of the mount; the way back goes on."""
    async with standby() as scene:
        await scene.cuts.activate(scene.served)
        hung = scene.disk.gate = trio.Event()
        with trio.move_on_after(1) as gone:
            await scene.cuts.deactivate(scene.served)
        assert gone.cancelled_caught
        with pytest.raises(TimedOut, match="within 30 s; that goes on, and the next --undo waits for it") as caught:
            await scene.cuts.deactivate(scene.served)
        assert caught.value.exit_code == 7
        assert scene.served.recording is not None  # so that the overlay is not closed now
        scene.disk.gate = None
        hung.set()
        await scene.cuts.deactivate(scene.served)
        assert scene.image.in_standby
        assert await stored(scene.disk) is Standby.WAITING


async def test_a_complete_image_is_told_what_to_do_instead(autojump_clock: trio.testing.MockClock) -> None:
    async with standby(stream=True) as scene:
        await scene.cuts.activate(scene.served)
        await trio.sleep(60)
        assert scene.image.complete
        with pytest.raises(QedfsError, match=r"so it cannot go back to standby; .*: qedfs create --standby"):
            await scene.cuts.deactivate(scene.served)


async def test_writes_that_come_together_activate_once_or_fail_together(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with standby(writes=Writes.ACTIVATE) as scene:
        scene.new.round_trip, errors = HUNG, []

        async def write(pos: int) -> None:
            try:
                await scene.image.write(pos, b"g" * CLUSTER)
            except SourceUnreachable as exc:
                errors.append(exc)

        for failed in (4, 0):
            errors.clear()
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(write, number * CLUSTER)
            assert len(errors) == failed
            assert scene.image.in_standby == bool(failed)
            scene.new.round_trip = 0.02
        assert bytes(await scene.image.read(0, SIZE)) == b"g" * 4 * CLUSTER + NEW[4 * CLUSTER :]


async def test_an_image_that_is_not_served_any_more() -> None:
    served = Served("disk.raw", "/overlays/disk.qed", 7, (1, 2, 3))
    async with trio.open_nursery() as nursery:
        pool, late = Pool("/", Policy(), 30, nursery), LateRecords(HolderLink(), {})
        cuts = CutOver(pool, OpenImages(), Options(), nursery, no_pages, late)
        for call in (cuts.activate, cuts.deactivate, cuts.check):
            with pytest.raises(QedfsError, match=r"disk.raw: is not served"):
                await call(served)
        await cuts.refresh(served)


async def no_pages(served: Served) -> None:
    raise AssertionError(served)


def test_the_bounds_leave_the_guest_less_than_two_seconds() -> None:
    assert cut_over.CONNECT_SECONDS < cut_over.ANSWER_SECONDS < cut_over.RECORD_SECONDS < 2
    assert cut_over.PAGES_SECONDS + cut_over.STUCK_SECONDS / 3 < 2
