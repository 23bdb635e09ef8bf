"""Commits an image into its backing while guests use it: the steps, one at a time.

Owns the order of writes in two files and the exchanges of the source. Must not know how fast it may go, nor who
controls it (`jobs/commit.py`). The order is that of `commit_down.py`, which says what each step prevents. What is
different:

- The image reads its missing clusters from the file that we write to, by its own mtime another version all the time. So
  it gets a source that reads through our descriptor (`written_backing.py`), and when all is written, durable and at
  rest, one that compares versions again. (A QED image is changed by the end of its session, too: `qed_target.py`.) An
  exchange is the end of all answers of the old source, and of what they would have been kept for
  (`Image.exchange_source`).
- Nothing that is read is kept until then: after an adoption from the time before, a cluster would be what the backing
  was, not what a guest has written and we have committed.
- The clusters with samples are left alone to the end, also if a guest writes to them meanwhile. After a kill, the next
  session knows the backing by these samples, by whatever mtime.
- The entries go one by one, each only if the backing has the same bytes at that moment (`overlay/dropping.py`). What a
  guest has written to since it was copied stays in the overlay, for another commit.
- The pin must be durable before the first entry goes, as in `commit_down.py`. After that the backing is only read, so
  that it stays the version that the pin says.

Between any two steps, also after a kill or a power cut, the image reads as before, and the same steps again end it.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
from collections.abc import Iterator

import trio

from qedfs.errors import InStandby, InUse, QedfsError, ReadOnlyOverlay, SourceChanged, SourceError, UsageError
from qedfs.format.record import Pin, digest
from qedfs.format.tables import MISSING, ZERO
from qedfs.host.durable import sync_file
from qedfs.image.backing_file import BackingFile, check_unused, find_file, open_qed, open_raw
from qedfs.image.commit_down import LOOK_BYTES, LOOKS, begun
from qedfs.image.commit_target import Target
from qedfs.image.image import Image
from qedfs.image.own_backing import OwnBacking
from qedfs.image.pin import pin_for, store_pin
from qedfs.image.written_backing import WrittenBacking
from qedfs.source.base import Source
from qedfs.source.local import local_file
from qedfs.source.retrying import RetryingSource
from qedfs.source.samples import Samples
from qedfs.source.url import Location

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20  # copied at once
LOOKS_FOR_OTHERS, LOOK_SECONDS = 10, 0.1  # until it is sure that others have the backing open


class LiveCommit:
    """One commit of one served image."""

    def __init__(self, image: Image) -> None:
        """Raise a QedfsError if the image, as it is, cannot be committed."""
        self._image = image
        self._own, self._location = way_of(image)
        self._clusters = image.overlay.geometry.clusters  # those that a growth adds stay in the overlay
        self._size = image.overlay.image_size  # what the backing has past that is not the image's
        self._keeps = image.copy_on_read
        self._samples = Samples()
        self._sampled: list[int] = []  # the clusters that they are in
        self._ready = trio.Event()  # set when the backing can be read through our descriptor
        self._held: RetryingSource | None = None  # the source that does it
        self._target: Target | None = None
        self._file: BackingFile | None = None  # that it is on
        self._doubtful = False  # whether the disk lacks what the page cache of the backing shows
        self.asked_since: float | None = None  # when its file system was told to do what it has not done yet
        self.settled = False  # whether the backing has everything, durably, and the overlay says so

    @property
    def open(self) -> bool:
        """Whether `begin` has ended well."""
        return self._ready.is_set()

    @property
    def place(self) -> Location:
        """Where the backing is."""
        return self._location

    @property
    def clusters(self) -> int:
        """How many clusters it is about, from the first one on."""
        return self._clusters

    async def begin(self) -> None:
        """Step 1, and the growth of the backing.

        Raises:
            InUse: somebody else has the backing open, or another image of this mount has it.
            SourceChanged: it is not the version that the overlay was started from.
            UsageError: it is of a kind that a mount does not write.
            QedfsError: a file failed. After each of these errors, the image reads from its source as before.
        """
        try:
            self._image.overlay.dropping.allow()
            await self._begin()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.leave()
            raise

    async def _begin(self) -> None:
        overlay = self._image.overlay
        file = await self._found()
        if await self._own.linked():  # an image that has not read yet, so that `_unused` finds nobody
            raise shared_error(self._image, self._location)
        await overlay.flush()
        target = self._target = await self._taken(file)
        self._samples, self._sampled = await self._sample(target)
        # Before the first byte: from then on, a mount that knows only the pin of before would refuse the backing.
        pin = Pin(digest(overlay.backing or ""), target.size, samples=self._samples.encode())
        await overlay.change_record(lambda record: begun(record, pin))
        with self._asking():
            await target.begin()
            if target.size < overlay.image_size:
                await target.grow(overlay.image_size)
        self._ready.set()

    async def _found(self) -> BackingFile:
        """The file of the backing, of the pinned version, which the image has open as its source."""
        image, overlay = self._image, self._image.overlay
        file = await find_file(self._location, self._own.policy, probes=overlay.probes_backing)
        if os.path.samestat(file.status, overlay.file_status()):
            raise UsageError(f"backing {self._location}: is the overlay itself")
        await image.source_size()
        self._check_file(image.source, file, "the mount has opened it")
        # While readers go on: in `_taken` they wait, and a file that was just copied takes a while.
        try:
            with self._asking():
                await trio.to_thread.run_sync(sync_file, file.path)
        except OSError as exc:
            raise SourceError(f"backing {self._location}: cannot sync: {exc.strerror}") from exc
        return file

    def _check_file(self, remote: RetryingSource | None, file: BackingFile, since: str) -> None:
        """Raise SourceChanged if this source has another file open."""
        source = None if remote is None else local_file(remote.connected)
        if source is None or not source.is_on(file.status):
            raise SourceChanged(f"backing {self._location}: was replaced by another file since {since}")

    async def _taken(self, file: BackingFile) -> Target:
        """Take the file over from the source of the image, so that nobody else has it open, and open it for writing."""
        image = self._image
        if self._own.shared:
            raise shared_error(image, self._location)
        self._held = RetryingSource(self._location, self._through)
        image.copy_on_read = False
        old = image.exchange_source(self._own.fetch_from(self._held))
        if old is not None:
            await self._own.release(old)
        await image.consumer.adoptions_ended()
        await self._unused(file)
        self._file = file
        with self._asking():
            return await self._opened(file)

    async def _opened(self, file: BackingFile) -> Target:
        if not file.qed:
            return await open_raw(self._location, file)
        target = await open_qed(self._location, file)
        try:
            target.check_settled()
        except BaseException:
            with trio.CancelScope(shield=True):
                await target.close()
            raise
        return target

    async def _unused(self, file: BackingFile) -> None:
        """Raise InUse if somebody else has the file open. A read of the old source may still be under way, and has."""
        for look in range(1, LOOKS_FOR_OTHERS + 1):
            try:
                await check_unused(self._location, file)
                break
            except InUse:
                if look == LOOKS_FOR_OTHERS:
                    raise
                await trio.sleep(LOOK_SECONDS)

    async def _through(self) -> Source:
        """The source of `_held`. Its readers wait until there is one."""
        await self._ready.wait()
        assert self._target is not None  # noqa: S101 - for the type checker
        return WrittenBacking(self._target, self._location)

    async def _sample(self, target: Target) -> tuple[Samples, list[int]]:
        """Samples of the backing where the overlay has nothing, spread over the image, and the clusters they are in."""
        overlay, samples = self._image.overlay, Samples()
        taken: dict[int, int] = {}
        for number in range(LOOKS):
            found = await overlay.next_missing(number * self._clusters // LOOKS, LOOK_BYTES // 4096)
            if found is None:
                break
            pos = found[0] * overlay.cluster_size
            size = min(LOOK_BYTES, found[1] * overlay.cluster_size, target.size - pos)
            if size > 0:
                taken.update(await target.sample(pos, size, samples))
        kept = Samples.decode(samples.encode())  # as many as the record has room for
        return kept, sorted(taken[place] // overlay.cluster_size for place in kept.places)

    async def copy(self, first: int, most: int) -> tuple[int, int]:
        """Step 2, for up to `most` clusters from `first` on. Returns the next one, and how many bytes were compared."""
        overlay, target = self._image.overlay, self._open_target()
        if gap := await overlay.gap(first):
            return min(self._clusters, first + gap), 0
        cluster_size = overlay.cluster_size
        stop = min(first + max(1, min(most, PIECE_BYTES // cluster_size)), self._clusters)
        at = bisect.bisect_left(self._sampled, first)
        if at < len(self._sampled):
            stop = min(stop, self._sampled[at])
            if stop == first:
                return first + 1, 0
        pos = first * cluster_size
        size = min(stop * cluster_size, self._size) - pos
        if overlay.failure is not None:
            raise overlay.failure.fresh()
        view = memoryview(bytearray(size))
        runs = await overlay.map(pos, size)
        with overlay.reading():
            for run in runs:
                if run.offset > ZERO:
                    await overlay.read_data(run.offset, view[run.pos - pos : run.pos - pos + run.size])
        done = 0
        for run in runs:
            with self._asking():
                if run.offset == ZERO:
                    await target.zero(run.pos, run.size)
                elif run.offset != MISSING:
                    await target.store(run.pos, view[run.pos - pos : run.pos - pos + run.size])
            done += run.size if run.offset != MISSING else 0
        return stop, done

    async def doubted(self) -> bool:
        """Whether all must be copied again, because a barrier has failed. The reads show the disk then.

        If they cannot, the commit is not `open` any more. If it cannot be left either, the error of the target is
        raised, and the next call tries both again. The kernel tells once of bytes that the disk did not take.
        The page cache may keep them, so that they do not differ from the overlay's, and the next barrier succeeds
        without them.
        """
        doubtful = self._doubtful or (self._target is not None and self._target.failed)
        if doubtful:
            try:
                with self._asking():
                    await self._open_target().refresh()
                self._image.overlay.dropping.allow()  # again, if it could not be left the last time
            except QedfsError as exc:
                await self.leave()
                if self.open:
                    raise  # no other source can be had yet, and no target whose reads show the disk: the doubt stays
                log.warning("%s: the commit begins anew: %s", self._image.name, exc)
            self._doubtful = False
        return doubtful

    async def settle(self) -> None:
        """Steps 3 and 4. After an error it may be called again, after a look at `doubted` and at `open`."""
        image, overlay, target = self._image, self._image.overlay, self._open_target()
        # After the reads: if another program has cut the overlay off, they were zeros.
        await overlay.inspect()
        # The bytes and the times of the backing. Without this barrier, entries could go, and after a power cut neither
        # file would have what a guest had flushed.
        try:
            with self._asking():
                await target.sync()
        except QedfsError:
            self._doubtful = True
            raise
        # Before a source looks at the times.
        try:
            with self._asking():
                await target.rest()
        except QedfsError:
            # It cannot be read any more, and nobody may come for long, if the job waits for a user.
            with trio.CancelScope(shield=True):
                await self.leave()
            raise
        fetch = await self._own.fetch()
        try:
            identity = await fetch.remote.connect()
            if self._file is not None:
                # Otherwise it would be the pin of a file that lacks what the overlay is about to drop.
                self._check_file(fetch.remote, self._file, "the commit has begun")
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._own.release(fetch.remote)
            raise
        old = image.exchange_source(fetch)
        image.copy_on_read = self._keeps
        if old is not None:
            await self._own.release(old)
        # Durable before any entry goes: an overlay that needs the backing for everything must know which version.
        await store_pin(overlay, pin_for(overlay.backing or "", fetch.remote, identity, self._samples))
        await image.consumer.adoptions_ended()
        self.settled = True

    async def drop(self, first: int, count: int) -> int | None:
        """Step 5, for so many clusters, after `settle`. See `Dropping.drop`."""
        return await self._image.overlay.dropping.drop(first, count, self._open_target())

    async def leave(self) -> None:
        """Give the backing back, at whichever step. What was not dropped is in the overlay, as before.

        `begin` may come again.
        """
        image = self._image
        image.overlay.dropping.forbid()
        if self._held is not None and image.source is self._held and not image.closed:
            try:
                if self._target is not None:
                    with self._asking():
                        await self._target.rest()  # before a source looks at the times
            except QedfsError as exc:
                log.error("%s: its backing: %s", image.name, exc)
            try:
                fetch = await self._own.fetch()
            except (QedfsError, OSError) as exc:
                log.error("%s: its backing cannot be opened again: %s", image.name, exc)
                return  # it reads through our descriptor on
            # Its check finds the samples in the record, and lets the overlay have a whole pin again (`pin.py`).
            image.exchange_source(fetch)
            image.copy_on_read = self._keeps
        if self._held is not None:
            await self._own.release(self._held)
            self._held = None
        if self.open:
            self._ready = trio.Event()
        target, self._target = self._target, None
        if target is not None:
            try:
                with self._asking():
                    await target.close()
            except QedfsError as exc:
                log.error("%s: its backing: %s", image.name, exc)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Around a request to the file system of the backing. The thread that makes it cannot be abandoned."""
        self.asked_since = trio.current_time()
        try:
            yield
        finally:
            self.asked_since = None

    def _open_target(self) -> Target:
        assert self._target is not None  # noqa: S101 - for the type checker; `begin` has opened it
        return self._target


def way_of(image: Image) -> tuple[OwnBacking, Location]:
    """How to get at the backing. Raises a QedfsError if that is nothing that can be written."""
    if image.complete:
        raise UsageError(f"{image.name}: is complete, and has no backing")
    if image.in_standby:
        raise InStandby(f"{image.name}: is in standby, and has no data; qedfs activate ends that")
    if not image.writable:
        raise ReadOnlyOverlay(f"{image.name}: the overlay is read-only, so that nothing in it can be dropped")
    if image.own_backing is None or image.source is None:
        raise UsageError(f"{image.name}: has no source")
    location = image.source.location
    if location.kind != "file":
        raise UsageError(
            f"{image.name}: its backing {location} is on a server, and only read; qedfs export --with-backing writes"
            " the whole image to a file"
        )
    if image.own_backing.shared:
        raise shared_error(image, location)
    return image.own_backing, location


def shared_error(image: Image, location: Location) -> InUse:
    """The error of a commit that would make another image of the mount useless."""
    return InUse(
        f"backing {location}: another image of this mount has it, too, and would become useless; {image.name} is not"
        " committed"
    )
