"""`umount` in its plain form unmounts, and refuses, as with click."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.mounts import qedfs

from .support import daemon, in_mount_table, plain, with_click


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    place = tmp_path / "mnt"
    place.mkdir()
    qedfs("create", tmp_path / "disk.qed", "--size", "1M")
    return place


def test_a_mount_in_use_stays_and_one_that_is_not_goes(tmp_path: Path, mountpoint: Path) -> None:
    with daemon(tmp_path / "disk.qed", mountpoint):
        with (mountpoint / "disk.raw").open("rb"):
            assert plain("umount", mountpoint) == with_click("umount", mountpoint)
            assert in_mount_table(mountpoint)
        assert plain("umount", mountpoint) == (0, "", "")
        assert not in_mount_table(mountpoint)
