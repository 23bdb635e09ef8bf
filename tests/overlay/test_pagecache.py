"""Eviction of a real file's pages."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.host.procfs import TMPFS_TYPES, filesystem_type
from qedfs.overlay.pagecache import evict
from tests.harness.require import unavailable

PAGES = 64


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[int]:
    """A file whose pages are clean and in memory."""
    if filesystem_type(tmp_path) in TMPFS_TYPES:
        unavailable("needs a temporary folder on a disk")
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.write(fd, os.urandom(PAGES * mmap.PAGESIZE))
    os.fsync(fd)
    yield fd
    os.close(fd)


def is_cached(fd: int) -> bool:
    """Whether the first page is in memory, by mincore(2). A read with RWF_NOWAIT would start to bring it in."""
    with mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        place = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        found = ctypes.c_ubyte()
        call = ctypes.CDLL(None, use_errno=True).mincore
        assert call(ctypes.c_void_p(place), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found)) == 0
    return bool(found.value & 1)


def test_clean_pages_go(cached: int) -> None:
    assert is_cached(cached)
    assert evict(cached)
    assert not is_cached(cached)


def test_pages_that_somebody_maps_stay_and_are_seen(cached: int) -> None:
    with mmap.mmap(cached, PAGES * mmap.PAGESIZE) as mapping:
        assert len(mapping[:]) == PAGES * mmap.PAGESIZE  # each page is touched
        assert not evict(cached)
    assert evict(cached)
