"""The barriers of an overlay, and whether it takes writes: not after one of them has failed.

Owns the failure, and the count of barriers. Must not know what a barrier orders, nor what a failed one does to the map:
`Committer.durably` runs them one at a time, and takes entries back.
"""

from __future__ import annotations

import time

from qedfs.errors import BadOverlay, QedfsError, ReadOnlyOverlay
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.storage import Storage


class Barriers:
    """Of one open overlay."""

    def __init__(self, storage: Storage, journal: SessionJournal) -> None:
        self.failure: ReadOnlyOverlay | None = None  # set by a failed barrier, never cleared
        self.count = 0
        self.seconds = 0.0  # spent waiting in them
        self._storage = storage
        self._journal = journal

    def barrier(self) -> None:
        """Wait until all that was written before is durable, in a worker thread.

        Raises:
            ReadOnlyOverlay: it failed.
            BadOverlay: the file was cut, which says nothing of the disk; it takes nothing more.
        """
        self.count += 1
        began = time.monotonic()
        try:
            self._storage.barrier()
        except BadOverlay:
            raise
        except QedfsError as exc:
            # Linux marks pages clean whose write-back failed: a second barrier that succeeds proves nothing. So the
            # failure comes first, which stops every other writer, and then the journal.
            self.failure = ReadOnlyOverlay(
                f"{exc}; it is read-only until it is opened again, and writes since its last flush may be lost"
            )
            # Nobody knows which data the disk has: entries that were never committed must not be brought back by the
            # next session, or clusters could read as garbage.
            self._journal.void()
            raise self.failure.fresh() from exc
        finally:
            self.seconds += time.monotonic() - began

    @property
    def writable(self) -> bool:
        """Whether writes and adoptions are taken."""
        return self._storage.writable and self.failure is None

    def check(self) -> None:
        """Raise ReadOnlyOverlay if a barrier has failed."""
        if self.failure is not None:
            raise self.failure.fresh()

    def check_writable(self) -> None:
        """Raise what keeps the overlay from taking writes: BadOverlay or ReadOnlyOverlay."""
        if self._storage.damage is not None:
            raise self._storage.damage.fresh()
        if self.failure is not None:
            raise self.failure.fresh()
        if not self._storage.writable:
            raise ReadOnlyOverlay("the overlay is open read-only")
