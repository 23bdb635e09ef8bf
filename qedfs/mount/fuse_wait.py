"""How pyfuse3 waits for /dev/fuse: it bypasses trio's scheduler while requests are pending.

Owns the stand-in for the module `trio` that pyfuse3 looks up when it waits (pyfuse3's asyncio support replaces the same
attribute). Most of pyfuse3's cost per request is two trips through the scheduler: one for the lock under which a task
reads /dev/fuse, one for epoll. The stand-in's lock is free of cost when nobody holds it, and `wait_readable` polls the
descriptor before it waits. Random 4 KiB reads at depth 16, in one run: 63,000 per second with trio.Lock, 118,000 with
this lock. At depth 1, 22,000 without polling and 38,000 with it. Nor does the lock wake another task for a request that
is answered at once: a turn of the event loop less for each request that comes later than polling waits.

The first request after the mount passes through `fuse_init.py`. Must not know what a request asks for: the handlers say
in `next_request` whether the next one is likely to come late.

Fairness: the scheduler runs at least once every `REQUESTS_PER_YIELD` requests, so that timers, sockets and worker
threads are served too.
"""

from __future__ import annotations

import contextlib
import functools
import select
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pyfuse3
import trio

from qedfs.mount.fuse_init import Handshake

REQUESTS_PER_YIELD = 16
# Polls before a wait in trio's epoll. Epoll costs about 20 us, and 60 polls of 0.3 us take as long. A reader at depth 1
# sends its next request within that time.
POLLS = 60
CREDIT = 4  # fruitless polls in a row before polling is suspended
PAUSE = 64  # waits without polling before the next attempt: at 1000 requests a second, 0.1 % of a processor


class Lock(trio.abc.Instrument):
    """A lock that its last holder may take again before the waiting tasks, without a checkpoint.

    trio.Lock is handed to the task that has waited longest, so the task that has just answered a request would have to
    wait at every request. This lock wakes a waiting task only if it is free when a task has to wait for something else,
    or has ended: then the request takes longer, and somebody else is to read the next one. The woken task checks
    whether the lock is still free.
    """

    def __init__(self) -> None:
        """Belongs to the event loop that runs now."""
        self._held = False
        self._woken = False  # a waiting task has been woken and has not run yet, so no other needs waking
        self._waiting = trio.lowlevel.ParkingLot()
        trio.lowlevel.add_instrument(self)

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
            self._woken = False
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Called by trio when any task waits, or has ended."""
        if not self._held and self._waiting and not self._woken:
            self._woken = True
            self._waiting.unpark()


class NextRequest:
    """What the handlers know about the kernel's next request."""

    late = False  # it is likely to come only after a wait for the disk, so that polling for it would be in vain


next_request = NextRequest()


class Poller:
    """Busy-polls a descriptor for a moment, as long as that pays off."""

    def __init__(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        self._poll = poll.poll
        self._credit = CREDIT  # negative: the number of waits before polling is tried again

    def readable(self) -> bool:
        """Poll once, and up to POLLS times more if that has succeeded lately and may succeed now."""
        poll = self._poll
        late, next_request.late = next_request.late, False
        if poll(0):
            return True
        if self._credit < 0:
            self._credit += 1
            return False
        if late:
            return False
        for _ in range(POLLS):
            if poll(0):
                self._credit = CREDIT
                return True
        self._credit = self._credit - 1 if self._credit > 1 else -PAUSE
        return False


class _Lowlevel:
    """`trio.lowlevel` with its own `wait_readable`."""

    def __init__(
        self,
        first: Callable[[int], Handshake] | None,
        done: Callable[[int, bytes], None] | None,
        *,
        replayed: bool,
    ) -> None:
        self._first = first
        self._replayed = replayed
        self._done = done
        self._fd = -1
        self._poller: Poller
        self._left = REQUESTS_PER_YIELD
        self._handshake: Handshake | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a stand-in for a whole module
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return when `fd` is readable. If it is readable already, this rarely yields to the scheduler."""
        if fd != self._fd:
            await self._begin(fd)
            return
        if self._handshake is not None:
            self._finish(self._handshake)
        if not self._poller.readable():
            self._left = REQUESTS_PER_YIELD
            await trio.lowlevel.wait_readable(fd)
            return
        self._left -= 1
        if not self._left:
            self._left = REQUESTS_PER_YIELD
            await trio.lowlevel.checkpoint()

    def _finish(self, handshake: Handshake) -> None:
        handshake.finish()
        self._handshake = None
        if self._done is not None:
            self._done(self._fd, handshake.request)

    async def _begin(self, fd: int) -> None:
        """Return when the kernel has sent its first request. Of a mount that is taken over, it has done so before."""
        self._poller, self._fd = Poller(fd), fd
        if not self._replayed:
            await trio.lowlevel.wait_readable(fd)
        if self._first is not None:
            with contextlib.suppress(OSError):  # the mount is gone already; libfuse will notice
                self._handshake = self._first(fd)


class Trio:
    """The module `trio` as pyfuse3 sees it."""

    Lock = Lock

    def __init__(
        self,
        first: Callable[[int], Handshake] | None = None,
        done: Callable[[int, bytes], None] | None = None,
        *,
        replayed: bool = False,
    ) -> None:
        """`first`: called once with the descriptor, when the first request can be read; at once if it is `replayed`.

        `done`: called with the descriptor and that request, when it has been answered.
        """
        self.lowlevel = _Lowlevel(first, done, replayed=replayed)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a stand-in for a whole module
        return getattr(trio, name)


def install(done: Callable[[int, bytes], None] | None = None, *, replay: bytes = b"") -> None:
    """Make pyfuse3 use the stand-in. `done`, `replay`: see `Trio` and `Handshake`."""
    first = functools.partial(Handshake, replay=replay)
    pyfuse3.trio = Trio(first, done, replayed=bool(replay))  # type: ignore[attr-defined]
