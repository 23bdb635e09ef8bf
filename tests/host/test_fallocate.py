"""fallocate(2) as the kernel carries it out, and as it refuses it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from qedfs.host.fallocate import KEEP_SIZE, PUNCH_HOLE, fallocate


def test_it_reserves_and_gives_back(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file:
        fd = file.fileno()
        os.pwrite(fd, b"x" * 65536, 0)
        os.fsync(fd)
        assert fallocate(fd, PUNCH_HOLE, 4096, 8192) == 0
        assert os.pread(fd, 65536, 0) == b"x" * 4096 + bytes(8192) + b"x" * (65536 - 12288)
        before = os.fstat(fd).st_blocks
        assert fallocate(fd, KEEP_SIZE, 1 << 20, 1 << 20) == 0
        assert os.fstat(fd).st_size == 65536
        assert (os.fstat(fd).st_blocks - before) * 512 >= 1 << 20


def test_an_error_is_an_errno(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file:
        assert fallocate(file.fileno(), KEEP_SIZE, 0, 0) == errno.EINVAL
    with (tmp_path / "file").open("rb") as file:
        assert fallocate(file.fileno(), PUNCH_HOLE, 0, 4096) == errno.EBADF
