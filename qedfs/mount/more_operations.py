"""lseek (SEEK_DATA, SEEK_HOLE) and fallocate (TRIM, zero ranges), for which pyfuse3 has no handlers, and a short fsync.

Owns the way in which these handlers get into libfuse's table, and their replies. Must not know images.

pyfuse3 passes its table of handlers to libfuse in one call. The dynamic loader has put the address of that function
into pyfuse3's data. For the time of `pyfuse3.init`, `offered` replaces this pointer by a function of ours, which calls
the real one with a copy of the table that has two more entries, and others for fsync and write. The order of the
entries is libfuse's ABI (fuse_lowlevel.h: struct fuse_lowlevel_ops), which only grows. libfuse 3.17 calls the function
by another name, with one more argument.

That is safe only if there is exactly one such pointer, and the two entries are empty. Otherwise nothing is changed, and
the mount does without: the kernel then treats a file as all data, and refuses fallocate.

An fsync waits for the disk in a thread, which then replies itself, as libfuse allows. Through the event loop, the reply
would take two more turns of the loop, and on a busy host as many waits for a processor. If a flush takes more than one
barrier, pyfuse3's own handler answers. The handler for writes is in `write_handler.py`.

The entry write_buf is emptied. With it, libfuse receives all requests through a pipe, if it may make one of more than
1 MiB (CAP_SYS_RESOURCE, as root has): a splice and one or two reads instead of one read, and a copy more of what a
guest writes. pyfuse3 copies it out of the pipe at once, so that serves nothing. Its handler write gets the same bytes.

The other two handlers run as tasks, because libfuse calls us from the middle of pyfuse3's loop. Each replies exactly
once, whatever happens, unless another server takes the mount over, to which the kernel sends what was not answered. The
tasks belong to the nursery of `serving`, so the end of the mount waits for them, as for all requests.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol

import pyfuse3
import trio

from qedfs.mount.library_memory import Pointer, address_of, memory_of, replaced
from qedfs.mount.write_handler import write_handler

log = logging.getLogger(__name__)

# Indices in struct fuse_lowlevel_ops.
_WRITE, _FSYNC, _WRITE_BUF, _FALLOCATE, _LSEEK = 16, 19, 36, 40, 43
LOOK_SECONDS = 0.01  # between two looks whether a thread has replied, at the end of the mount
_WORD = ctypes.sizeof(ctypes.c_void_p)
_LSEEK_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
_FALLOCATE_HANDLER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
)
_FSYNC_HANDLER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p)
_TABLE = ctypes.POINTER(ctypes.c_void_p)
# The function that takes the table, by name: since libfuse 3.17, and before. PYFUNCTYPE, like PyDLL below, keeps the
# interpreter's lock during the call, as pyfuse3 does: libfuse's state is shared with pyfuse3's handlers.
_NEW_SESSION: dict[str, Any] = {
    "fuse_session_new_versioned": ctypes.PYFUNCTYPE(
        ctypes.c_void_p, ctypes.c_void_p, _TABLE, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
    ),
    "fuse_session_new": ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, _TABLE, ctypes.c_size_t, ctypes.c_void_p),
}


class Handlers(Protocol):
    """What answers the requests. Raises FUSEError; any other exception becomes EIO."""

    def write_now(self, handle: int, pos: int, data: memoryview) -> bool:
        """Write, if that need not wait. If this is False, or raises anything, pyfuse3's `write` is called instead."""
        ...

    def fsync_now(self, inode: int, reply: Callable[[int], None]) -> bool:
        """Begin an fsync, and call `reply` once, in any thread, with 0 or an errno; or return False."""
        ...

    async def lseek(self, inode: int, pos: int, whence: int) -> int:
        """The position that lseek(2) returns for SEEK_DATA or SEEK_HOLE."""
        ...

    async def fallocate(self, inode: int, mode: int, pos: int, size: int) -> None:
        """Do what fallocate(2) does with this mode."""
        ...


