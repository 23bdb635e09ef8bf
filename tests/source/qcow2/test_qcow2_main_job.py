"""A cloud image as the backing: create, mount, read, wait, unmount; then the overlay stands alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.images import ext4_image, first_difference, qemu_check, qemu_info, qemu_same
from tests.harness.mounts import mounted, qedfs
from tests.harness.servers import nginx, qemu_nbd
from tests.source.qcow2.support import MiB, convert

PACKAGE = Path(__file__).parents[3] / "qedfs"


@pytest.mark.parametrize("server", ["nginx", "qemu-nbd"])
def test_compressed_qcow2_over_the_network(tmp_path: Path, server: str) -> None:
    www = tmp_path / "www"
    www.mkdir()
    raw = ext4_image(tmp_path / "disk.raw", 64 * MiB, PACKAGE)
    convert(raw, www / "disk.qcow2", compress=True)
    overlay = tmp_path / "disk.qed"
    # The server knows nothing of qcow2: it serves the file as it is.
    with nginx(www) if server == "nginx" else qemu_nbd(www / "disk.qcow2", tcp=True) as origin:
        url = f"{origin.url}/disk.qcow2" if server == "nginx" else origin.url
        qedfs("create", overlay, "--backing", url, "--backing-format", "qcow2")
        with mounted(overlay, tmp_path / "mnt") as mount:
            assert first_difference(mount.path("disk.raw"), raw) is None
            with mount.path("disk.raw").open("r+b") as file:
                os.pwrite(file.fileno(), b"written", 5 * MiB + 7)
            mount.wait()
            assert mount.unmount() == 0
    with raw.open("r+b") as file:
        os.pwrite(file.fileno(), b"written", 5 * MiB + 7)
    assert qemu_check(overlay) == (0, 0)
    assert "backing-filename" not in qemu_info(overlay)
    assert qemu_same(overlay, raw)
