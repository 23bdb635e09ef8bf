"""A file on its way into the folder is not opened: what tells it from one that is whole."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path

import pytest
import trio

from qedfs.errors import BadOverlay, InUse, UsageError
from qedfs.mount.settling import check_settled
from qedfs.overlay.storage import FileStorage
from tests.overlay.images import filled

WHOLE = bytes(filled({0: b"a", 1: b"b", 2: 1}).data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qed"
    path.write_bytes(WHOLE)
    return path


def check(path: Path, *, is_new: bool) -> None:
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        trio.run(partial(check_settled, str(path), fd, is_new=is_new))
    finally:
        os.close(fd)


@pytest.mark.parametrize("is_new", [True, False])
def test_what_somebody_writes_to_is_in_use(path: Path, is_new: bool) -> None:
    check(path, is_new=is_new)
    with path.open("ab"), pytest.raises(InUse, match=r"disk\.qed: another program has it open for writing"):
        check(path, is_new=is_new)
    ours = FileStorage.open(str(path), writable=True)
    with contextlib.closing(ours), pytest.raises(InUse, match=r"disk\.qed: is in use by another program"):
        check(path, is_new=is_new)
    with path.open("rb"):
        check(path, is_new=is_new)
    assert path.read_bytes() == WHOLE


def test_a_part_of_an_overlay_is_its_owners_matter_once_nobody_writes_to_it(path: Path) -> None:
    os.truncate(path, len(WHOLE) - 4096)
    check(path, is_new=True)


@pytest.mark.parametrize("size", [0, 63, 4096, len(WHOLE) - 4096, len(WHOLE) - 1])
def test_where_nobody_can_tell_the_tables_have_to_fit(path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(FileStorage, "open_for_writing", lambda _: None)
    check(path, is_new=True)
    os.truncate(path, size)
    with pytest.raises(BadOverlay, match=r"disk\.qed: .*; it may still be being copied"):
        check(path, is_new=True)
    # What was there before us may have been so for years.
    check(path, is_new=False)


def test_what_goes_away_meanwhile_is_told(path: Path) -> None:
    path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        check(path, is_new=True)
