"""Worker threads for calls that may hang: a separate thread limit for each file server, host or the like.

Owns the limiters. Must not know what is called.

trio's own limiter allows 40 threads in the whole process. A thread that was abandoned at a deadline counts until its
call ends: never for a dead file server, after half a minute for a silent name server. So a call that may be abandoned
must not use that limiter.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")

# A limiter lives as long as a thread or a task uses it.
_limiters: weakref.WeakValueDictionary[str, trio.CapacityLimiter] = weakref.WeakValueDictionary()


async def in_own_thread(what: str, function: Callable[[], T], *, threads: int) -> T:
    """Run `function` in a thread. At most `threads` run for `what` at once. When cancelled, abandon the thread.

    Raises OSError if the system cannot start a thread, and what `function` raises.
    """
    limiter = _limiters.setdefault(what, trio.CapacityLimiter(threads))
    try:
        return await trio.to_thread.run_sync(function, limiter=limiter, abandon_on_cancel=True)
    except RuntimeError as exc:
        if "start new thread" not in str(exc):
            raise
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from exc
