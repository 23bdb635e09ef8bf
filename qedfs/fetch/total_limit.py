"""The limit of a mount: how fast all its images together may fetch in the background, and whose turn it is.

Owns the order in which images send requests while the limit is used up. Must not know queues or sources. Every fetch
queue of the mount shares one `TotalLimit`.

The limit counts what crosses the network: what one request brings to several images counts once, and compressed bytes
count as they are. The order is that of self-clocked fair queueing (Golestani, INFOCOM 1994): the image is next that
will have got the least, its request included. An image has got what was fetched for it, including by others. So two
sources get half of the limit each, even if one of them has ten images and the other has one. Time in which an image has
not waited gives it no precedence later.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import trio

from qedfs.fetch.flight import Consumer
from qedfs.fetch.rate_limiter import RateLimiter


class _Waiter:
    """One task that waits for its turn."""

    __slots__ = ("consumer", "next", "size", "wait")

    def __init__(self, consumer: Consumer, size: int) -> None:
        self.consumer = consumer
        self.size = size  # of its request
        self.next = trio.Event()  # it is the next one; replaced if another one gets precedence
        self.wait = trio.CancelScope()  # its wait for the limiter


class TotalLimit:
    """The limit of one mount. `limiter` is its rate; any task may change that."""

    def __init__(self, limit: int = 0) -> None:
        """`limit`: bytes per second, 0 for none."""
        self.limiter = RateLimiter(limit)
        self.fetched = 0  # bytes that have arrived; never falls, unlike what the limiter has granted
        self._got: WeakKeyDictionary[Consumer, float] = (
            WeakKeyDictionary()
        )  # bytes; whoever comes begins with at least `_least`
        self._least = 0.0  # what the last one had got when it was its turn
        self._waiters: list[_Waiter] = []
        self._next: _Waiter | None = None  # the only one that waits for the limiter; the others wait for their turn

    async def turn(self, consumer: Consumer, size: int) -> bool:
        """Wait until a request of `size` bytes for this consumer may be sent. Returns whether there was a wait."""
        if not self.limiter.limit or not (self._waiters or self.limiter.due()):
            return False
        self._got[consumer] = max(self._least, self._got.get(consumer, 0.0))
        waiter = _Waiter(consumer, size)
        self._waiters.append(waiter)
        try:
            self._appoint()
            while self._next is not waiter or self.limiter.due():
                await waiter.next.wait()
                with trio.CancelScope() as waiter.wait:
                    if self._next is waiter:
                        await self.limiter.until_due()
        finally:
            self._waiters.remove(waiter)
            if self._next is waiter:
                self._next = None
                self._appoint()
        return True

    def sent(self, consumer: Consumer, size: int) -> None:
        """Count `size` bytes that were requested because of this consumer."""
        self._least = max(self._least, self._got.get(consumer, 0.0))
        self.limiter.sent(size)

    def arrived(self, size: int, *, expected: int) -> None:
        """Count `size` bytes that have arrived for a request that was counted with `expected`, less if compressed."""
        self.fetched += size
        self.limiter.sent(size - expected)

    def got(self, consumer: Consumer, size: int) -> None:
        """Note that a consumer gets `size` bytes, whoever has requested them."""
        if self.limiter.limit:
            self._got[consumer] = self._got.get(consumer, self._least) + size

    def _appoint(self) -> None:
        """Let the waiter that will have got the least wait for the limiter; among equals, the one that came first.

        One that comes later may have precedence: the image that has just sent a request, if that was a small one.
        """
        first = min(self._waiters, key=lambda waiter: self._got[waiter.consumer] + waiter.size, default=None)
        if first is self._next:
            return
        if self._next is not None:
            self._next.next = trio.Event()
            self._next.wait.cancel()
        self._next = first
        if first is not None:
            first.next.set()
