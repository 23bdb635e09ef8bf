"""Room on a full disk: discarded clusters give their space back before a write or a commit fails for want of it.

Owns that order. Must not know what needs the space. Who needs it waits for a commit and for the punches (`freed.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qedfs.errors import NoSpace
from qedfs.overlay.commit import Committer
from qedfs.overlay.freed import FreedClusters

T = TypeVar("T")


class Room:
    """Makes room for one overlay. Must not be used while a lock of the session or of the committer is held."""

    def __init__(self, committer: Committer, freed: FreedClusters) -> None:
        self._committer = committer
        self._freed = freed

    async def with_room(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call it, and once more if there was no space, but some has come back since. Raises what the call raises."""
        try:
            return await call()
        except NoSpace:
            if not await self.make():
                raise
        return await call()

    async def make(self) -> bool:
        """Give back the space of everything that was discarded before this call. Returns whether that was anything.

        Raises ReadOnlyOverlay if a barrier has failed.
        """
        self._freed.put_off = False
        if not self._freed.any:
            return False
        # If there is no space for the other entries, the discards are durable all the same.
        with contextlib.suppress(NoSpace):
            await self._committer.commit()
        return await self._freed.give_back()
