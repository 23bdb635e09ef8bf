"""Eviction of a real file's pages."""

from __future__ import annotations

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
    try:
        return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def test_clean_pages_go(cached: int) -> None:
    assert is_cached(cached)
    assert evict(cached)
    assert not is_cached(cached)


def test_pages_that_somebody_maps_stay_and_are_seen(cached: int) -> None:
    with mmap.mmap(cached, PAGES * mmap.PAGESIZE) as mapping:
        assert len(mapping[:]) == PAGES * mmap.PAGESIZE  # each page is touched
        assert not evict(cached)
    assert evict(cached)
