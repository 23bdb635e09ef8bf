"""Finds the backing that a command writes to: a local file, allowed, of the pinned version, used by nobody else.

Owns these conditions and their order. Must not know what is written.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import trio

from qedfs.cli.asked_source import Asking, ask
from qedfs.errors import UsageError
from qedfs.image.backing_file import BackingFile, check_unused, find_file, open_qed, open_raw
from qedfs.image.commit_target import RawTarget, Target
from qedfs.image.qed_target import QedTarget
from qedfs.overlay.overlay import Overlay
from qedfs.source.policy import Policy
from qedfs.source.url import Location, parse_location

if TYPE_CHECKING:
    from qedfs.source.retrying import RetryingSource


def place_of(path: str, backing: str) -> Location:
    """Where the backing of the overlay at `path` is. Raises UsageError unless it is a local file."""
    location = parse_location(backing, relative_to=os.path.dirname(os.path.realpath(path)))
    if location.kind != "file":
        raise UsageError(
            f"{path}: its backing {location} is on a server, and only read; qedfs export --with-backing writes the"
            " whole image to a file"
        )
    return location


@contextlib.asynccontextmanager
async def opened(overlay: Overlay, location: Location, asking: Asking, *, dry: bool) -> AsyncIterator[Target]:
    """The backing, open and locked. `dry`: nothing is written to it.

    Raises:
        Refused: the policy does not allow it.
        InUse: somebody has it open.
        SourceChanged: it is not the version that the overlay was started from.
        SourceError, UsageError: it is not there, or in a format that cannot be written.
        Inaccessible: it cannot be written to.
    """
    found = await find_file(location, Policy(asking.allow_backing), probes=overlay.probes_backing)
    if os.path.samestat(found.status, overlay.file_status()):
        raise UsageError(f"backing {location}: is the overlay itself")
    # Before we open it, because the kernel is asked whether anybody has it open.
    await check_unused(location, found)
    if found.qed:
        target: Target = await _qed(overlay, location, found, asking, dry=dry)
    else:
        target = await _raw(overlay, location, found, asking, dry=dry)
    try:
        yield target
    finally:
        with trio.CancelScope(shield=True):
            await target.close()


async def _qed(overlay: Overlay, location: Location, found: BackingFile, asking: Asking, *, dry: bool) -> QedTarget:
    target = await open_qed(location, found, dry=dry)
    try:
        target.check(overlay.cluster_size, overlay.image_size)
        if target.pinned:
            await ask(location, asking, functools.partial(_compare, overlay, location), raw=False)
        return target
    except BaseException:
        with trio.CancelScope(shield=True):
            await target.close()
        raise


async def _raw(overlay: Overlay, location: Location, found: BackingFile, asking: Asking, *, dry: bool) -> RawTarget:
    await ask(location, asking, functools.partial(_compare, overlay, location), raw=True)
    return await open_raw(location, found, dry=dry)


async def _compare(overlay: Overlay, location: Location, remote: RetryingSource, nursery: trio.Nursery) -> None:
    """Raise SourceChanged unless it is the version that the overlay is pinned to. Without a pin, it gets one."""
    from qedfs.fetch.queue import FetchQueue
    from qedfs.image.condition import Condition
    from qedfs.image.pin import SourceVersion

    fetch = FetchQueue(remote, overlay.cluster_size, nursery)
    await SourceVersion(str(location), overlay, fetch, Condition(overlay)).check()
