"""The end of an open overlay: its file is closed, or emptied and left open for another opening.

Owns the order in which the parts of the overlay end, and what they may still have under way. Must not know clusters.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import trio

from qedfs.errors import ReadOnlyOverlay
from qedfs.overlay.parts import Parts
from qedfs.overlay.storage import Storage

LOOK_SECONDS = 0.001  # between two looks whether accesses have ended, which are reads of a disk


class Ending:
    """The end of one overlay."""

    def __init__(self, parts: Parts) -> None:
        self._storage = parts.storage
        self._tables = parts.tables
        self._committer = parts.committer
        self._barriers = parts.barriers
        self._journal = parts.journal
        self._session = parts.session
        self._freed = parts.freed

    @contextlib.asynccontextmanager
    async def _all_ended(self) -> AsyncIterator[None]:
        # A thread may be punching, or writing a record, a header or a group, so the descriptor must not be closed yet.
        # Acquire the session's lock before the committer's, as a change of the record does.
        async with self._freed.ended(), self._session.lock, self._committer.ended():
            yield

    async def close(self, *, in_order: bool) -> None:
        """Close the file. `in_order`: everything has been flushed."""
        async with self._all_ended():
            await self._session.end(in_order=in_order)
            # After the note in the record, because a session that has not ended needs its journal.
            self._journal.close(remove=not self._committer.pending)
            self._storage.close()
            self._tables.close()

    async def empty(self) -> Storage:
        """Drop all clusters. The record says EMPTYING already, durably, and no adoption is running.

        Returns the file, which is still open and locked. The overlay takes no writes any more, and its clusters read as
        missing. Raises the errors of the disk; the next opening then empties it.
        """
        await self._drop(self._session.empty)
        return self._storage

    async def drop_committed(self) -> None:
        """Drop all clusters, whose bytes the backing has, too, durably, and close the file.

        Nothing uses the overlay meanwhile. Raises the errors of the disk; the image reads the same then, too.
        """
        try:
            await self._drop(self._session.drop_committed)
        finally:
            self._storage.close()

    async def _drop(self, write: Callable[[], None]) -> None:
        """End with all clusters dropped, in memory and, by `write`, in the file."""
        self._tables.forget()
        async with self._all_ended():
            # A read of a place that is cut off from the file would look like damage.
            while self._freed.accesses.oldest < self._freed.accesses.next:  # noqa: ASYNC110 - once in a lifetime
                await trio.sleep(LOOK_SECONDS)
            self._journal.close(remove=True)
            try:
                await self._storage.in_thread(write)
            finally:
                # Whoever still waits to change the record would write one of the time before.
                self._barriers.failure = ReadOnlyOverlay("the overlay was emptied, and is open as another object")
                self._tables.close()
