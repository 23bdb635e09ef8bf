"""A new raw file: zeros become holes, and its digest is taken while it is written.

Owns the size of a hole, and how far the file is hashed. The digest is that of the file itself, part by part after each
was written. So the bytes come from the page cache, and the file is not read again when it is complete. Must not know
where the bytes come from.
"""

from __future__ import annotations

import os
from typing import BinaryIO

from qedfs.cli.digest_option import READ_BYTES, ExpectedDigest
from qedfs.errors import QedfsError
from qedfs.overlay.storage import Buffer

HOLE_BYTES = 64 << 10  # zeros of this size become a hole
_ZEROS = bytes(HOLE_BYTES)


def write_sparse(target: BinaryIO, pos: int, data: Buffer) -> int:
    """Write the blocks that are not all zeros; `target` has zeros there already. Returns their size in bytes."""
    written = 0
    view = memoryview(data)
    for start in range(0, len(view), HOLE_BYTES):
        part = view[start : start + HOLE_BYTES]
        if not _ZEROS.startswith(part):
            target.seek(pos + start)
            written += target.write(part)
    return written


class ReadBack:
    """Hashes a file in the order of its bytes, as far as it is written. Does nothing if no digest is `expected`."""

    def __init__(self, file: BinaryIO, expected: ExpectedDigest | None) -> None:
        self._file = file
        self._expected = expected
        self._pos = 0

    def up_to(self, end: int) -> None:
        """Hash what is before `end`: all of it is written. Raises QedfsError if the file is shorter."""
        if self._expected is None:
            return
        self._file.flush()
        while self._pos < end:
            piece = os.pread(self._file.fileno(), min(READ_BYTES, end - self._pos), self._pos)
            if not piece:
                raise QedfsError("the file that was written has become shorter")
            self._expected.add(piece)
            self._pos += len(piece)
