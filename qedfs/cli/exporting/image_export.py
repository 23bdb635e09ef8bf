"""The file in a mount goes into a raw file or into standard output, if nobody writes to it meanwhile.

Its times move at each write, and each discard (`overlay/times.py`). So the copy is the image at one moment if they are
the same before the first read and after the last one. They are looked at after each piece, too: beside a guest that
writes all the time, the copy ends soon.

Owns the reads, and this comparison. Must not know overlays.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import BinaryIO, Protocol

import trio

from qedfs.cli.digest_option import ExpectedDigest
from qedfs.cli.exporting.overlay_export import Export
from qedfs.cli.exporting.raw_file import ReadBack, write_sparse
from qedfs.cli.image_pipe import write_all
from qedfs.errors import InUse, QedfsError, file_error

PIECE_BYTES = 1 << 20
_ZEROS = bytes(PIECE_BYTES)


class _Output(Protocol):
    """Takes an image in the order of its bytes. Its methods wait for a disk or a reader."""

    def add(self, hole: int, pos: int, data: bytes) -> None:
        """`hole` zeros, and after them the data, which begins at `pos`."""

    def end(self, size: int) -> int:
        """All is there. Returns how many bytes of it are data."""


async def export_image(path: str, reason: str, export: Export, target: BinaryIO | None) -> dict[str, int]:
    """Write the image at `path` to the new file `target`, or to standard output. Returns its size, and of its data.

    `reason`: why it is not exported by a snapshot, for the message of a failure.

    Raises:
        InUse: it was written to meanwhile.
        QedfsError: it cannot be read, or the digest is another one.
    """
    run = trio.to_thread.run_sync
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise file_error(f"{path}: {exc.strerror}", exc) from exc
    try:
        unchanged = await run(_Unchanged, fd, path, reason)
        size, pos = unchanged.size, 0
        output: _Output = _Pipe(export.expected) if target is None else _File(target, size, export.expected)
        export.progress.total = size
        while pos < size:
            # A read may wait for as long as the source is away. Ctrl-C does not wait for it.
            at, data = await run(_read_next, fd, path, pos, size, abandon_on_cancel=True)
            await run(output.add, at - pos, at, data)
            await run(unchanged.check)
            export.progress.add(at + len(data) - pos)
            pos = at + len(data)
        written = await run(output.end, size)
        await run(unchanged.check_at_end)
    finally:
        os.close(fd)
    if export.expected is not None:
        export.expected.check(path)
    return {"size": size, "data_size": written}


class _Unchanged:
    """That an image was not written to, since this object was made."""

    def __init__(self, fd: int, path: str, reason: str) -> None:
        self._fd, self._path, self._reason = fd, path, reason
        # What was written through a mapping is in the kernel's pages only, and would move the times later.
        self._sync()
        self._first = self._seen()
        self.size = self._first[0]

    def check(self) -> None:
        """Raise InUse if it was."""
        if self._seen() != self._first:
            raise InUse(
                f"{self._path}: was written to while it was copied; suspend its guest and try again (there is no"
                f" snapshot: {self._reason})"
            )

    def check_at_end(self) -> None:
        """The same, after the last read. The kernel lets the sync wait for a write that is under way."""
        self._sync()
        self.check()

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as exc:
            raise QedfsError(f"{self._path}: cannot be flushed: {exc.strerror}") from exc

    def _seen(self) -> tuple[int, int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _File:
    """A new file with holes."""

    def __init__(self, target: BinaryIO, size: int, expected: ExpectedDigest | None) -> None:
        target.truncate(size)
        self._target = target
        self._read_back = ReadBack(target, expected)
        self._written = 0

    def add(self, hole: int, pos: int, data: bytes) -> None:
        del hole  # it is there already
        self._written += write_sparse(self._target, pos, data)
        self._read_back.up_to(pos + len(data))

    def end(self, size: int) -> int:
        self._read_back.up_to(size)
        return self._written


class _Pipe:
    """Standard output."""

    def __init__(self, expected: ExpectedDigest | None) -> None:
        self._expected = expected

    def add(self, hole: int, pos: int, data: bytes) -> None:
        del pos
        while hole:
            self._write(_ZEROS[:hole])
            hole -= min(hole, len(_ZEROS))
        self._write(data)

    def end(self, size: int) -> int:
        return size

    def _write(self, data: bytes) -> None:
        if self._expected is not None:
            self._expected.add(data)
        write_all(sys.stdout.fileno(), data)


def _read_next(fd: int, path: str, pos: int, size: int) -> tuple[int, bytes]:
    """The next data from `pos` on, and where it begins; no bytes if up to `size` there are only zeros."""
    try:
        at = os.lseek(fd, pos, os.SEEK_DATA)
        data = os.pread(fd, min(PIECE_BYTES, size - at), at)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return size, b""
        raise QedfsError(f"{path}: cannot be read: {exc.strerror}") from exc
    if not data:
        raise QedfsError(f"{path}: is shorter now")
    return at, data
