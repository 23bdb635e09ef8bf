"""The requests of one image that wait: for its source, for memory, or in standby for the activation (`write_gate.py`).

Owns since when they wait, and how a wait ends early: one is ended because nobody needs it, or because its time is up;
or it is run again because the image has another source. Must not know what they wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio


class WaitingRead:
    """One read, from its first attempt to its answer."""

    def __init__(self, since: float) -> None:
        self.since = since  # by trio's clock
        self.ended = ""  # why it gets an error, whatever the source says
        self._scope = trio.CancelScope()
        self.over = trio.Event()

    @contextlib.contextmanager
    def attempt(self, most_seconds: float = float("inf")) -> Iterator[None]:
        """The context of one attempt. `WaitingReads.end`, `run_again` and the time end it without an exception.

        `most_seconds`: how long the read may take, with all its attempts.
        """
        with trio.CancelScope(deadline=self.since + most_seconds) as self._scope:
            if self.ended:
                self._scope.cancel()
            yield
        if self._scope.cancelled_caught and trio.current_time() >= self.since + most_seconds:
            self.ended = self.ended or f"its backing has given no answer for {most_seconds:g} s"

    def end(self, why: str) -> None:
        """End the read, and the running attempt."""
        self.ended = self.ended or why
        self._scope.cancel()

    def end_attempt(self) -> None:
        """Cancel the running attempt."""
        self._scope.cancel()


class WaitingReads:
    """The waiting reads of one image."""

    def __init__(self) -> None:
        self._reads: dict[WaitingRead, None] = {}

    @contextlib.contextmanager
    def waiting(self, since: float | None = None) -> Iterator[WaitingRead]:
        """The context of a read that waits for the source. `since`: when it came, by trio's clock; None for now."""
        read = WaitingRead(trio.current_time() if since is None else since)
        self._reads[read] = None
        try:
            yield read
        finally:
            del self._reads[read]
            read.over.set()

    @property
    def since(self) -> float | None:
        """When the oldest read began, by trio's clock; None if no read waits."""
        return min((read.since for read in self._reads), default=None)

    def give_up(self, *, since: float) -> None:
        """End the reads that began at `since` or earlier: nobody needs them."""
        self.end(since=since, why="nobody waits for this read any more")

    def end(self, *, since: float, why: str) -> None:
        """End the reads that began at `since` or earlier. `why`: for their error."""
        for read in self._reads:
            if read.since <= since:
                read.end(why)

    def run_again(self) -> None:
        """End the attempts that are running. Each read begins another one."""
        for read in self._reads:
            read.end_attempt()

    async def answered(self) -> None:
        """Wait until the reads that wait now have ended. Later ones do not matter."""
        for read in list(self._reads):
            await read.over.wait()
