"""A mount takes as many open files as it may have, and overlays leave some of them to the rest."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qedfs.host import descriptors
from tests.harness.images import random_image
from tests.harness.mounts import mounted
from tests.harness.process import wait_for
from tests.harness.require import require
from tests.harness.servers import nginx

from .support import MIB, create, origin


def test_the_soft_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    overlay = create(tmp_path / "disk.qed", "http://127.0.0.1:9/disk", "--offline", "--size", "1M")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        with mounted(overlay, tmp_path / "mnt", "--no-stream", own_interpreter=True) as mount:
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


def test_sources_count_too(tmp_path: Path) -> None:
    """Overlays on many sources: those that find no room wait for it, and everything else goes on meanwhile."""
    overlays, www = tmp_path / "overlays", tmp_path / "www"
    overlays.mkdir()
    www.mkdir()
    with nginx(www) as server:
        for number in range(60):
            random_image(www / f"{number}", MIB, seed=number)
            create(overlays / f"{number:02}.qed", f"{server.url}/{number}")
            shutil.copy(overlays / f"{number:02}.qed", overlays / f"{number:02}-too.qed")
        with mounted(
            overlays, tmp_path / "mnt", "--limit", "200K", through=[require("prlimit"), "--nofile=256:256"]
        ) as mount:
            served = [image["name"] for image in mount.status()["images"] if image["served"]]
            assert 20 < len(served) < 120
            for _ in range(20):
                assert set(served) <= set(os.listdir(mount.mountpoint))
                assert mount.status()["images"]
                for name in served:
                    with mount.path(name).open("rb") as image:
                        image.seek(MIB // 2)
                        assert len(image.read(4096)) == 4096
            assert len(os.listdir(f"/proc/{mount.pid}/fd")) <= 256 - 32
            assert "accept" not in mount.output()
            assert mount.unmount() == 0


def test_connections_follow_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in ((64, 2), (256, 2), (1024, 8), (8192, 64), (524288, 64), (resource.RLIM_INFINITY, 64)):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        assert descriptors.connections() == expected
        descriptors.check_room(0, 1)
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    descriptors.check_room(80, 30)
    for overlays, sources in ((500, 1), (1, 50), (250, 25)):
        with pytest.raises(OSError, match="Too many open files"):
            descriptors.check_room(overlays, sources)


def test_collections_pass_over_what_was_there_before_the_mount() -> None:
    program = "import gc; from qedfs.mount.memory import set_up; set_up(); print(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1000
