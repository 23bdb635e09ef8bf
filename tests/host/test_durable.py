"""Who makes a file syncs it, then gives it its name, then syncs the folder: a power cut leaves nothing half said."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qedfs.cli.new_file import new_file
from qedfs.errors import Inaccessible
from qedfs.host.durable import sync_file, sync_folder
from qedfs.overlay.create import create_overlay
from tests.harness.require import require, require_root
from tests.test_imports import SHARED, modules

MIB = 1 << 20
NAMING = frozenset({"os.link", "os.rename", "os.renames", "os.replace", "shutil.move"})
NAMERS = {"overlay/create.py", "cli/new_file.py", "mount/snapshot.py"}


def make_overlay(path: Path) -> None:
    create_overlay(str(path), image_size=MIB, backing="http://host/disk.raw")


def make_file(path: Path) -> None:
    """As `export`, `profile` and `map --png` do."""
    with new_file(str(path)) as file:
        file.write(b"content")


MAKERS = {"create": make_overlay, "new_file": make_file}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that name and sync, in their order."""
    found: list[str] = []

    def noting(name: str) -> None:
        call: Callable[..., object] = getattr(os, name)

        def noted(*args: object) -> object:
            kind = ""
            if isinstance(args[0], int):
                kind = " folder" if os.path.isdir(f"/proc/self/fd/{args[0]}") else " file"
            found.append(name + kind)
            return call(*args)

        monkeypatch.setattr(os, name, noted)

    for name in ("fsync", "fdatasync", "fchmod", "link", "replace"):
        noting(name)
    return found


@pytest.mark.parametrize(("maker", "naming"), [("create", "link"), ("new_file", "replace")])
def test_the_file_then_its_name_then_the_folder(tmp_path: Path, events: list[str], maker: str, naming: str) -> None:
    MAKERS[maker](tmp_path / "file")
    assert events == ["fchmod file", "fsync file", naming, "fsync folder"]


@pytest.mark.xdist_group(SHARED)
def test_names_are_given_by_those_only() -> None:
    """Whoever else does it has to sync the folder, and be added here."""
    found = {module.path for module in modules() for use in module.uses if use.name in NAMING}
    assert found == NAMERS


@pytest.mark.parametrize("maker", MAKERS)
def test_a_folder_that_cannot_be_synced_is_an_error(
    tmp_path: Path, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fail(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Inaccessible, match=r"file: cannot be .*: Input/output error"):
        MAKERS[maker](tmp_path / "file")
    if maker == "create":
        assert os.listdir(tmp_path) == []  # so that it can be tried again


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_syncs_no_folders_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(str(tmp_path))


def test_a_folder_that_may_not_be_read_is_synced_with_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    synced: list[bool] = []
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "sync", lambda: synced.append(True))
    sync_folder(str(tmp_path))
    assert synced == [True]


@contextlib.contextmanager
def loop_mounted(disk: Path, folder: Path) -> Iterator[Path]:
    """The ext4 in a file, mounted; the loop device goes with the mount."""
    folder.mkdir()
    subprocess.run([require("mount"), "-o", "loop,commit=300", disk, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run([require("umount"), folder], check=True)


@pytest.mark.parametrize("maker", MAKERS)
def test_what_was_made_is_there_after_a_power_cut(tmp_path: Path, maker: str) -> None:
    """The disk as it is when the call returns: what ext4 has not sent to it is lost."""
    require_root()
    disk, cut = tmp_path / "disk", tmp_path / "cut"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run([require("mkfs.ext4"), "-q", disk], check=True)
    with loop_mounted(disk, tmp_path / "before") as folder:
        os.sync()
        MAKERS[maker](folder / "file")
        made = (folder / "file").read_bytes()
        cut.write_bytes(disk.read_bytes())
    with loop_mounted(cut, tmp_path / "after") as folder:
        assert (folder / "file").read_bytes() == made
        assert [name for name in os.listdir(folder) if name.startswith(".qedfs-")] == []


def test_a_file_becomes_durable_with_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fdatasync would leave out an mtime that is all that has changed."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    synced: list[os.stat_result] = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(os.fstat(fd)))
    sync_file(str(path))
    assert [os.path.samestat(found, path.stat()) for found in synced] == [True]
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        sync_file(str(tmp_path / "link"))
