"""The session of an open overlay: its start, the changes of its record, the checks of the file, and its end.

Owns the lock that serializes these, and the queue of record changes. `session.py` writes header and record;
`session_start.py` knows what must be in the file before a session starts. Must not know clusters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable

import trio

from qedfs.errors import BadOverlay, InStandby, NoSpace, QedfsError, UsageError
from qedfs.format.header import NO_PROBE
from qedfs.format.record import Pin, Record, Standby
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.commit import Committer
from qedfs.overlay.dirty_pages import dirty_pages
from qedfs.overlay.session import Session
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.session_start import SessionStart
from qedfs.overlay.storage import MARK_AGE_NS, ChangeMark, Storage

Change = Callable[[Record], Record]


class OpenSession:
    """The session of one overlay. `start`: None unless the session is writable."""

    def __init__(
        self,
        storage: Storage,
        session: Session,
        committer: Committer,
        barriers: Barriers,
        journal: SessionJournal,
        start: SessionStart | None,
    ) -> None:
        # Held during every change of the header or the record. Acquired before the committer's locks.
        self.lock = trio.Lock()
        self.times = session.times  # of the image
        self._storage = storage
        self._session = session
        self._committer = committer
        self._barriers = barriers
        self._journal = journal
        self._start = start
        self._in_order: ChangeMark | None = None  # the file when it was last found in order
        self._changes: list[Change] = []  # changes of the record that are being stored, or wait to be

    @property
    def record(self) -> Record:
        """The record, including changes that are not stored yet."""
        return functools.reduce(lambda record, change: change(record), self._changes, self._session.record)

    def mark(self) -> str:
        """See `Session.mark`."""
        return self._session.mark()

    def marks(self) -> tuple[str, ...]:
        """See `Session.marks`."""
        return self._session.marks()

    @property
    def names_format(self) -> bool:
        """Whether the header says that the backing is raw."""
        return bool(self._session.header.features & NO_PROBE)

    @property
    def full(self) -> NoSpace | None:
        """Why the session has not started: the disk has been full since the opening. None if it has started."""
        return self._start.full if self._start is not None else None

    async def ready(self) -> None:
        """Make sure that the session has started. Raises NoSpace if it cannot, or what `check_writable` raises."""
        self._barriers.check_writable()
        if self.full:
            async with self.lock:
                await self._begin_late()

    async def _begin_late(self) -> None:
        """Start the session if it has not started. The caller holds the lock."""
        if self._start is not None:
            await self._start.late()

    async def change_record(self, change: Change, *, revoke: bool = True) -> None:
        """See `Overlay.change_record`."""
        self._barriers.check_writable()
        # Add it at once, so that `record` shows it. Changes are applied in this order.
        self._changes.append(change)
        try:
            async with self.lock:
                self._barriers.check_writable()  # the barrier of an earlier change may have failed
                try:
                    await self._begin_late()
                except NoSpace:
                    self._session.remember(change(self._session.record))
                else:
                    before = self._session.record
                    after = change(before)
                    await self._committer.durably(
                        lambda: self._session.store(after, otherwise=before if revoke else after)
                    )
        finally:
            # No await between storing and this, or a reader of `record` would see the change twice.
            self._changes.remove(change)

    async def let_times_move(self) -> None:
        """Before the first write of a session, store in the record that the times are going to change."""
        if not self.times.may_move:
            async with self.lock:
                self._barriers.check_writable()  # the barrier of a record may have failed
                await self._note_first_write()

    async def _note_first_write(self) -> None:
        """The caller holds the lock."""
        if self.times.may_move:
            return
        standby = self._session.record.standby
        if standby.waits:  # since this write has passed the gate, and the clusters are about to be dropped
            raise InStandby("the overlay is on its way back to standby")
        try:
            if dirty_pages.crowded(time.monotonic()) or self._storage.would_wait():
                await self._storage.in_thread(self._session.let_times_move)
            else:
                self._session.let_times_move()
        except NoSpace:
            # A full disk may not even allow overwriting (btrfs). The next write tries again. But if the record does not
            # say that a guest has written, its bytes would be dropped on a way back to standby.
            if standby is Standby.REVOCABLE:
                raise

    async def give_up_journal(self) -> None:
        """Commit, and void a journal that takes no more entries: what it has must not outlive what it lacks.

        A later session would otherwise believe it, against what this one is about to change. Raises what
        `Committer.commit` raises.
        """
        await self._committer.commit()
        self._journal.void()
        await self.note_no_journal()

    async def note_no_journal(self) -> None:
        """Record that there is no journal for a later session to find: it was lost, but the file has its entries."""
        if self.record.journal:
            with contextlib.suppress(QedfsError):
                await self.change_record(lambda record: dataclasses.replace(record, journal=""))

    @property
    def seems_unchanged(self) -> bool:
        """See `Overlay.seems_unchanged`."""
        known = self._in_order
        return known is not None and self._storage.damage is None and self._storage.change_mark() == known

    async def inspect(self) -> None:
        """See `Overlay.inspect`."""
        if self._storage.damage is None and self._barriers.failure is None:
            async with self.lock:
                if self._barriers.failure is None:  # it may have been emptied meanwhile (`Overlay.empty`)
                    await self._inspect()
        if self._storage.damage is not None:
            raise self._storage.damage.fresh()

    async def _inspect(self) -> None:
        """The caller holds the lock. Without it, our own change of the header would look like another program's."""
        if self._storage.damage is not None:
            return
        mark = self._storage.change_mark()  # before the look, or a change meanwhile would go unseen
        try:
            if self._session.is_seen():
                self._storage.check_length()
            else:
                # Header and record are not in the page cache, or only a file server knows them. So check in a thread.
                await self._storage.in_thread(self._storage.check_length)
                await self._storage.in_thread(self._session.inspect)
        except BadOverlay as exc:
            if self._storage.damage is None:
                self._storage.condemn(exc)
        else:
            old_enough = mark is not None and mark[-1] < time.time_ns() - MARK_AGE_NS
            self._in_order = mark if old_enough else None

    async def detach(self) -> None:
        """Drop the backing from the header, durably. The caller has flushed: see `Overlay.detach`."""
        async with self.lock:
            self._barriers.check_writable()
            if self.record.standby.waits:
                raise InStandby("the overlay is on its way back to standby")
            await self._committer.durably(self._session.detach)

    async def resize(self, image_size: int) -> None:
        """See `Session.resize`."""
        async with self.lock:
            self._barriers.check_writable()
            if self.record.standby.waits:
                raise InStandby("the overlay is in standby, so its size is that of its source")
            await self._committer.durably(lambda: self._session.resize(image_size))

    def empty(self) -> None:
        """See `Session.empty`. The caller holds this lock."""
        self._session.empty()

    def drop_committed(self) -> None:
        """See `Session.drop_committed`. The caller holds this lock."""
        self._session.drop_committed()

    async def move_backing(self, name: bytes, pin: Pin | None) -> None:
        """See `Session.move_backing`."""
        async with self.lock:
            self._barriers.check_writable()
            if not self._session.header.has_backing:
                raise UsageError("the image has become complete meanwhile, and needs no source")
            await self._committer.durably(lambda: self._session.move_backing(name, pin))

    async def end(self, *, in_order: bool) -> None:
        """Record that the session has ended cleanly, if it has. The caller holds this lock and the committer's.

        Disk errors are ignored: without the note, the next session evicts the page cache.
        """
        with contextlib.suppress(QedfsError):
            if self._barriers.writable:
                await self._inspect()
            # Check again, because the inspection may have found that the file was overwritten.
            if in_order and self._barriers.writable and not self._committer.pending and not self.full:
                await self._storage.in_thread(self._session.end)
