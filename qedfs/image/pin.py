"""The pin of one image: the version of the source that its clusters come from.

Owns the check of the source's version against the pin, which all waiting tasks share, and the storing of the pin. Must
not know reads, writes or the stream.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from qedfs.errors import QedfsError, SourceChanged, SourceUnreachable
from qedfs.fetch.queue import FetchQueue
from qedfs.format.record import Pin, Record, digest, shortened, shortened_name
from qedfs.image.condition import Cause, Condition
from qedfs.overlay.overlay import Overlay
from qedfs.source.base import Identity, Sameness
from qedfs.source.local import local_file
from qedfs.source.pinning import By, Pinning
from qedfs.source.retrying import RetryingSource
from qedfs.source.samples import Samples
from qedfs.source.single_flight import SingleFlight

log = logging.getLogger(__name__)

T = TypeVar("T")


_WAY_OUT = "Bring the old version back, or start a new overlay"


class SourceVersion:
    """The version of the source of one image. `name`: the image's name, for the log."""

    def __init__(self, name: str, overlay: Overlay, fetch: FetchQueue, condition: Condition) -> None:
        self.identity: Identity | None = None  # of the source, after it was compared with the pin
        self._name = name
        self._overlay = overlay
        self._fetch = fetch
        self._condition = condition
        self._looks = SingleFlight(
            fetch.nursery, self._look_at_source, name=f"{name}: cannot look at the source", cancelled=self._closed_error
        )
        self._agreed = False  # after a refusal: all bytes read before it were of the pinned version
        self._asking = trio.CancelScope()  # around the requests of a check
        self._closed = False

    @property
    def changed(self) -> QedfsError | None:
        """The error if the source now serves another version than the overlay's clusters; otherwise None."""
        return self._condition.noted(Cause.SOURCE_CHANGED)

    @property
    def size(self) -> int | None:
        """The size in bytes of the pinned version; None if nothing is pinned yet."""
        if self.identity is not None:
            return self.identity.size
        pin = self._overlay.record.pin
        return pin.size if pin is not None and pin.backing == digest(self._overlay.backing or "") else None

    def refuse(self, error: SourceChanged) -> None:
        """Use nothing more from the source, because it serves another version."""
        self._agreed = self._agrees
        text = str(error)
        known = _WAY_OUT in text
        changed = error if known else SourceChanged(f"{text}; what is local is served. {_way_out(text)}")
        self._condition.note(Cause.SOURCE_CHANGED, changed)
        self.identity = None

    def close(self) -> None:
        """Stop asking the source. Tasks that wait for an answer get SourceUnreachable at once.

        Fetched bytes may still wait for a check by a source that does not answer. The end of a mount must not wait for
        that.
        """
        self._closed = True
        self._asking.cancel()

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        if not self._closed:
            with trio.CancelScope() as self._asking:
                return await question()
        raise self._closed_error()

    def _closed_error(self) -> SourceUnreachable:
        return SourceUnreachable(f"backing {self._fetch.remote.location}: closed")

    @property
    def _agrees(self) -> bool:
        """Whether all bytes read so far are of the pinned version."""
        return self._agreed or (self.identity is not None and self.identity is self._fetch.remote.identity)

    async def check(self) -> Identity:
        """The source's identity, after comparing it with the pin. The very first identity becomes the pin.

        The pin is durable before any byte of that version is adopted. Otherwise a power cut could leave clusters of a
        version that the overlay has no record of. If an answer reveals more about the version, the pin is extended, or
        the answer refused, before its bytes are used.

        Raises:
            SourceChanged: the source serves another version.
            QedfsError: the source cannot be reached, or the pin cannot be stored.
        """
        if (changed := self.changed) is not None:
            raise changed.fresh()
        while self.identity is None or self.identity is not self._fetch.remote.identity:
            # In a loop: while we waited, an answer may have revealed more of the version than this look has compared.
            await self._looks.result()
        return self.identity

    async def compare(self) -> Identity:
        """As `check`, for a look that leaves the overlay as it is: nothing is stored, so `check` looks again."""
        if (changed := self.changed) is not None:
            raise changed.fresh()
        identity, _ = await self._compared()
        return identity

    async def _look_at_source(self) -> None:
        self.identity = await self._pinned()

    async def _compared(self) -> tuple[Identity, Pin | None]:
        """The source's identity, and the pin to store; None if the overlay has it."""
        identity = await self._ask(self._fetch.identity)
        overlay, remote = self._overlay, self._fetch.remote
        backing = digest(overlay.backing or "")
        pin = overlay.record.pin
        if pin is not None and (pin.backing != backing or remote.pinning.by is By.NONE):
            pin = None
        if pin is not None and overlay.record.committing and pin.size < identity.size <= overlay.image_size:
            pin = dataclasses.replace(pin, size=identity.size)  # a commit that was interrupted has made it longer
        found = _pin(backing, identity, remote.pinning.called)
        if pin is not None:
            difference = await self._difference(pin, found)
            if difference:
                await self._start_over_or_refuse(difference)
            else:
                remote.samples.take_over(pin.samples)
                found = _joined(pin, found, remote.pinning)
                if found == pin:
                    return identity, None
        return identity, found

    async def _pinned(self) -> Identity:
        identity, found = await self._compared()
        overlay, remote = self._overlay, self._fetch.remote
        # Even without copy-on-read: the stream and partial writes keep what they fetch.
        if found is not None and overlay.writable and not overlay.record.standby.waits:
            if overlay.record.committing and (source := local_file(remote.connected)) is not None:
                # A commit that was interrupted has not done it. Otherwise a power cut could take the time back that the
                # pin has, and the backing would be refused from then on.
                await self._ask(source.sync)
            await store_pin(overlay, found)
        return identity

    @property
    def pin(self) -> Pin | None:
        """What to store about the version that was compared last; None if none was. Without samples."""
        if self.identity is None:
            return None
        return _pin(digest(self._overlay.backing or ""), self.identity, self._fetch.remote.pinning.called)

    async def _difference(self, pin: Pin, found: Pin) -> str:
        """How the source differs from the pinned version, in words; "" if it is the same version."""
        remote = self._fetch.remote
        if pin.called and found.called:
            if pin.called != found.called:
                return f"it was called {pin.called}, is now called {found.called}"
            if pin.size == found.size:
                return ""
        verdict = remote.pinning.counted(_identity(pin)).compare(_identity(found))
        if verdict.sameness in (Sameness.SAME, Sameness.CHANGED):
            return verdict.why
        samples = Samples.decode(pin.samples)
        if not samples:
            return verdict.why
        different = await self._ask(lambda: remote.difference(samples))
        if different is None and verdict.why:
            log.info("%s: %s, but the bytes are the same", self._name, verdict.why)
        return "" if different is None else ", and ".join(filter(None, (verdict.why, different)))

    async def remember(self) -> None:
        """Store samples of the bytes read so far, for the next session to compare.

        Readers never wait for this. Without samples, a doubtful version counts as changed.
        """
        samples, overlay = self._fetch.remote.samples.encode(), self._overlay
        pin = overlay.record.pin
        if not self._agrees or pin is None or samples == pin.samples or not overlay.writable:
            return

        def with_samples(record: Record) -> Record:
            # The overlay may have been detached meanwhile, and then has no pin.
            pin = None if record.pin is None else dataclasses.replace(record.pin, samples=samples)
            return dataclasses.replace(record, pin=pin)

        await overlay.change_record(with_samples)

    async def _start_over_or_refuse(self, difference: str) -> None:
        """Return if the overlay has no clusters yet, so that any version can be pinned; else raise SourceChanged."""
        await self._overlay.count_missing()
        what = f"backing {self._fetch.remote.location} is not the version that this overlay was started from"
        if self._overlay.missing == self._overlay.geometry.clusters:
            kept = "nothing had been kept of that one, the new version is used"
            log.warning("%s: %s (%s); %s", self._name, what, difference, kept)
            return
        error = SourceChanged(f"{what} ({difference}); what is local is served. {_way_out(difference)}")
        self.refuse(error)
        raise error


