"""kill -9 of qedfs in the middle of writes and stream: every write that returned is there, all else is the origin."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.harness.images import qemu_check, qemu_info, qemu_same

from .kills import Overlay, kill_once
from .support import MIB, create, mounted_over, origin


@pytest.mark.parametrize("seed", range(2))
def test_kills(tmp_path: Path, seed: int) -> None:
    """Two kills of one overlay: the second finds what the first has left. The limit lets them hit the stream."""
    with origin(tmp_path, 24 * MIB, seed=seed) as source:
        overlay = create(tmp_path / "disk.qed", source.url, "--cluster-size", ("64K", "4K")[seed % 2])
        expected = Path(shutil.copy(source.raw, tmp_path / "expected"))
        target = Overlay(overlay, expected, tmp_path / "mnt")
        for round_ in range(2):
            kill_once(target, 100 * seed + round_, "--limit", "16M")
        with mounted_over(tmp_path, source.url) as mount:
            mount.wait()
            assert mount.unmount() == 0
    # A kill may leave leaks, nothing else.
    assert qemu_check(overlay).corruptions == 0
    assert "backing-filename" not in qemu_info(overlay)
    assert qemu_same(overlay, expected)
