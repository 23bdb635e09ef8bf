"""A Linux guest runs from the mounted image while it streams, and finds itself again afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import guest
from tests.harness.images import qemu_check, qemu_info, random_image
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require
from tests.harness.servers import nginx

from .support import MIB, create


@pytest.mark.parametrize(
    ("cache", "again"),
    [("none", False), *(pytest.param(cache, True, marks=pytest.mark.slow) for cache in ("none", "writeback"))],
)
def test_a_guest_boots_checks_writes_and_is_there_again(tmp_path: Path, cache: str, again: bool) -> None:
    """`again`: it also boots from the overlay itself; if not, what it would find there is read without it."""
    files = tmp_path / "files"
    files.mkdir()
    for number in range(4):
        random_image(files / f"data{number}", (MIB if not again else 3 * MIB) + number, seed=number)
    www = tmp_path / "www"
    www.mkdir()
    guest.guest_disk(www / "disk", 48 * MIB, files)
    overlay, mountpoint = tmp_path / "disk.qed", tmp_path / "mnt"
    with nginx(www) as server:
        create(overlay, f"{server.url}/disk")
        # Slow enough that the guest meets missing clusters.
        with mounted(overlay, mountpoint, "--limit", "2M") as mount:
            console = guest.boot(f"file={mount.path('disk.raw')},format=raw,cache={cache}")
            assert guest.VERIFIED in console
            assert guest.read_back(mount.path("disk.raw")) == guest.WRITTEN
            assert mount.unmount() == 0
        assert qemu_check(overlay) == (0, 0)
        with mounted(overlay, mountpoint) as mount:
            assert guest.read_back(mount.path("disk.raw")) == guest.WRITTEN
            mount.wait()
            assert mount.unmount() == 0
    assert qemu_check(overlay) == (0, 0)
    assert "backing-filename" not in qemu_info(overlay)
    # QEMU opens the overlay itself now, without us and without the server.
    if again:
        assert guest.VERIFIED in guest.boot(f"file={overlay},format=qed")
        return
    raw = tmp_path / "disk.raw"
    subprocess.run([require("qemu-img"), "convert", "-f", "qed", "-O", "raw", overlay, raw], check=True)
    for path in files.iterdir():
        assert guest.read_back(raw, path.name) == path.read_bytes()
    assert guest.read_back(raw) == guest.WRITTEN


@pytest.mark.parametrize("size", [96 * MIB, pytest.param(4096 * MIB, marks=pytest.mark.slow)])
def test_a_guest_trims_its_disk_early_and_the_free_space_is_not_fetched(tmp_path: Path, size: int) -> None:
    """At 5 % of the stream. The free space is random bytes at the source. QEMU passes the guest's discards on."""
    files = tmp_path / "files"
    files.mkdir()
    random_image(files / "data", 3 * MIB, seed=1)
    www = tmp_path / "www"
    www.mkdir()
    disk = guest.guest_disk(www / "disk", size, files)
    random_image(disk, size, seed=2)
    mkfs = [require("mkfs.ext4"), "-q", "-F", "-E", "nodiscard,lazy_itable_init=0", "-d", str(files), str(disk)]
    subprocess.run(mkfs, check=True)
    overlay = tmp_path / "disk.qed"
    with nginx(www) as server:
        create(overlay, f"{server.url}/disk")
        with mounted(overlay, tmp_path / "mnt", "--limit", str(size // 20)) as mount:
            wait_for(lambda: mount.image()["populated"] >= size // 20, "the first 5 % of the stream")
            qedfs("stream", "pause", mount.mountpoint)
            fetched = server.body_bytes()
            path = mount.path("disk.raw")
            drive = f"file={path},format=raw,cache=none,discard=unmap,detect-zeroes=unmap"
            assert guest.VERIFIED in guest.boot(drive, trim=True, timeout_seconds=400)
            free = guest.free_bytes(path)
            assert free > size * 0.7
            qedfs("stream", "limit", mount.mountpoint, "0")
            qedfs("stream", "resume", mount.mountpoint)
            mount.wait(timeout="10m")
            assert server.body_bytes() <= (size - free) * 1.05 + fetched
            assert guest.read_back(path) == guest.WRITTEN
            assert mount.unmount() == 0
    assert qemu_check(overlay).corruptions == 0
