"""`status` in its plain form says what it says with click."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.mounts import qedfs

from .support import daemon, plain, with_click


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    place = tmp_path / "mnt"
    place.mkdir()
    qedfs("create", tmp_path / "disk.qed", "--size", "1M")
    return place


def test_the_status_of_a_mount(tmp_path: Path, mountpoint: Path) -> None:
    with daemon(tmp_path / "disk.qed", mountpoint):
        assert plain("status", mountpoint) == with_click("status", mountpoint)
        assert "disk.raw" in plain("status", mountpoint)[1]
