"""The session of an open overlay: begun late if need be, its record changed by one task at a time, ended in order.

Owns the lock that orders these, and the changes that wait for it. Header and record are written by `session.py`; what
has to be in the file before a session begins is known to `session_start.py`. Must not know clusters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import trio

from qedfs.errors import BadOverlay, NoSpace, QedfsError
from qedfs.format.header import NO_PROBE
from qedfs.format.record import Record
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.commit import Committer
from qedfs.overlay.dirty_pages import dirty_pages
from qedfs.overlay.session import Session
from qedfs.overlay.session_start import SessionStart
from qedfs.overlay.storage import Storage

Change = Callable[[Record], Record]


class OpenSession:
    """Of one overlay. `start`: of a writable session."""

    def __init__(
        self,
        storage: Storage,
        session: Session,
        committer: Committer,
        barriers: Barriers,
        start: SessionStart | None,
    ) -> None:
        # Around every change of the header or the record. Taken before the committer's locks, which each change takes.
        self.lock = trio.Lock()
        self.times = session.times  # of the image
        self._storage = storage
        self._session = session
        self._committer = committer
        self._barriers = barriers
        self._start = start
        self._changes: list[Change] = []  # of the record, that are being stored or wait for it

    @property
    def record(self) -> Record:
        """What qedfs remembers in this overlay, including what is being stored."""
        return functools.reduce(lambda record, change: change(record), self._changes, self._session.record)

    @property
    def names_format(self) -> bool:
        """Whether the header says that the backing is raw."""
        return bool(self._session.header.features & NO_PROBE)

    @property
    def full(self) -> NoSpace | None:
        """What keeps the session from beginning: the disk was full at the open, and has been since."""
        return self._start.full if self._start is not None else None

    async def ready(self) -> None:
        """Return when the session has begun. NoSpace: there is no room for that. Or what `check_writable` raises."""
        self._barriers.check_writable()
        if self.full:
            async with self.lock:
                await self._begin_late()

    async def _begin_late(self) -> None:
        """Have the lock."""
        if self._start is not None:
            await self._start.late()

    async def change_record(self, change: Change) -> None:
        """See `Overlay.change_record`."""
        self._barriers.check_writable()
        # At once, so that `record` shows it, and in this order: a later change is made of what the earlier one leaves.
        self._changes.append(change)
        try:
            async with self.lock:
                self._barriers.check_writable()  # the barrier of the change before may have failed
                try:
                    await self._begin_late()
                except NoSpace:
                    self._session.record = change(self._session.record)
                else:
                    await self._committer.durably(lambda: self._session.store(change(self._session.record)))
        finally:
            # No await since the session has the record: a reader of `record` would see the change twice, or not at all.
            self._changes.remove(change)

    async def let_times_move(self) -> None:
        """Once in a session, before the first write, the record has to say that it comes."""
        if not self.times.may_move:
            async with self.lock:
                self._barriers.check_writable()  # the barrier of a record may have failed
                await self._note_first_write()

    async def _note_first_write(self) -> None:
        """Have the lock."""
        if self.times.may_move:
            return
        # On a full disk that takes no write to an old place either (btrfs) the next write tries again.
        with contextlib.suppress(NoSpace):
            if dirty_pages.crowded():
                await self._storage.in_thread(self._session.let_times_move)
            else:
                self._session.let_times_move()

    async def note_no_journal(self) -> None:
        """The journal was lost, and the file has all that was in it: the next session need not look for it."""
        if self.record.journal:
            with contextlib.suppress(QedfsError):
                await self.change_record(lambda record: dataclasses.replace(record, journal=""))

    async def inspect(self) -> None:
        """See `Overlay.inspect`."""
        if self._storage.damage is None and self._barriers.failure is None:
            async with self.lock:
                await self._inspect()
        if self._storage.damage is not None:
            raise self._storage.damage.fresh()

    async def _inspect(self) -> None:
        """Have the lock, without which our own change of the header would look like somebody else's."""
        if self._storage.damage is not None:
            return
        try:
            if self._session.is_seen():
                self._storage.check_length()
            else:
                # What the page cache does not have, or a file server has to be asked for.
                await self._storage.in_thread(self._storage.check_length)
                await self._storage.in_thread(self._session.inspect)
        except BadOverlay as exc:
            if self._storage.damage is None:
                self._storage.condemn(exc)

    async def detach(self) -> None:
        """Drop the backing from the header, durably. The caller has flushed: see `Overlay.detach`."""
        async with self.lock:
            self._barriers.check_writable()
            await self._committer.durably(self._session.detach)

    async def end(self, *, in_order: bool) -> None:
        """Have the lock and the committer's: say in the record that the session has ended in order, if it has.

        Errors of a disk that is not well are passed over: without the note the next session asks the disk.
        """
        with contextlib.suppress(QedfsError):
            if self._barriers.writable:
                await self._inspect()
            # Once more: the look may have found that the file is another one's.
            if in_order and self._barriers.writable and not self._committer.pending and not self.full:
                await self._storage.in_thread(self._session.end)
