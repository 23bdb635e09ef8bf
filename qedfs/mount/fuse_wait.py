"""How pyfuse3 waits for /dev/fuse: without a turn of trio's scheduler, unless there is nothing to read.

Owns the stand-in for the module `trio` that pyfuse3 looks up when it waits (its own asyncio support swaps the same
attribute). Most of pyfuse3's cost per request is the scheduler: once for the lock under which one of its tasks reads
/dev/fuse, once for trio's epoll. The stand-in has a lock that costs nothing while it is free, and polls before it
waits. Random 4 KiB reads at depth 16, in one run: 63 k a second with trio.Lock, 118 k with this one; at depth 1,
polling for a moment, 38 k against 22 k.

The first request of all passes through `fuse_init.py`.

Fairness: at the latest after `REQUESTS_PER_YIELD` requests the scheduler runs, so that timers, sockets and worker
threads get their turn.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pyfuse3
import trio

from qedfs.mount.fuse_init import Handshake

REQUESTS_PER_YIELD = 16
# Before a wait in trio's epoll, which takes about 20 us: as long again, at 0.3 us each. A reader at depth 1 sends its
# next request within that time.
POLLS = 60
CREDIT = 4  # misses in a row until polling is taken not to pay
PAUSE = 64  # waits without it, until one more is tried: an image at 1000 requests a second loses 0.1 % of a processor


class Lock:
    """A lock that its last holder may take again before those who wait, without a checkpoint.

    trio.Lock goes to whoever has waited longest, so that the task which has just answered a request would wait for
    another one at each request. Here one of those who wait is woken when the lock is released, and looks whether it is
    still free.
    """

    def __init__(self) -> None:
        self._held = False
        self._woken = False  # one of those who wait is on its way: no other needs to be
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
            self._woken = False
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = False
        if self._waiting and not self._woken:
            self._woken = True
            self._waiting.unpark()


class Poller:
    """Whether a descriptor is readable, or becomes so in a moment, as long as waiting for that moment pays."""

    def __init__(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        self._poll = poll.poll
        self._credit = CREDIT  # below 0: so many waits until the next try

    def readable(self) -> bool:
        """Look once; then, if that has paid lately, up to POLLS times more."""
        poll = self._poll
        if poll(0):
            return True
        if self._credit < 0:
            self._credit += 1
            return False
        for _ in range(POLLS):
            if poll(0):
                self._credit = CREDIT
                return True
        self._credit = self._credit - 1 if self._credit > 1 else -PAUSE
        return False


class _Lowlevel:
    """`trio.lowlevel` with a `wait_readable` of its own."""

    def __init__(self, first: Callable[[int], Handshake] | None) -> None:
        self._first = first
        self._fd = -1
        self._poller: Poller
        self._left = REQUESTS_PER_YIELD
        self._handshake: Handshake | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a stand-in for a whole module
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return when `fd` is readable, mostly without a turn of the scheduler if it is so already."""
        if fd != self._fd:
            await self._begin(fd)
            return
        if self._handshake is not None:
            self._handshake.finish()
            self._handshake = None
        if not self._poller.readable():
            self._left = REQUESTS_PER_YIELD
            await trio.lowlevel.wait_readable(fd)
            return
        self._left -= 1
        if not self._left:
            self._left = REQUESTS_PER_YIELD
            await trio.lowlevel.checkpoint()

    async def _begin(self, fd: int) -> None:
        """Return when the kernel's first request is there."""
        self._poller, self._fd = Poller(fd), fd
        await trio.lowlevel.wait_readable(fd)
        if self._first is not None:
            with contextlib.suppress(OSError):  # the mount has ended before it began; libfuse will see
                self._handshake = self._first(fd)


class Trio:
    """The module `trio` as pyfuse3 sees it."""

    Lock = Lock

    def __init__(self, first: Callable[[int], Handshake] | None = None) -> None:
        """`first`: what the first request, which is there, passes through."""
        self.lowlevel = _Lowlevel(first)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a stand-in for a whole module
        return getattr(trio, name)


def install() -> None:
    """Let pyfuse3 wait our way from now on."""
    pyfuse3.trio = Trio(Handshake)  # type: ignore[attr-defined]
