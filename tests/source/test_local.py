"""A local file as a source: its bytes, its holes, and that a change of it is noticed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.source.local import LocalSource
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location


async def opened(path: Path) -> LocalSource:
    return await LocalSource.open(parse_location(str(path)), Policy((str(path.parent),)))


async def read(source: LocalSource, pos: int, size: int) -> bytes:
    buffer = bytearray(size)
    await source.read(pos, memoryview(buffer))
    return bytes(buffer)


async def test_bytes_and_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.write(b"a" * 65536)
        file.seek(1 << 20)
        file.write(b"b" * 65536)
        file.truncate(2 << 20)
    source = await opened(path)
    assert source.identity.size == 2 << 20
    assert await read(source, 65530, 12) == b"a" * 6 + bytes(6)
    assert await read(source, 1 << 20, 65536) == b"b" * 65536
    pos, told = 0, []
    while pos < 2 << 20:
        for extent in await source.extents(pos, (2 << 20) - pos) or ():
            told.append((extent.pos, extent.size, extent.zero))
            pos += extent.size
    assert [zero for _, _, zero in told] == [False, True, False, True]
    await source.aclose()


def cut(path: Path) -> None:
    os.truncate(path, 0)


def cut_and_grow(path: Path) -> None:
    os.truncate(path, 0)
    os.truncate(path, 1 << 20)


def cut_in_secret(path: Path) -> None:
    before = path.stat()
    os.truncate(path, 65536)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [cut, cut_and_grow, cut_in_secret])
async def test_a_file_that_was_cut_is_no_hole(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Else the stream of an overlay would fill it with zeros and call it complete."""
    path = tmp_path / "disk"
    path.write_bytes(b"a" * (1 << 20))
    os.utime(path, (1, 1))
    source = await opened(path)
    assert [extent.zero for extent in await source.extents(0, 1 << 20) or ()] == [False]
    change(path)
    for pos in (0, 512 << 10):
        with pytest.raises(SourceChanged):
            await source.extents(pos, 4096)
    with pytest.raises(SourceChanged):
        await read(source, 0, 4096)
    await source.aclose()


async def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "none"):
        with pytest.raises(SourceError):
            await opened(path)


async def test_want_of_a_descriptor_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", none_left)
    with pytest.raises(SourceUnreachable, match="open files"):
        await opened(tmp_path / "disk")
    monkeypatch.undo()
    with pytest.raises(SourceError) as caught:
        await opened(tmp_path / "disk")
    assert not isinstance(caught.value, SourceUnreachable)
