"""A new raw file: its holes, and its digest, which is taken while it is written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qedfs.cli.digest_option import ExpectedDigest
from qedfs.cli.exporting.raw_file import HOLE_BYTES, ReadBack, write_sparse
from qedfs.errors import QedfsError


def test_zeros_become_holes(tmp_path: Path) -> None:
    data = bytes(HOLE_BYTES) + b"x" * HOLE_BYTES + bytes(3 * HOLE_BYTES) + b"\0y"
    with (tmp_path / "file").open("wb") as file:
        file.truncate(HOLE_BYTES + len(data))
        assert write_sparse(file, HOLE_BYTES, data) == HOLE_BYTES + 2
    assert (tmp_path / "file").read_bytes() == bytes(HOLE_BYTES) + data
    assert (tmp_path / "file").stat().st_blocks * 512 <= 2 * HOLE_BYTES


def test_each_byte_is_read_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(5000)
    expected = ExpectedDigest(hashlib.sha256(content).hexdigest())
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, size: int, pos: int) -> bytes:
        data = pread(fd, size, pos)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    with (tmp_path / "file").open("w+b") as file:
        read_back = ReadBack(file, expected)
        for pos in range(0, 5000, 1000):
            file.write(content[pos : pos + 1000])  # which may be in a buffer still
            read_back.up_to(pos + 1000)
        read_back.up_to(5000)
        assert sum(read) == 5000
        expected.check("file")
        with pytest.raises(QedfsError, match="shorter"):
            read_back.up_to(5001)


def test_nothing_is_read_if_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", None)
    with (tmp_path / "file").open("wb") as file:
        ReadBack(file, None).up_to(5000)
