"""What may be mounted on, and why a mount may have failed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfs.errors import InUse, UsageError
from qedfs.mount import mountpoint
from qedfs.mount.mountpoint import check_mountpoint, mount_info_at, unmount, why_not_mounted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "overlays").mkdir()
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("overlays")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "file").touch()
    return tmp_path


def test_an_empty_folder_may_be_mounted_on(folder: Path) -> None:
    check_mountpoint(str(folder / "mnt"), str(folder / "overlays"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none", "make it first: mkdir -p"),
        ("file", "is not a folder; name the overlay first"),
        ("broken", "is a symbolic link to a folder that is not there"),
        ("file/mnt", "cannot be mounted on: Not a directory"),
        ("overlays", "holds the overlays"),
        ("link", "holds the overlays"),
    ],
)
def test_other_places_are_refused(folder: Path, name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_mountpoint(str(folder / name), str(folder / "overlays"))


def test_a_place_that_is_taken_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InUse, match="something is mounted there already"):
        check_mountpoint("/proc", str(folder / "overlays"))
    monkeypatch.setattr(mountpoint, "is_dead", lambda _: True)
    with pytest.raises(InUse, match="a mount whose server has died is there; run: qedfs umount"):
        check_mountpoint(str(folder / "mnt"), str(folder / "overlays"))


def test_what_is_mounted_is_read_from_the_kernels_table(folder: Path) -> None:
    found = mount_info_at("/proc")
    assert found is not None
    assert found.kind == "proc"
    assert mount_info_at(str(folder / "mnt")) is None


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        ("/dev/fuse", "/dev/fuse may not be opened"),
        ("/mnt", "may not write to that folder"),
        ("", "option x is unknown"),
    ],
)
def test_the_likely_reason_why_a_mount_fails(monkeypatch: pytest.MonkeyPatch, refused: str, why: str) -> None:
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    monkeypatch.setattr(os, "access", lambda path, _: path != refused)
    assert why in why_not_mounted("/mnt", "fusermount3: option x is unknown")


def test_a_missing_unmount_command_is_an_error_like_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    done = unmount(str(folder / "mnt"))
    assert done.returncode == 127
    assert "No such file" in done.stderr


def test_without_fusermount3_the_package_is_named(folder: Path) -> None:
    said = "fuse: failed to exec fusermount3: No such file or directory"
    assert "install the package fuse3" in why_not_mounted(str(folder / "mnt"), said)
