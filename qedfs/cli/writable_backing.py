"""Finds the backing that a command writes to: a local file, allowed, of the pinned version, used by nobody else.

Owns these conditions and their order. Must not know what is written.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple

import trio

from qedfs.cli.asked_source import Asking, ask
from qedfs.errors import Inaccessible, InUse, SourceError, UsageError
from qedfs.host.durable import sync_file
from qedfs.host.lease import open_elsewhere
from qedfs.image.commit_target import QedTarget, RawTarget, Target
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.storage import FileStorage
from qedfs.source.path import Held
from qedfs.source.policy import Policy
from qedfs.source.probe import HEAD_BYTES, QCOW2, RAW, TAIL_BYTES, probe
from qedfs.source.url import Location, parse_location

if TYPE_CHECKING:
    from qedfs.source.retrying import RetryingSource

_QED = b"QED\0"  # the first bytes of such a file


class _File(NamedTuple):
    """The backing that was found. `path` contains no links. `qed`: it is a QED overlay, and otherwise raw."""

    path: str
    status: os.stat_result
    qed: bool


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
        SourceError, UsageError: it is not there, or in a format that is not written.
        Inaccessible: it cannot be written to.
    """
    probes = overlay.probes_backing
    found = await trio.to_thread.run_sync(lambda: _found(location, Policy(asking.allow_backing), probes=probes))
    if os.path.samestat(found.status, overlay.file_status()):
        raise UsageError(f"backing {location}: is the overlay itself")
    # Before we have it open: the question is whether anybody has.
    if await trio.to_thread.run_sync(open_elsewhere, found.path):
        raise InUse(
            f"backing {location}: another program has it open, such as a mount of an overlay over it; close it there"
            " first"
        )
    if found.qed:
        target: Target = await _qed(overlay, location, found, dry=dry)
    else:
        target = await _raw(overlay, location, found, asking, dry=dry)
    try:
        yield target
    finally:
        with trio.CancelScope(shield=True):
            await target.close()


def _found(location: Location, policy: Policy, *, probes: bool) -> _File:
    """Look the file up, and at its first bytes if it is not recorded that it is raw (`probes`)."""
    policy.check_location(location)
    try:
        with Held(location, policy) as held:
            path, status = os.readlink(held.path), os.stat(held.path)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"backing {location}: is not a regular file; qemu-img commit writes to devices")
            return _File(path, status, probes and _is_qed(location, held.path, status.st_size))
    except OSError as exc:
        raise SourceError(f"backing {location}: {exc.strerror}") from exc


def _is_qed(location: Location, path: str, size: int) -> bool:
    """Whether the file is a QED overlay. Raises SourceError if it is neither that nor raw."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(max(0, size - TAIL_BYTES))
        kind = probe(head, file.read(TAIL_BYTES), size=size, media_type="")
    if kind not in (RAW, QCOW2) and not head.startswith(_QED):
        raise SourceError(f"backing {location} looks like {kind.name} (its {kind.at} bytes), not like a disk")
    if kind is QCOW2:
        raise SourceError(f"backing {location} is a qcow2 image, which is only read; use qemu-img commit")
    return head.startswith(_QED)


async def _qed(overlay: Overlay, location: Location, found: _File, *, dry: bool) -> QedTarget:
    backing = await open_overlay(found.path, writable=not dry)
    target = QedTarget(str(location), backing, dry=dry)
    try:
        target.check(overlay.cluster_size, overlay.image_size)
        return target
    except BaseException:
        with trio.CancelScope(shield=True):
            await target.close()
        raise


async def _raw(overlay: Overlay, location: Location, found: _File, asking: Asking, *, dry: bool) -> RawTarget:
    await ask(location, asking, functools.partial(_compare, overlay, location), raw=True)
    try:
        storage = FileStorage.open(found.path, writable=True)
    except Inaccessible as exc:
        reason = exc.__cause__.strerror if isinstance(exc.__cause__, OSError) else exc
        raise Inaccessible(f"backing {location}: cannot be opened for writing: {reason}") from exc
    try:
        if not os.path.samestat(storage.stat(), found.status):
            raise InUse(f"backing {location}: was replaced by another file meanwhile; try again")
        return await RawTarget.of(storage, functools.partial(sync_file, found.path), dry=dry)
    except BaseException:
        storage.close()
        raise


async def _compare(overlay: Overlay, location: Location, remote: RetryingSource, nursery: trio.Nursery) -> None:
    """Raise SourceChanged unless it is the version that the overlay is pinned to. Without a pin, it gets one."""
    from qedfs.fetch.queue import FetchQueue
    from qedfs.image.condition import Condition
    from qedfs.image.pin import SourceVersion

    fetch = FetchQueue(remote, overlay.cluster_size, nursery)
    await SourceVersion(str(location), overlay, fetch, Condition(overlay)).check()
