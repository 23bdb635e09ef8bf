"""The pause in which bytes gather in the kernel before they are received: one for all connections of a source.

Owns the timer. Must not know sockets. The connections of a source share a link, so their bytes come together. Whoever
finds nothing to receive during a pause waits for its end, however many connections do. A timer of trio for each of them
would take more processor time than receiving the bytes.
"""

from __future__ import annotations

import trio


class Gathering:
    """For how long bytes may gather: `seconds`, 0 for not at all."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._timer: trio.CancelScope | None = None  # of the current pause
        self._over = trio.lowlevel.ParkingLot()  # the others that wait for its end

    @property
    def seconds(self) -> float:
        """How long the next pause will be. Setting it to 0 also ends the current one."""
        return self._seconds

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        self._seconds = seconds
        if not seconds:
            self._over.unpark_all()
            if self._timer is not None:
                self._timer.cancel()

    async def pause(self) -> None:
        """Wait for the end of the current pause, or begin one."""
        if self._timer is not None:
            await self._over.park()
            return
        with trio.CancelScope(deadline=trio.current_time() + self._seconds) as timer:
            self._timer = timer
            try:
                await trio.sleep_forever()
            finally:
                # Also if this connection is being dropped: the others then receive a moment earlier.
                self._timer = None
                self._over.unpark_all()
