"""Threads for calls that may not come back: each thing that is waited for has its own few, and takes no others.

Owns the limiters. Must not know what is called.

trio's own limiter lets 40 threads of the whole process run. A thread that is given up at a deadline keeps its place
there until its call ends, which for a dead file server is never and for a silent name server half a minute later. So
whatever may be given up must not run under it.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")

# A limiter lives as long as a thread or a task has it.
_limiters: weakref.WeakValueDictionary[str, trio.CapacityLimiter] = weakref.WeakValueDictionary()


async def in_own_thread(what: str, function: Callable[[], T], *, threads: int) -> T:
    """Run `function` in one of so many threads for `what`. If that is cancelled, the thread goes on alone.

    OSError: the system has no thread for us; or what `function` raises.
    """
    limiter = _limiters.setdefault(what, trio.CapacityLimiter(threads))
    try:
        return await trio.to_thread.run_sync(function, limiter=limiter, abandon_on_cancel=True)
    except RuntimeError as exc:
        if "start new thread" not in str(exc):
            raise
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from exc