class MoreOperations:
    """The handlers of one mount. `missing`: why they are not there; "" if they are, once `offered` has ended."""

    def __init__(self, handlers: Handlers) -> None:
        self.missing = "the file system is not mounted yet"
        self.leaves = False  # another server answers what this one breaks off
        self._handlers = handlers
        self._nursery: trio.Nursery | None = None
        self._syncing: set[Callable[[int], None]] = set()  # of `fsync_now`, and not called yet
        self._kept: list[object] = []  # what libfuse refers to as long as the session exists

    @contextlib.contextmanager
    def offered(self) -> Iterator[None]:
        """While the context is open, a session that pyfuse3 creates gets the two handlers, if possible."""
        try:
            # Functions of the libfuse that pyfuse3 is linked with are found through pyfuse3 itself.
            library = ctypes.PyDLL(pyfuse3.__file__)
            pointer = _find_pointer(library, memory_of(os.path.realpath(pyfuse3.__file__)))
            replacing = contextlib.ExitStack()
            replacing.enter_context(replaced(pointer, self._hook(library, pointer)))
        except (OSError, ValueError, LookupError, AttributeError) as exc:
            self.missing = str(exc)
            log.warning("no SEEK_HOLE, no TRIM: %s", exc)
            yield
            return
        self.missing = "pyfuse3 did not call libfuse through its pointer"
        with replacing:
            yield

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer the requests that arrive while the context is open. Ends when all of them are answered."""
        try:
            async with trio.open_nursery() as self._nursery:
                yield
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                # A reply after the end of libfuse's session would use freed memory. A thread that has replied does not
                # wake the loop, so look again and again; this is at the end of the mount, and rare even there.
                while self._syncing:  # noqa: ASYNC110
                    await trio.sleep(LOOK_SECONDS)

    def _hook(self, library: ctypes.PyDLL, pointer: Pointer) -> int:
        """The address of a function that stands for libfuse's: it adds the handlers."""
        kind = _NEW_SESSION[pointer.function]
        real = kind(address_of(library, pointer.function))
        reply_error, reply_position = library.fuse_reply_err, library.fuse_reply_lseek
        reply_error.argtypes = [ctypes.c_void_p, ctypes.c_int]
        reply_position.argtypes = [ctypes.c_void_p, ctypes.c_int64]

        def lseek(request: int, inode: int, pos: int, whence: int, _file: int) -> None:
            self._start(
                lambda: self._handlers.lseek(inode, pos, whence),
                lambda found: reply_position(request, found),
                lambda number: reply_error(request, number),
            )

        def fallocate(request: int, inode: int, mode: int, pos: int, size: int, _file: int) -> None:
            self._start(
                lambda: self._handlers.fallocate(inode, mode, pos, size),
                lambda _: reply_error(request, 0),
                lambda number: reply_error(request, number),
            )

        def fsync(request: int, inode: int, datasync: int, file: int) -> None:
            if not self._begin_fsync(inode, lambda number: reply_error(request, number)):
                real_fsync[0](request, inode, datasync, file)

        real_fsync: list[Callable[[int, int, int, int], None]] = []  # pyfuse3's
        fsync_entry = _FSYNC_HANDLER(fsync)
        lseek_entry, fallocate_entry = _LSEEK_HANDLER(lseek), _FALLOCATE_HANDLER(fallocate)

        def new_session(arguments: int, table: Any, size: int, *rest: int) -> int | None:  # noqa: ANN401 - _TABLE
            count = max(size // _WORD, _LSEEK + 1)
            entries = (ctypes.c_void_p * count)(*table[: size // _WORD])
            if entries[_LSEEK] or entries[_FALLOCATE]:
                self.missing = "pyfuse3 has handlers of its own"
                return real(arguments, table, size, *rest)  # type: ignore[no-any-return]
            real_fsync.append(_FSYNC_HANDLER(entries[_FSYNC] or 0))
            entries[_FSYNC] = ctypes.cast(fsync_entry, ctypes.c_void_p)
            if pyfuse3s := entries[_WRITE]:
                entries[_WRITE_BUF] = None
                write_entry = write_handler(library, pyfuse3s, self._handlers.write_now)
                self._kept.append(write_entry)
                entries[_WRITE] = ctypes.cast(write_entry, ctypes.c_void_p)
            entries[_LSEEK] = ctypes.cast(lseek_entry, ctypes.c_void_p)
            entries[_FALLOCATE] = ctypes.cast(fallocate_entry, ctypes.c_void_p)
            self.missing = ""
            return real(arguments, ctypes.cast(entries, _TABLE), count * _WORD, *rest)  # type: ignore[no-any-return]

        hook = type(real)(new_session)
        self._kept += [fsync_entry, lseek_entry, fallocate_entry, hook]
        return ctypes.cast(hook, ctypes.c_void_p).value or 0

    def _begin_fsync(self, inode: int, reply_error: Callable[[int], object]) -> bool:
        """Whether a reply to this fsync will be sent. Called by libfuse, so it must not raise."""

        def reply(number: int) -> None:
            reply_error(number)
            self._syncing.discard(reply)

        if self._nursery is None:
            return False  # nobody would wait for the thread
        self._syncing.add(reply)
        try:
            if self._handlers.fsync_now(inode, reply):
                return True
        except Exception:
            log.exception("internal error in a request")
        self._syncing.discard(reply)
        return False

    def _start(
        self,
        handler: Callable[[], Awaitable[Any]],
        reply: Callable[[Any], object],
        reply_error: Callable[[int], object],
    ) -> None:
        """Run a handler in a task, and reply. Called by libfuse, so it must not raise."""

        async def answer() -> None:
            try:
                found = await handler()
            except pyfuse3.FUSEError as exc:
                reply_error(exc.errno)
            except BaseException as exc:
                if not self.leaves or isinstance(exc, Exception):
                    reply_error(errno.EIO)
                if not isinstance(exc, Exception):
                    raise  # the task is cancelled
                log.exception("internal error in a request")
            else:
                reply(found)

        if self._nursery is None:
            reply_error(errno.EIO)
        else:
            self._nursery.start_soon(answer)


def _find_pointer(library: ctypes.PyDLL, regions: Sequence[tuple[int, int, bool]]) -> Pointer:
    """The pointer through which pyfuse3 calls libfuse. `regions` of its memory: (start, end, writable).

    Raises:
        LookupError: there is none, or more than one.
    """
    found: list[Pointer] = []
    for function in _NEW_SESSION:
        if not hasattr(library, function):
            continue
        address = address_of(library, function).to_bytes(_WORD, sys.byteorder)
        for start, end, writable in regions:
            memory = ctypes.string_at(start, end - start)
            at = memory.find(address)
            while at >= 0:
                if at % _WORD == 0:
                    found.append(Pointer(start + at, writable, function))
                at = memory.find(address, at + 1)
    if len(found) != 1:
        raise LookupError(f"pyfuse3 has {len(found)} pointers to libfuse's fuse_session_new, not one")
    return found[0]
