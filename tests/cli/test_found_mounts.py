"""Which mounts there are, told from the kernel's tables alone; and the only one is meant if none is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfs.cli.found_mounts import FoundMount, qedfs_mounts
from qedfs.host import procfs
from qedfs.overlay.create import create_overlay

from ..harness.namespace import own_mounts

LINE = b"36 35 %b / %b rw,nosuid,nodev shared:1 - %b %b rw,user_id=%d,group_id=%d,default_permissions\n"


def table(*rows: tuple[bytes, bytes, bytes, int], kind: bytes = b"fuse.qedfs") -> list[procfs.MountLine]:
    """A table of mounts from (device, place, source, uid)."""
    lines = [LINE % (device, place, kind, source, user, user) for device, place, source, user in rows]
    return list(procfs.mounts(b"".join(lines)))


def test_the_mounts_of_a_user_and_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (b"0:50", b"/mnt/a\\040b", b"/srv/a.qed", 0), (b"0:51", b"/home/eve/m", b"/home/eve/vms", 7)
    found = table(ours, theirs) + table((b"8:1", b"/", b"/dev/sda1", 0), kind=b"ext4")
    assert qedfs_mounts(7, found) == [FoundMount("/home/eve/m", "/home/eve/vms", 7, 7, ())]
    assert [mount.mountpoint for mount in qedfs_mounts(0, found)] == ["/mnt/a b"]
    for uid, count in ((0, 2), (7, 1), (8, 0)):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        assert len(qedfs_mounts(table=found)) == count


def test_copies_of_a_mount_are_one_mount() -> None:
    one = table((b"0:50", b"/mnt", b"/a.qed", 0), (b"0:50", b"/copy", b"/a.qed", 0), (b"0:50", b"/mnt/b", b"/b.qed", 0))
    assert [(mount.mountpoint, mount.copies) for mount in qedfs_mounts(0, one)] == [
        ("/mnt", ("/copy",)),
        ("/mnt/b", ()),
    ]


def test_the_original_is_where_the_server_has_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    one = table((b"0:50", b"/copy", b"/a.qed", 0), (b"0:50", b"/mnt", b"/a.qed", 0))
    assert qedfs_mounts(0, one)[0].copies == ("/mnt",)
    monkeypatch.setattr("qedfs.cli.found_mounts.with_sockets", lambda places: {"/mnt"} & set(places))
    assert qedfs_mounts(0, one)[0][::4] == ("/mnt", ("/copy",))


def overlay(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """A complete overlay, and a folder to mount it on."""
    path, place = tmp_path / f"{name}.qed", tmp_path / name
    create_overlay(str(path), image_size=1 << 20, backing=None)
    place.mkdir()
    return path, place


def test_the_only_mount_need_not_be_named(tmp_path: Path) -> None:
    first, second = overlay(tmp_path, "first"), overlay(tmp_path, "second")
    with own_mounts() as inside:
        for command in ("status", "wait"):
            assert "this user has no mount" in inside.qedfs(command, code=10).stderr
        inside.qedfs("mount", *first, "--daemon")
        assert "first.raw" in inside.qedfs("status").stdout
        inside.qedfs("wait")
        # A copy is the same mount, wherever the table names it.
        (tmp_path / "copy").mkdir()
        inside.run("mount", "--bind", first[1], tmp_path / "copy").check_returncode()
        assert "first.raw" in inside.qedfs("status").stdout
        inside.qedfs("mount", *second, "--daemon")
        for words in (["status", "--watch"], ["wait", "--timeout", "1s"]):
            told = inside.qedfs(*words, code=2).stderr
            assert told == f"qedfs: this user has 2 mounts: {first[1]}, {second[1]}; name the one that you mean\n"
        # Never guessed: what ends a mount has to name it.
        assert "Missing argument 'MOUNTPOINT'" in inside.qedfs("umount", code=2).stderr
        inside.qedfs("umount", second[1])
