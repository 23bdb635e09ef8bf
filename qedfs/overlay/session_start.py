"""Starts a writable session: commits what a killed session left, stores the record of the new one, opens its journal.

Owns that order, and the wait for free space. The start may need space for tables, and for the record, whose slot is a
hole if another program has created the overlay. On a full disk the overlay can still be read, including what the killed
session left. The session then starts with the first write, adoption or change of the record for which there is space.
Must not know what is written during the session. Nothing else is written before it has started.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from qedfs.errors import NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.overlay.commit import Committer
from qedfs.overlay.journal import Journal, OrphanJournal
from qedfs.overlay.journal_search import note
from qedfs.overlay.session import Session
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.storage import Storage


class SessionStart:
    """The start of one session. Its map already has the entries of `orphan`."""

    def __init__(
        self,
        storage: Storage,
        session: Session,
        committer: Committer,
        journal: SessionJournal,
        folder: Path | None,
        orphan: OrphanJournal | None,
    ) -> None:
        self.full: NoSpace | None = None  # why the session has not started yet
        self._storage = storage
        self._session = session
        self._committer = committer
        self._journal = journal
        self._folder = folder
        # Needed only to remove it. Its data, up to 64 MiB, would otherwise stay in memory as long as this object.
        self._orphan = dataclasses.replace(orphan, data=b"") if orphan is not None else None

    def at_open(self) -> None:
        """Start the session if there is space, while nobody else uses the overlay. Waits for the disk."""
        try:
            try:
                if self._committer.pending:
                    self._committer.commit_now()
                self._begin()
            except ReadOnlyOverlay:
                self._void()
                raise
        except NoSpace as exc:
            self.full = exc.fresh()

    async def late(self) -> None:
        """Start the session if it has not started. One call at a time. Raises NoSpace if there is still no space."""
        if self.full is None:
            return
        try:
            await self._committer.flush()
        except ReadOnlyOverlay:
            await self._storage.in_thread(self._void)
            raise
        await self._committer.durably(self._begin)

    def _begin(self) -> None:
        """Start the session. The old journal may become void now, because the file has all its entries.

        The new journal is created before the record mentions it. If a later session does not find it, it was lost.
        """
        session, name = self._session.fresh(), self._storage.name()
        journal: Journal | None = None
        if self._folder and session and (noted := note(name)):
            with contextlib.suppress(OSError):
                journal = Journal.create(self._folder, name, session, self._storage.device())
        try:
            self._session.begin(session, noted if journal else "")
        except BaseException:
            if journal:
                journal.close(remove=True)
            raise
        if self._orphan:
            self._orphan.remove()
        self._journal.begin(journal)
        self.full = None

    def _void(self) -> None:
        """Void the old journal after a failed barrier.

        Linux reports lost data only once, so the next opening would consider the journal's entries valid. A journal
        that may belong to another overlay is not removed, but a new session makes it void for this one.
        """
        if self._orphan:
            self._orphan.remove()
            with contextlib.suppress(QedfsError):
                self._session.begin(self._session.fresh())
        with contextlib.suppress(QedfsError):
            self._storage.refresh()
