"""What is opened as an overlay, and who may have it open at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfs.errors import BadOverlay, InUse, UsageError
from qedfs.overlay.storage import FileStorage


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, writable: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    for name, kind in (("fifo", BadOverlay), ("link", BadOverlay), ("folder", BadOverlay), ("nothing", UsageError)):
        with pytest.raises(kind):
            FileStorage.open(str(tmp_path / name), writable=writable)


def test_one_writer_or_many_readers(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    Path(path).write_bytes(b"x")
    first = FileStorage.open(path, writable=False)
    second = FileStorage.open(path, writable=False)
    with pytest.raises(InUse, match="is in use by another program"):
        FileStorage.open(path, writable=True)
    unlocked = FileStorage.open(path, writable=True, locked=False)
    for storage in (first, second, unlocked):
        storage.close()
        storage.close()
    writer = FileStorage.open(path, writable=True)
    with pytest.raises(InUse):
        FileStorage.open(path, writable=False)
    writer.close()
