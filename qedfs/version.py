"""Which version of its source the clusters of one image are of: found out, compared with the pin, stored as the pin.

Owns the look at the source's version, which all who wait share. Must not know reads, writes or the stream.
"""

from __future__ import annotations

import dataclasses
import logging

import trio

from qedfs.errors import QedfsError, SourceChanged, SourceUnreachable
from qedfs.fetch import Fetch
from qedfs.format.record import Pin, digest, shortened
from qedfs.overlay.overlay import Overlay
from qedfs.source.base import Identity

log = logging.getLogger(__name__)


class _Look:
    """One look at the version of the source. `error` is there, or the version is known, when `done` is set."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: QedfsError | None = None


class SourceVersion:
    """The version of the source of one image. `name` is the image's, for the log."""

    def __init__(self, name: str, overlay: Overlay, fetch: Fetch) -> None:
        self.identity: Identity | None = None  # what the source serves, if it has been compared with the pin
        self.changed: SourceChanged | None = None  # the source is another version than the overlay's clusters
        self._name = name
        self._overlay = overlay
        self._fetch = fetch
        self._look: _Look | None = None  # while one is under way

    def refuse(self, error: SourceChanged) -> None:
        """Take nothing from the source any more."""
        self.changed = error.fresh()
        self.identity = None

    async def check(self) -> Identity:
        """The source's identity, compared with the pin; the first time ever, it becomes the pin.

        The pin is durable before a byte of that version can be adopted: otherwise a power cut could leave clusters of
        a version that the overlay does not know about. An answer may tell more than the ones before: the pin knows
        that too, or refuses it, before a byte of that answer is of any use.

        Raises:
            SourceChanged: it is another version.
            QedfsError: the source cannot be reached, or the pin cannot be stored.
        """
        if self.changed is not None:
            raise self.changed.fresh()
        while self.identity is None or self.identity is not self._fetch.remote.identity:
            look = self._look
            if look is None:
                look = _Look()
                # A task of its own: a reader that is killed must not end the look that others wait for.
                self._fetch.nursery.start_soon(self._look_at_source, look)
                self._look = look
            await look.done.wait()
            if look.error is not None:
                raise look.error.fresh()
        return self.identity

    async def _look_at_source(self, look: _Look) -> None:
        """Find out the identity for all who wait. One by one, each would wait for the deadlines of those before it."""
        # Stays so if the task is cancelled, while those who wait need not be.
        look.error = SourceUnreachable(f"backing {self._fetch.remote.location}: closed")
        try:
            self.identity = await self._pinned()
            look.error = None
        except QedfsError as exc:
            look.error = exc
        except Exception:
            log.exception("%s: cannot look at the source", self._name)
            look.error = QedfsError("internal error, see the log")
        finally:
            self._look = None
            look.done.set()

    async def _pinned(self) -> Identity:
        identity = await self._fetch.identity()
        overlay = self._overlay
        backing = digest(overlay.backing or "")
        found = Pin(backing, identity.size, shortened(identity.etag), shortened(identity.last_modified))
        pin = overlay.record.pin
        difference = None
        if pin is not None and pin.backing == backing:
            difference = _identity(pin).difference(_identity(found))
            if difference is None:
                found = Pin(backing, found.size, found.etag or pin.etag, found.last_modified or pin.last_modified)
                if found == pin:
                    return identity
        if difference is not None:
            await self._start_over_or_refuse(difference)
        # Without copy-on-read too: a stream keeps what it fetches, and so does a write of part of a cluster.
        if overlay.writable:
            await overlay.change_record(lambda record: dataclasses.replace(record, pin=found))
        return identity

    async def _start_over_or_refuse(self, difference: str) -> None:
        """Return if the overlay has no cluster, so that none can be of the old version; otherwise SourceChanged."""
        clusters = self._overlay.clusters
        await clusters.count()
        what = f"backing {self._fetch.remote.location} is not the version that this overlay was started from"
        if clusters.missing == self._overlay.geometry.clusters:
            kept = "nothing had been kept of that one, the new version is used"
            log.warning("%s: %s (%s); %s", self._name, what, difference, kept)
            return
        error = SourceChanged(
            f"{what} ({difference}); what is local is served. Bring the old version back, or start a new overlay"
        )
        self.refuse(error)
        raise error


def _identity(pin: Pin) -> Identity:
    return Identity(pin.size, pin.etag, pin.last_modified)
