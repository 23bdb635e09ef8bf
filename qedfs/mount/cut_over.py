"""The cut-over: an image in standby gets a new connection to its source, and keeps what it reads from then on.

Owns the order of the steps, and the way back to standby if one of them fails. `Image.exchange_source` is the heart of
it. Must not know commands. Whoever asks for a cut-over promises that nobody changes the source any more.

1. A new source is connected, and its size compared with what the record says. Until then nothing has changed.
2. The image gets the new source. Reads that wait for the old one are run again. They show that the source delivers.
3. The record says, durably, that the image is active, and which version it has. This decides: a kill before it leaves
   the image in standby, a kill after it leaves it active. Nothing is kept before that.
4. The gate opens: writes go on. Before step 5, because the kernel locks the pages of a write that waits.
5. The kernel drops its pages. Without this, a reader could get bytes that were read before the cut-over.
6. The stream starts, the old connection is closed.

The source decides how long steps 1, 2 and 5 take, and the overlay's disk how long step 3 does, so that each has a
bound. If step 3 exceeds it, what the disk writes later is revoked. If step 5 does, the reads that the kernel waits for
are given up.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator

import trio

from qedfs.errors import QedfsError, ReadOnlyOverlay, SourceUnreachable, TimedOut
from qedfs.fetch.queue import FetchQueue
from qedfs.image.image import Image
from qedfs.image.standby import PassThrough
from qedfs.image.standby_record import check_size, check_way_back, record_active, record_emptying, record_waiting
from qedfs.image.write_gate import WriteGate
from qedfs.jobs.state import AT_WORK
from qedfs.mount.late_records import LateRecords
from qedfs.mount.open_images import OpenImages
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.mount.source_pool import SourcePool
from qedfs.overlay.open import open_storage
from qedfs.source.single_flight import SingleFlight

log = logging.getLogger(__name__)

# A guest stands still for less than two seconds. All of this starts with the cut-over, whatever it waits for.
CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 1.4  # until the reads that are run again are answered
RECORD_SECONDS = 1.8  # until the disk has the record
PAGES_SECONDS = 1.7  # until reads are given up, those that have waited for STUCK_SECONDS
STUCK_SECONDS = 0.3
LOOK_SECONDS = 0.005  # between two looks whether a job has come to rest
BACK_SECONDS = 30.0  # until whoever asks for the way back is told that the disk does not take it
LOST_SECONDS = 5.0  # for the kernel, after its reads were given up. It needs milliseconds.

DropPages = Callable[[Served], Awaitable[None]]


class CutOver:
    """The cut-overs of one mount."""

    def __init__(
        self,
        sources: SourcePool,
        images: OpenImages,
        options: Options,
        nursery: trio.Nursery,
        drop_pages: DropPages,
        late: LateRecords,
    ) -> None:
        """`nursery` runs activations that writes have asked for.

        `drop_pages`: lets the kernel drop the pages of an image (`KernelPages.drop`).
        """
        self._sources = sources
        self._images = images
        self._options = options
        self._nursery = nursery
        self._drop_pages = drop_pages
        self._late = late

    def activation(self, served: Served) -> Callable[[], Awaitable[None]]:
        """What a write does that activates its image. Writes that come together activate it once, or fail together."""

        async def activate() -> None:
            await self.activate(served)

        name = f"{served.name}: cannot be activated"
        return SingleFlight(self._nursery, activate, name=name, cancelled=_ended(served)).result

    async def activate(self, served: Served) -> None:
        """Activate an image. Does nothing if it is active. Of concurrent calls, the later ones wait for the first.

        Raises:
            SourceUnreachable, SourceError: the source is not there, or does not deliver. The image is in standby.
            SourceChanged: the source has another size. The image is in standby.
            QedfsError: the activation cannot be recorded. The image is in standby.
        """
        async with served.cut_over:
            image, began = _image(served), trio.current_time()
            if image.in_standby:
                _check_recordable(served, image)
                fetch = await self._connected(image)
                await self._exchange(served, image, fetch, began)
                log.info("%s: is active", served.name)
            # Also for a call that repeats one which has failed here, perhaps of an earlier server of this mount.
            if served.stale_pages:
                await self._fresh_pages(served, image, latest=began + PAGES_SECONDS)
                self._start_stream(served)

    async def deactivate(self, served: Served) -> None:
        """Put an image back in standby, and drop what it has got since its activation: the other program goes on.

        Does nothing if it is in standby. Waits for no source. Once it has begun it goes on, whoever waits for it: the
        overlay's disk may hang, and then neither the caller nor the end of the mount may wait for that.

        Raises:
            QedfsError: a guest has written since, or it was not activated, or is complete. The image is active.
            TimedOut: the overlay's disk has not taken it yet.
        """
        name = f"{served.name}: cannot go back to standby"
        flight = SingleFlight(self._nursery, lambda: self._go_back(served), name=name, cancelled=_ended(served))
        with trio.move_on_after(BACK_SECONDS) as scope:
            await flight.result()
        if scope.cancelled_caught:
            raise TimedOut(
                f"{served.name}: the disk of its overlay has not recorded the way back to standby within"
                f" {BACK_SECONDS:g} s; that goes on, and the next --undo waits for it, too"
            )

    async def _go_back(self, served: Served) -> None:
        async with served.cut_over:
            image = _image(served)
            if image.in_standby:
                if served.recording is not None:
                    await served.recording.wait()  # or a later mount could find it active
                if served.stale_pages:  # a call before this one has failed late
                    await self._fresh_pages(served, image, latest=trio.current_time() + PAGES_SECONDS)
                return
            check_way_back(served.name, image.overlay)
            through = await self._sources.pass_through_for(image.overlay, overlays=len(self._images) + 1)
            # First, and without an await after it: a write that has passed is noted in the record before the next step.
            longest = image.stalls.kernel_seconds
            gate = image.gate = WriteGate(served.name, self._options.standby_writes, most_seconds=longest)
            gate.activate = self.activation(served)
            with _recording(served), trio.CancelScope(shield=True):
                try:
                    await record_emptying(served.name, image.overlay)
                except BaseException:
                    gate.open()
                    image.gate = None
                    self._sources.release_soon(through.remote)
                    raise
                await self._empty(served, image, through)
            await self._fresh_pages(served, image, latest=trio.current_time() + PAGES_SECONDS)
            log.info("%s: is in standby again", served.name)

    async def _empty(self, served: Served, image: Image, through: PassThrough) -> None:
        """The record says already that the overlay is empty: reads pass through from here on, then the file follows."""
        served.stale_pages = True
        jobs = [] if served.jobs is None else served.jobs.all()
        for job in jobs:
            job.cancel()  # before the exchange: from then on they have nothing to work on
        if served.jobs is not None and served.jobs.populate is not None:
            # Its copy is of the source as it was, and it writes to the overlay that is emptied here.
            served.jobs.populate.cancel()
        old = image.exchange_source(None, standby=through)
        if old is not None:
            await self._sources.release(old)
        # The tasks of an image end when its overlay is removed from the folder, and their jobs look the same for ever.
        while any(job.state in AT_WORK for job in jobs) and not served.scope.cancel_called:  # noqa: ASYNC110
            await trio.sleep(LOOK_SECONDS)
        if served.scope.cancel_called:
            raise QedfsError(f"{served.name}: is not there any more")
        await image.consumer.adoptions_ended()
        storage = await image.overlay.empty()
        options = self._options
        image.replace_overlay(
            await open_storage(storage, journal_folder=options.journal_folder, session_prefix=options.session_prefix)
        )
        await image.overlay.count_missing()

    async def refresh(self, served: Served) -> None:
        """Drop pages that an earlier server of this mount has left, if it may have ended during a cut-over."""
        async with served.cut_over:
            if served.stale_pages and served.image is not None:
                try:
                    await self._fresh_pages(served, served.image, latest=trio.current_time() + PAGES_SECONDS)
                except QedfsError as exc:
                    log.warning("%s", exc)

    async def check(self, served: Served) -> None:
        """Raise what `activate` would raise now, as far as that shows without changing anything."""
        async with served.cut_over:
            image = _image(served)
            if not image.in_standby:
                return
            _check_recordable(served, image)
            fetch = await self._connected(image)
            self._sources.release_soon(fetch.remote)

    async def _connected(self, image: Image) -> FetchQueue:
        """Step 1."""
        fetch = await self._sources.own_fetch_for(image.overlay, overlays=len(self._images))
        try:
            with trio.move_on_after(CONNECT_SECONDS):
                check_size(image.name, image.overlay, (await fetch.identity()).size)
                return fetch
            error = fetch.remote.error
            why = "" if error is None else f": {error}"
            raise SourceUnreachable(
                f"{image.name}: backing {fetch.remote.location} gave no answer within {CONNECT_SECONDS:g} s{why}"
            )
        except BaseException:
            self._sources.release_soon(fetch.remote)
            raise

    async def _exchange(self, served: Served, image: Image, fetch: FetchQueue, began: float) -> None:
        """Steps 2 to 4."""
        standby = image.standby
        served.stale_pages = True
        image.exchange_source(fetch)
        try:
            with trio.move_on_at(began + ANSWER_SECONDS) as scope:
                await image.reads.waiting.answered()
                await image.source_size()
            if scope.cancelled_caught:
                raise SourceUnreachable(f"{image.name}: backing {fetch.remote.location} connects, but does not deliver")
            await self._record(served, image, latest=began + RECORD_SECONDS)
        except BaseException:
            image.exchange_source(None, standby=standby)
            self._sources.release_soon(fetch.remote)
            raise
        image.open_gate()
        if standby is not None:
            self._sources.release_soon(standby.remote)

    async def _record(self, served: Served, image: Image, *, latest: float) -> None:
        """Step 3, in a task of its own: a thread that waits for a disk which hangs cannot be cancelled."""
        pin = None if image.version is None else image.version.pin
        failure: Exception | None = None
        ended, in_time = trio.Event(), True
        self._late.forget(image.overlay)  # what an earlier attempt has left must not take this one back

        async def record() -> None:
            nonlocal failure
            try:
                with _recording(served), trio.CancelScope(shield=True):
                    await record_active(image.overlay, pin)
                    if not in_time:
                        # Whoever has asked was told that it is in standby, and goes on at the source.
                        await record_waiting(image.overlay)
                        self._late.forget(image.overlay)
            except Exception as exc:
                failure = exc
                if not in_time:
                    log.error("%s: its activation may count at the next mount: %s", served.name, exc)
            finally:
                ended.set()

        self._nursery.start_soon(record)
        with trio.CancelScope(shield=True, deadline=latest):
            await ended.wait()
        in_time = ended.is_set()
        if not in_time:
            self._late.note(image.overlay)  # before the answer
            raise QedfsError(
                f"{image.name}: stays in standby: the disk of its overlay does not take the record of that"
            )
        if failure is not None:
            raise failure

    async def _fresh_pages(self, served: Served, image: Image, *, latest: float) -> None:
        """Step 5."""
        done = False

        async def drop() -> None:
            nonlocal done
            await self._drop_pages(served)
            done = True
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drop)
            await trio.sleep_until(latest)
            while trio.current_time() < latest + LOST_SECONDS:
                image.give_up(since=trio.current_time() - STUCK_SECONDS)
                await trio.sleep(STUCK_SECONDS / 3)
            nursery.cancel_scope.cancel()
        if not done:
            raise QedfsError(f"{served.name}: is active, but the kernel still has old pages of it; activate it again")
        served.stale_pages = False

    def _start_stream(self, served: Served) -> None:
        if served.jobs is None or not self._options.stream or served.jobs.stream.enabled:
            return
        stream = served.jobs.stream
        paused = stream.paused
        stream.start()
        if paused:
            stream.hold()


@contextlib.contextmanager
def _recording(served: Served) -> Iterator[None]:
    """The overlay is not closed before the block is left."""
    served.recording = ended = trio.Event()
    try:
        yield
    finally:
        served.recording = None
        ended.set()


def _ended(served: Served) -> Callable[[], QedfsError]:
    return lambda: QedfsError(f"{served.name}: the mount has ended")


def _check_recordable(served: Served, image: Image) -> None:
    """Raise QedfsError if no record could say that the image is active."""
    if not image.writable:
        raise ReadOnlyOverlay(f"{served.name}: is read-only, so that it stays in standby")
    if served.recording is not None:
        raise QedfsError(f"{served.name}: the disk of its overlay has not ended an earlier activation yet")


def _image(served: Served) -> Image:
    if served.image is None:
        raise QedfsError(f"{served.name}: is not served")
    return served.image
