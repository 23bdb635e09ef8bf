"""The gate for writes to one image in standby: refuse them, hold them until it is activated, or activate it.

Owns the writes that wait. Must not know how an image is activated. Discards and zero ranges count as writes.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable

import trio

from qedfs.errors import InStandby, SourceUnreachable
from qedfs.image.waiting_reads import WaitingReads


class Writes(enum.StrEnum):
    """What becomes of a write in standby."""

    REFUSE = "refuse"
    HOLD = "hold"  # it waits until the image is activated
    ACTIVATE = "activate"  # it activates the image: for managers that have no hook at that moment


class WriteGate:
    """The gate of one image. It is closed at first, and stays open once it was opened."""

    def __init__(self, name: str, writes: Writes, *, most_seconds: float = float("inf")) -> None:
        """`name`: the image's name, for messages. `most_seconds`: longest wait, because of a limit of the kernel."""
        self.waiting = WaitingReads()  # the writes that wait
        # Activates the image. Set before the image is served; needed for Writes.ACTIVATE.
        self.activate: Callable[[], Awaitable[None]] | None = None
        self._name = name
        self._writes = writes
        self._most_seconds = most_seconds
        self._opened = trio.Event()
        self._activating: set[trio.CancelScope] = set()  # of the writes that wait for an activation

    def open(self) -> None:
        """Let all writes through, also those that wait. The end of the activation may have to wait for them."""
        self._opened.set()
        for scope in tuple(self._activating):
            scope.cancel()

    async def opened(self) -> None:
        """Wait until the gate is open."""
        await self._opened.wait()

    async def passed(self) -> None:
        """Return when a write may begin.

        Raises:
            InStandby: writes are refused, or the image was not activated in time.
            SourceUnreachable: nobody waits for this write any more.
            QedfsError: the write would have activated the image, and that has failed.
        """
        if self._writes is Writes.REFUSE:
            raise InStandby(f"{self._name}: is in standby and takes no writes; qedfs activate ends that")
        with self.waiting.waiting() as write, write.attempt(self._most_seconds):
            if self._writes is Writes.ACTIVATE and self.activate is not None:
                with trio.CancelScope() as scope:
                    self._activating.add(scope)
                    try:
                        await self.activate()
                    finally:
                        self._activating.discard(scope)
            await self._opened.wait()
        if self._opened.is_set():
            return
        if trio.current_time() >= write.since + self._most_seconds:
            # Later, the kernel would cut the mount because of this write, and with it all images.
            raise InStandby(
                f"{self._name}: is in standby, and was not activated within {self._most_seconds:g} s, the longest that"
                " the kernel lets a write wait"
            )
        raise SourceUnreachable(f"{self._name}: nobody waits for this write any more")
