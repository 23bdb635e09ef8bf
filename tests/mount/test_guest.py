"""A Linux guest runs from the mounted image while it streams, and finds itself again afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import guest
from tests.harness.images import qemu_check, qemu_info, random_image
from tests.harness.mounts import mounted
from tests.harness.servers import nginx

from .support import MIB, create


@pytest.mark.parametrize("cache", ["none", pytest.param("writeback", marks=pytest.mark.slow)])
def test_a_guest_boots_checks_writes_and_is_there_again(tmp_path: Path, cache: str) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(4):
        random_image(files / f"data{number}", 3 * MIB + number, seed=number)
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
    console = guest.boot(f"file={overlay},format=qed")
    assert guest.VERIFIED in console
