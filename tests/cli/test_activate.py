"""`qedfs activate`: what it asks the server, for one image and for all. The rest: `tests/mount/test_cut_over.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.mounts import Mount, mounted, qedfs
from tests.mount.support import create, origin


def states(mount: Mount) -> list[str]:
    return [image["state"] for image in mount.status()["images"]]


def test_all_images_of_a_folder_or_one_are_activated(tmp_path: Path) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    with origin(tmp_path, 1 << 20) as server:
        for name in ("a", "b"):
            create(folder / f"{name}.qed", server.url, "--standby")
        create(folder / "c.qed", server.url)
        with mounted(folder, tmp_path / "mnt", "--no-stream") as mount:
            assert states(mount) == ["standby", "standby", "off"]
            qedfs("activate", mount.mountpoint, "--dry-run")
            qedfs("activate", mount.mountpoint, "a")
            assert states(mount) == ["off", "standby", "off"]
            qedfs("activate", mount.mountpoint)
            qedfs("activate", mount.mountpoint)
            assert states(mount) == ["off"] * 3
            unknown = qedfs("activate", mount.mountpoint, "d", check=False)
            assert (unknown.returncode, "has no image d" in unknown.stderr) == (2, True)


@pytest.mark.parametrize("words", [("stream", "start"), ("stream", "step")])
def test_commands_that_would_keep_something_are_refused_in_standby(words: tuple[str, ...], tmp_path: Path) -> None:
    with origin(tmp_path, 1 << 20) as server:
        create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount:
            done = qedfs(*words, mount.mountpoint, check=False)
            assert (done.returncode, "in standby" in done.stderr) == (1, True)
            done = qedfs("wait", mount.mountpoint, "--timeout", "1s", check=False)
            assert (done.returncode, "in standby" in done.stderr, "is standby" in done.stderr) == (7, True, True)
            assert mount.image()["populated"] == 0
