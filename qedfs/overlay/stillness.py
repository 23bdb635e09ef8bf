"""Moments in which the overlay file is exactly what the image is, and nothing changes it: for a copy of the file.

Owns the order in which writing is stopped, and the bound of what is waited for. Must not know what is done meanwhile.

1. A flush, while guests write on, so that little is left for the end.
2. No write begins: the lock of the session is held and `times.may_move` is off, so that `Overlay.write_now` leaves each
   write to `Overlay.write`, which waits for that lock. Nothing is stored either by a write that had begun, but still
   waits for other writes or for its source, nor by a discard or an adoption (`PendingAllocations.hold`).
3. What is being stored ends. These are calls that wait for the local disk only.
4. A last group of the committer writes the entries. Its lock is held on, so that no other group follows.

Writes that have returned before are in the file, in the page cache at least. Of a write that is held nothing is. A
write, a discard or an fsync that comes meanwhile waits until the end; reads do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from qedfs.overlay.parts import Parts

LOOK_SECONDS = 0.001  # between two looks whether accesses have ended, which are calls that wait for a disk


class Stillness:
    """The still moments of one overlay, one at a time."""

    def __init__(self, parts: Parts) -> None:
        self._session = parts.session
        self._committer = parts.committer
        self._barriers = parts.barriers
        self._pending = parts.pending
        self._accesses = parts.freed.accesses

    @contextlib.asynccontextmanager
    async def still(self) -> AsyncIterator[float]:
        """A block in which the file does not change. It gets the moment, by trio's clock, from which writes wait.

        Raises what `Committer.flush` raises.
        """
        await self._session.ready()
        await self._committer.flush()
        times = self._session.times
        async with self._session.lock:
            self._barriers.check_writable()
            could_move, times.may_move = times.may_move, False
            since = trio.current_time()
            try:
                with self._pending.holding():
                    last = self._accesses.next
                    while self._accesses.oldest < last:  # noqa: ASYNC110 - a few times per copy
                        await trio.sleep(LOOK_SECONDS)
                    async with self._committer.stopped():
                        yield since
            finally:
                # Before the lock is free: a write that waits for it finds that the record has been changed already.
                times.may_move = could_move
