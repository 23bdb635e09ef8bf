"""`--until-streamed`: waits until every overlay is complete or has failed, and no image is open.

Owns the rule about which errors keep an overlay from becoming complete. Must not know how a mount ends: `server.py`
ends it with the result.
"""

from __future__ import annotations

import contextlib

import trio

from qedfs.errors import QedfsError, ReadOnlyOverlay
from qedfs.image.condition import Cause
from qedfs.jobs.state import State
from qedfs.mount.registry import Registry
from qedfs.mount.served import Served
from qedfs.mount.settling import BeingWritten

LOOK_SECONDS = 0.1


async def until_streamed(registry: Registry) -> QedfsError | None:
    """Return once no stream has anything left to do and nobody has an image open.

    Returns the error that keeps an overlay from becoming complete, the first one if there are several; None if all are
    complete.
    """
    while True:
        if _is_streamed(registry):
            # The last scan is up to a second old. Since then, an overlay may have been added, or one that another
            # program had open may have become free.
            with contextlib.suppress(QedfsError):
                await registry.rescan()
                if _is_streamed(registry):
                    break
        await trio.sleep(LOOK_SECONDS)
    return next((error for served in registry.everything() if (error := _failure(served))), None)


def _is_streamed(registry: Registry) -> bool:
    """Whether there is nothing left to wait for."""
    if registry.in_use:
        return False
    return all(_is_complete(served) or _failure(served) is not None for served in registry.everything())


def _is_complete(served: Served) -> bool:
    return served.job is not None and served.job.state is State.COMPLETE


def _failure(served: Served) -> QedfsError | None:
    """The error that will keep an overlay from becoming complete unless somebody intervenes; None if there is none."""
    if served.image is None or served.job is None:
        return None if isinstance(served.error, BeingWritten) else served.error
    condition = served.image.condition
    if served.job.state in (State.FAILED, State.SOURCE_CHANGED):
        return condition.first(Cause.JOB_STOPPED)
    if not served.image.writable and not _is_complete(served):
        text = f"{served.path}: is read-only and keeps nothing, so it cannot become complete"
        return condition.first(Cause.BARRIER_FAILED) or ReadOnlyOverlay(text)
    return None
