"""How a writable session begins: the file gets what a killed one left, then the record of this one, then its journal.

Owns that order, and the wait for room. What has to be written may need some: tables, and the place of the record, which
is a hole where another program has made the overlay. On a full disk the overlay is readable all the same, with all that
was left; the session begins with the first write, adoption or change of the record for which there is room. Must not
know what is written in the session; before it has begun, nothing else is.
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
    """Of one session, whose map has what `orphan` holds."""

    def __init__(
        self,
        storage: Storage,
        session: Session,
        committer: Committer,
        journal: SessionJournal,
        folder: Path | None,
        orphan: OrphanJournal | None,
    ) -> None:
        self.full: NoSpace | None = None  # what has kept the session from beginning
        self._storage = storage
        self._session = session
        self._committer = committer
        self._journal = journal
        self._folder = folder
        # To be removed; what was in it, up to 64 MiB, would stay in memory as long as we do.
        self._orphan = dataclasses.replace(orphan, data=b"") if orphan is not None else None

    def at_open(self) -> None:
        """Begin if there is room, while nobody else uses the overlay; waits for the disk."""
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
        """Begin if that is still to be done. One call at a time. NoSpace: there is no room."""
        if self.full is None:
            return
        try:
            await self._committer.flush()
        except ReadOnlyOverlay:
            await self._storage.in_thread(self._void)
            raise
        await self._committer.durably(self._begin)

    def _begin(self) -> None:
        """The file has what was left: only then may the new session void the journal.

        Its own journal is there before the record tells of it: whoever finds none knows that it was lost.
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
        """A barrier has failed. Linux tells of data that it could not write once: the next opening would take its
        entries for good. A journal that may be another overlay's stays, and a new session voids it for this one.
        """
        if self._orphan:
            self._orphan.remove()
            with contextlib.suppress(QedfsError):
                self._session.begin(self._session.fresh())
        with contextlib.suppress(QedfsError):
            self._storage.refresh()
