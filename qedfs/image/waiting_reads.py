"""The reads of one image that wait for its source.

Owns since when they wait, and how a wait ends early: a read is given up because nobody needs it, or is run again
because the image has another source. Must not know what they wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio


class WaitingRead:
    """One read, from its first attempt to its answer."""

    def __init__(self, since: float) -> None:
        self.since = since  # by trio's clock
        self.given_up = False
        self._scope = trio.CancelScope()
        self.over = trio.Event()

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """The context of one attempt. `give_up` and `run_again` end it without an exception."""
        with trio.CancelScope() as self._scope:
            if self.given_up:
                self._scope.cancel()
            yield

    def end_attempt(self) -> None:
        """Cancel the running attempt."""
        self._scope.cancel()


class WaitingReads:
    """The waiting reads of one image."""

    def __init__(self) -> None:
        self._reads: dict[WaitingRead, None] = {}  # in the order in which they began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[WaitingRead]:
        """The context of a read that waits for the source."""
        read = WaitingRead(trio.current_time())
        self._reads[read] = None
        try:
            yield read
        finally:
            del self._reads[read]
            read.over.set()

    @property
    def since(self) -> float | None:
        """When the oldest read began, by trio's clock; None if no read waits."""
        oldest = next(iter(self._reads), None)
        return None if oldest is None else oldest.since

    def give_up(self, *, since: float) -> None:
        """End the reads that began at `since` or earlier: nobody needs them."""
        for read in self._reads:
            if read.since <= since:
                read.given_up = True
                read.end_attempt()

    def run_again(self) -> None:
        """End the attempts that are running. Each read begins another one."""
        for read in self._reads:
            read.end_attempt()

    async def answered(self) -> None:
        """Wait until the reads that wait now have ended. Later ones do not matter."""
        for read in list(self._reads):
            await read.over.wait()
