"""A mount takes as many open files as it may have, and overlays leave some of them to the rest."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from tests.harness.mounts import mounted
from tests.harness.process import wait_for
from tests.harness.require import require

from .support import MIB, create, origin


def test_the_soft_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    overlay = create(tmp_path / "disk.qed", "http://127.0.0.1:9/disk", "--size", "1M")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            assert resource.prlimit(mount.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_overlays_beyond_the_limit_cost_themselves_only(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with origin(tmp_path, MIB) as source:
        first = create(overlays / "000.qed", source.url)
        for number in range(1, 100):
            shutil.copy(first, overlays / f"{number:03}.qed")
        with mounted(overlays, tmp_path / "mnt", "--no-stream", through=[require("prlimit"), "--nofile=128"]) as mount:
            images = mount.status()["images"]
            left_out = [image["overlay"] for image in images if not image["served"]]
            assert 0 < len(left_out) < len(images)
            assert all("Too many open files" in image["error"] for image in images if not image["served"])
            assert mount.path("000.raw").read_bytes() == source.data()  # there is one left for a connection
            for number in range(20):
                os.unlink(overlays / f"{number:03}.qed")
            wait_for(lambda: mount.path(f"{left_out[0][-7:-4]}.raw").exists(), "the first that was left out")
            assert mount.unmount() == 0
