"""Finds the local file of a backing that is about to be written, and opens it if nobody else has it open.

Owns what such a file must be, and the order of these checks. Must not know what is written (`commit_target.py`), nor
whether it is of the pinned version.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import trio

from qedfs.errors import Inaccessible, InUse, QedfsError, SourceError, UsageError
from qedfs.host.durable import sync_file
from qedfs.host.lease import open_elsewhere
from qedfs.image.commit_target import RawTarget, Target
from qedfs.image.qed_target import QedTarget
from qedfs.overlay.storage import FileStorage
from qedfs.source.path import Held, in_thread
from qedfs.source.policy import Policy
from qedfs.source.probe import HEAD_BYTES, QCOW2, QED, RAW, TAIL_BYTES, probe
from qedfs.source.url import Location

T = TypeVar("T")
S = TypeVar("S", bound=FileStorage)


class BackingFile(NamedTuple):
    """The file of a backing. `path` contains no links. `qed`: it is a QED overlay, and otherwise raw."""

    path: str
    status: os.stat_result
    qed: bool


async def find_file(location: Location, policy: Policy, *, probes: bool) -> BackingFile:
    """Look the file up, and at its first bytes if it is not recorded that it is raw (`probes`).

    If the caller is cancelled, it does not wait for a dead file server.

    Raises:
        Refused: the policy does not allow it.
        SourceError, UsageError: it is not there, or in a format that is not written.
    """
    return await _abandonable(f"backing {location}", lambda: _found(location, policy, probes=probes))


async def _abandonable(name: str, function: Callable[[], T]) -> T:
    """See `in_thread`. `name`: of the file, for messages."""
    try:
        return await in_thread(name, function)
    except OSError as exc:
        raise SourceError(f"{name}: {exc.strerror}") from exc


def _found(location: Location, policy: Policy, *, probes: bool) -> BackingFile:
    policy.check_location(location)
    with Held(location, policy) as held:
        path, status = os.readlink(held.path), os.stat(held.path)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"backing {location}: is not a regular file; qemu-img commit writes to devices")
        return BackingFile(path, status, probes and _is_qed(location, held.path, status.st_size))


def _is_qed(location: Location, path: str, size: int) -> bool:
    """Whether the file is a QED overlay. Raises SourceError if it is neither that nor raw."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(max(0, size - TAIL_BYTES))
        kind = probe(head, file.read(TAIL_BYTES), size=size, media_type="")
    if kind not in (RAW, QCOW2, QED):
        raise SourceError(f"backing {location} looks like {kind.name} (its {kind.at} bytes), not like a disk")
    if kind is QCOW2:
        raise SourceError(f"backing {location} is a qcow2 image, which is only read; use qemu-img commit")
    return kind is QED


async def check_unused(location: Location, file: BackingFile) -> None:
    """Raise InUse if anybody has the file open, this process included, as far as the file system tells."""
    if await trio.to_thread.run_sync(open_elsewhere, file.path):
        raise _in_use(location)


def _in_use(location: Location) -> InUse:
    return InUse(
        f"backing {location}: another program has it open, such as a mount of it, or of an overlay over it; close it"
        " there first"
    )


async def open_raw(location: Location, file: BackingFile, *, dry: bool = False) -> RawTarget:
    """Open and lock a raw file for writing. `dry`: nothing is written to it.

    Raises:
        Inaccessible: it cannot be written to.
        InUse: somebody else has it open, or it is another file than the one that was found.
    """
    storage = await _opened(location, file, writable=True)
    try:
        return await RawTarget.of(storage, functools.partial(sync_file, file.path), dry=dry)
    except BaseException:
        storage.close()
        raise


async def open_qed(location: Location, file: BackingFile, *, dry: bool = False) -> QedTarget:
    """Open and lock a QED image. Nothing in it changes before `QedTarget.begin`. `dry`: nor afterwards.

    Raises what `open_raw` raises, and BadOverlay.
    """
    storage = await _opened(location, file, writable=not dry)
    try:
        return await QedTarget.of(str(location), storage, functools.partial(_reopened, location, file), dry=dry)
    except BaseException:
        storage.close()
        raise


async def open_to_look(location: Location, file: BackingFile) -> Target:
    """Open a file only for reading, to count what a commit would write. Its page cache stays, which readers use.

    That others read it without a lock is not noticed: the image that is committed has it open itself. If the caller is
    cancelled, here or in a call of the target, it does not wait for a dead file server.

    Raises what `open_raw` and `open_qed` raise.
    """
    storage = await _abandonable(f"backing {location}", lambda: _open_to_look(location, file))
    try:
        if await storage.in_thread(storage.open_for_writing):
            raise _in_use(location)
        if file.qed:
            return await QedTarget.of(str(location), storage, functools.partial(_reopened, location, file), dry=True)
        return RawTarget(storage, functools.partial(sync_file, file.path), dry=True)
    except BaseException:
        storage.close()
        raise


class _LookedAt(FileStorage):
    """A file that is only read, and that nobody else writes to, so that its attributes stay."""

    _abandoned = False

    def __init__(self, fd: int, path: str, *, writable: bool, locked: bool = False) -> None:
        super().__init__(fd, path, writable=writable, locked=locked)
        self._status = super().stat()

    def stat(self) -> os.stat_result:
        """The attributes at the opening: the event loop does not wait for a file server."""
        return self._status

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run a call that changes nothing. If the caller is cancelled, the thread is abandoned."""
        try:
            return await _abandonable(self.path, function)
        except trio.Cancelled:
            self._abandoned = True
            raise

    def close(self) -> None:
        """Close the file. A thread that was abandoned may still read from it, and then it is the one that closes it."""
        if not self._abandoned:
            super().close()

    def __del__(self) -> None:
        super().close()


def _open_to_look(location: Location, file: BackingFile) -> _LookedAt:
    if not os.access(file.path, os.W_OK, effective_ids=True):
        raise Inaccessible(
            f"backing {location}: cannot be opened for writing: this user must not, or its file system is read-only"
        )
    return _open(_LookedAt, location, file, writable=False)


async def _opened(location: Location, file: BackingFile, *, writable: bool) -> FileStorage:
    return await trio.to_thread.run_sync(lambda: _open(FileStorage, location, file, writable=writable))


def _open(kind: type[S], location: Location, file: BackingFile, *, writable: bool) -> S:
    try:
        storage = kind.open(file.path, writable=writable)
    except Inaccessible as exc:
        reason = exc.__cause__.strerror if isinstance(exc.__cause__, OSError) else exc
        raise Inaccessible(f"backing {location}: cannot be opened for writing: {reason}") from exc
    if not os.path.samestat(storage.stat(), file.status):
        storage.close()
        raise InUse(f"backing {location}: was replaced by another file meanwhile; try again")
    return storage


def _reopened(location: Location, file: BackingFile) -> FileStorage:
    """Make the file durable with its times, and open and lock it only for reading, unchanged since."""
    try:
        sync_file(file.path)
        synced = os.stat(file.path)
    except OSError as exc:
        raise QedfsError(f"backing {location}: cannot sync: {exc.strerror}") from exc
    storage = FileStorage.open(file.path, writable=False)
    found = storage.stat()
    if not os.path.samestat(found, file.status) or _version(found) != _version(synced):
        storage.close()
        raise InUse(f"backing {location}: another program has changed it meanwhile; try again")
    return storage


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
