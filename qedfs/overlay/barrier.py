"""The barriers (fdatasync) of an overlay. After one has failed, the overlay takes no more writes.

Owns the failure, and the count of barriers. Must not know what a barrier orders, nor what its failure does to the map:
`commit.py` says what order survives a power cut, runs barriers one at a time (`Committer.durably`), and takes entries
back.
"""

from __future__ import annotations

import time

from qedfs.errors import BadOverlay, QedfsError, ReadOnlyOverlay
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.storage import Storage


class Barriers:
    """The barriers of one open overlay."""

    def __init__(self, storage: Storage, journal: SessionJournal) -> None:
        self.failure: ReadOnlyOverlay | None = None  # set by a failed barrier, never cleared
        self.count = 0
        self.seconds = 0.0  # spent in barriers
        self._storage = storage
        self._journal = journal

    def barrier(self) -> None:
        """Make everything that was written before durable. Blocks, so call it in a worker thread.

        Raises:
            ReadOnlyOverlay: the barrier has failed.
            BadOverlay: the file was truncated. This says nothing about the disk, but nothing more is written.
        """
        self.count += 1
        began = time.monotonic()
        try:
            self._storage.barrier()
        except BadOverlay:
            raise
        except QedfsError as exc:
            # Linux marks pages clean whose write-back failed, so a second barrier would succeed without proving
            # anything. Set the failure first, which stops every other writer, then void the journal.
            self.failure = ReadOnlyOverlay(
                f"{exc}; it is read-only until it is opened again, and writes since its last flush may be lost"
            )
            # Nobody knows which data is on the disk. If the next session restored uncommitted entries, clusters could
            # read as garbage.
            self._journal.void()
            raise self.failure.fresh() from exc
        finally:
            self.seconds += time.monotonic() - began

    @property
    def writable(self) -> bool:
        """Whether the overlay takes writes and adoptions."""
        return self._storage.writable and self.failure is None

    def check(self) -> None:
        """Raise ReadOnlyOverlay if a barrier has failed."""
        if self.failure is not None:
            raise self.failure.fresh()

    def check_writable(self) -> None:
        """Raise BadOverlay or ReadOnlyOverlay if the overlay takes no writes."""
        if self._storage.damage is not None:
            raise self._storage.damage.fresh()
        if self.failure is not None:
            raise self.failure.fresh()
        if not self._storage.writable:
            raise ReadOnlyOverlay("the overlay is open read-only")
