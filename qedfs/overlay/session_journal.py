"""The journal of an open overlay, if its session has one and it still takes entries.

Owns the open journal from the start to the end of the session. Without a journal (no tmpfs, or no room for a record in
the overlay) the interface is the same, but `takes_entries` is false. Then a write to a new cluster is acknowledged only
after a commit. Must not know what the entries mean, nor the format of the file (`journal.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from qedfs.overlay.journal import Journal, Pair

log = logging.getLogger(__name__)


class SessionJournal:
    """The journal of one overlay. There is none until the session has started."""

    def __init__(self) -> None:
        self.takes_entries = False
        self._journal: Journal | None = None
        self._void = False

    def begin(self, journal: Journal | None) -> None:
        """Set the journal of the session that has started; None if it has none."""
        self._journal = journal
        self.takes_entries = journal is not None

    @property
    def end(self) -> int:
        """The current end of the journal, for `landed`."""
        return self._journal.end if self._journal is not None else 0

    def append(self, entries: Iterable[Pair]) -> None:
        """Add entries, so that they survive the death of the process. Check `takes_entries` before and afterwards.

        After a failure the journal takes no more entries but keeps those that it has. All of them are pending, so the
        next commit writes them to the overlay file, together with those that the journal did not take.
        """
        if self._journal is None or not self.takes_entries:
            return
        try:
            self._journal.append(entries)
        except OSError as exc:
            self.takes_entries = False
            if not self._void:  # otherwise it was removed on purpose, and the overlay takes no more writes
                text = "%s: %s; writes to new clusters wait for a commit until the overlay is opened again"
                log.warning(text, self._journal.path, exc.strerror)

    @property
    def outlived(self) -> bool:
        """Whether it takes no more entries, but a later session would still use those that it has."""
        return self._journal is not None and not self.takes_entries and not self._void

    def landed(self, end: int) -> bool:
        """Drop the entries before `end`, an earlier value of the property: the overlay file has them.

        Returns whether that has worked. If not, the journal still has entries that a discard may contradict.
        """
        journal = self._journal
        if journal is not None and not self.takes_entries and not self._void and end == journal.end:
            # It will never have another entry, and the file has all of these. If the tmpfs has no room for a shorter
            # journal, its discards would stay in it, and a later session would repeat them over writes that came later
            # and that it did not take.
            self.void()
        return journal is None or journal.landed(end)

    def void(self) -> None:
        """Make the journal void for later sessions. May be called from any thread, even during `close`."""
        self._void = True
        if (journal := self._journal) is not None:
            journal.void()

    def close(self, *, remove: bool) -> None:
        """Close the journal, if there is one. `remove` it if the overlay file has all entries."""
        journal, self._journal, self.takes_entries = self._journal, None, False
        if journal is not None:
            journal.close(remove=remove)
