"""The journal of an open overlay: whether its session has one, and whether that still takes entries.

Owns the open journal from the start of the session to its end. A session without one (no tmpfs, or the overlay has no
room for a record) is the same to everybody else, except that `takes_entries` is false: then a write to a new cluster is
answered after a commit. Must not know what the entries mean, nor how the file is laid out (`journal.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from qedfs.overlay.journal import Journal, Pair

log = logging.getLogger(__name__)


class SessionJournal:
    """Of one overlay; without a journal until the session has begun."""

    def __init__(self) -> None:
        self.takes_entries = False
        self._journal: Journal | None = None
        self._void = False

    def begin(self, journal: Journal | None) -> None:
        """The session has begun, and has this journal; None: it has none."""
        self._journal = journal
        self.takes_entries = journal is not None

    @property
    def end(self) -> int:
        """How far it reaches now; see `landed`."""
        return self._journal.end if self._journal is not None else 0

    def append(self, entries: Iterable[Pair]) -> None:
        """Let entries survive the death of the process, as long as `takes_entries` says so; look again afterwards.

        When the journal has failed it gets nothing more, but what it holds stays there. Those entries are all pending,
        so the next commit brings them into the overlay file together with the ones that it did not take.
        """
        if self._journal is None or not self.takes_entries:
            return
        try:
            self._journal.append(entries)
        except OSError as exc:
            self.takes_entries = False
            if not self._void:  # else it was removed on purpose, and the overlay takes no writes any more
                text = "%s: %s; writes to new clusters wait for a commit until the overlay is opened again"
                log.warning(text, self._journal.path, exc.strerror)

    def landed(self, end: int) -> None:
        """The overlay file has the entries before `end`, an earlier value of the attribute."""
        if self._journal is not None:
            self._journal.landed(end)

    def void(self) -> None:
        """Let no later session have the entries. From any thread: `close` may be forgetting the journal meanwhile."""
        self._void = True
        if (journal := self._journal) is not None:
            journal.void()

    def close(self, *, remove: bool) -> None:
        """Close the journal, if there is one; `remove` when the overlay file has all entries."""
        journal, self._journal, self.takes_entries = self._journal, None, False
        if journal is not None:
            journal.close(remove=remove)
