"""The handler for writes, with memory laid out as libfuse's, and on a real mount."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from qedfs.errors import NoSpace
from qedfs.mount.write_handler import HANDLER, write_handler

from .support import CLUSTER_SIZE, mounted_over, opened, origin

REQUEST, INODE, HANDLE, POS = 11, 12, 13, 1 << 40


class Libfuse:
    """Calls a handler as libfuse does, and notes who has replied."""

    def __init__(self, write_now: Callable[[int, int, memoryview], bool], *, handle_in_file: int = HANDLE) -> None:
        self.replies: list[tuple[object, ...]] = []
        self._file = ctypes.create_string_buffer(struct.pack("=IIQQ", 0, 0, 0, handle_in_file), 64)
        self._pyfuse3s = HANDLER(self._ordinary)
        reply = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(self._reply)
        library = cast("ctypes.PyDLL", SimpleNamespace(fuse_reply_write=reply))
        self._handler = write_handler(library, ctypes.cast(self._pyfuse3s, ctypes.c_void_p).value or 0, write_now)

    def write(self, data: bytes) -> None:
        received = ctypes.create_string_buffer(struct.pack("=QQIIQII", HANDLE, POS, len(data), 0, 0, 0, 0) + data)
        place = ctypes.addressof(received) + 40
        self._handler(REQUEST, INODE, place, len(data), POS, ctypes.addressof(self._file))

    def _reply(self, request: int, size: int) -> int:
        self.replies.append(("ours", request, size))
        return 0

    def _ordinary(self, request: int, inode: int, data: int, size: int, pos: int, file: int) -> None:
        self.replies.append(("pyfuse3", request, inode, ctypes.string_at(data, size), pos))


def test_a_write_that_need_not_wait_is_done_from_the_buffer_which_nobody_can_read_afterwards() -> None:
    seen: list[tuple[int, int, bytes, memoryview]] = []

    def write_now(handle: int, pos: int, data: memoryview) -> bool:
        seen.append((handle, pos, bytes(data), data))
        return True

    libfuse = Libfuse(write_now)
    for data in (b"first", b"the second"):
        libfuse.write(data)
    assert libfuse.replies == [("ours", REQUEST, 5), ("ours", REQUEST, 10)]
    assert [one[:3] for one in seen] == [(HANDLE, POS, b"first"), (HANDLE, POS, b"the second")]
    for *_, view in seen:
        with pytest.raises(ValueError, match="released"):
            bytes(view)


@pytest.mark.parametrize("error", [None, NoSpace("full"), ValueError("a bug"), MemoryError()])
def test_what_waits_or_fails_has_one_reply_from_pyfuse3s_handler(error: Exception | None) -> None:
    def write_now(handle: int, pos: int, data: memoryview) -> bool:
        if error is not None:
            raise error
        return False

    libfuse = Libfuse(write_now)
    libfuse.write(b"bytes")
    assert libfuse.replies == [("pyfuse3", REQUEST, INODE, b"bytes", POS)]


@pytest.mark.expect_log("this libfuse has another fuse_file_info")
def test_with_another_layout_all_writes_are_pyfuse3s() -> None:
    libfuse = Libfuse(lambda *_: pytest.fail("called"), handle_in_file=HANDLE + 1)
    for data in (b"1", b"2"):
        libfuse.write(data)
    assert libfuse.replies == [("pyfuse3", REQUEST, INODE, data, POS) for data in (b"1", b"2")]


def test_the_real_libfuse_has_this_layout_and_overlapping_writes_are_in_the_image(tmp_path: Path) -> None:
    with (
        origin(tmp_path) as source,
        mounted_over(tmp_path, source.url, "--no-stream") as mount,
        opened(mount.path("disk.raw")) as fd,
    ):
        os.pwrite(fd, b"a" * 2 * CLUSTER_SIZE, 0)  # new clusters, which pyfuse3's handler places
        expected = bytearray(b"a" * 2 * CLUSTER_SIZE)
        for pos, data in ((0, b"b" * CLUSTER_SIZE), (CLUSTER_SIZE - 5, b"c" * 10), (4096, b"d" * CLUSTER_SIZE)):
            os.pwrite(fd, data, pos)
            expected[pos : pos + len(data)] = data
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the kernel asks the mount for them
        assert os.pread(fd, len(expected), 0) == expected
        assert "another fuse_file_info" not in mount.output()
