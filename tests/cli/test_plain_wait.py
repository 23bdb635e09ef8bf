"""`wait` in its plain form does what it does with click."""

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


@pytest.mark.parametrize("images", [[], ["disk"], ["other"]])
def test_a_wait_at_a_mount(images: list[str], tmp_path: Path, mountpoint: Path) -> None:
    with daemon(tmp_path / "disk.qed", mountpoint):
        done = plain("wait", mountpoint, *images)
        assert done == with_click("wait", mountpoint, *images)
        assert done[0] == (2 if "other" in images else 0)