def pin_for(backing: str, remote: RetryingSource, identity: Identity, samples: Samples) -> Pin:
    """The pin of a source that was compared. `backing`: its name in the overlay. `samples`: of the same version."""
    made = _pin(digest(backing), identity, remote.pinning.called)
    return dataclasses.replace(made, samples=samples.encode())


async def store_pin(overlay: Overlay, pin: Pin) -> None:
    """Store a pin, whatever the record has now. Raises what `Overlay.change_record` raises."""
    await overlay.change_record(lambda record: dataclasses.replace(record, pin=pin, committing=False))


def _way_out(difference: str) -> str:
    ways = _WAY_OUT
    if "ETag was" in difference or "Last-Modified was" in difference:
        # Several servers behind one name may give the same file different tags and dates.
        ways += "; if the bytes are the same nevertheless: mount --pin date, --pin etag or --pin size"
    return ways


def _pin(backing: str, identity: Identity, called: str | None) -> Pin:
    return Pin(
        backing,
        identity.size,
        shortened(identity.etag),
        shortened(identity.last_modified),
        identity.digest or "",
        identity.place,
        called=shortened_name(called or ""),
    )


def _identity(pin: Pin) -> Identity:
    return Identity(pin.size, pin.etag, pin.last_modified, digest=pin.published or None, place=pin.place)


def _joined(pin: Pin, found: Pin, pinning: Pinning) -> Pin:
    """The new pin: what the source reports now, completed with what only the old pin has of the same version."""
    kept = dataclasses.replace(found, samples=pin.samples, called=found.called or pin.called)
    if pin.place != found.place and pin.place and found.place:
        return kept  # the tags of another server
    known = pinning.counted(_identity(pin))
    return dataclasses.replace(
        kept,
        etag=found.etag or known.etag,
        last_modified=found.last_modified or known.last_modified,
        published=found.published or known.digest or "",
        place=found.place or pin.place,
    )
