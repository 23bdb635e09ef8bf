"""A QED image as the backing, as `qemu-img create -b base.qed -F qed` makes it: mount, read, write, wait, unmount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.images import first_difference, qemu_check, qemu_info, qemu_same, random_image
from tests.harness.mounts import mounted, qedfs
from tests.harness.require import require_fuse
from tests.harness.servers import nbdkit, nginx
from tests.source.qcow2.support import qemu_img

MIB = 1 << 20


@contextmanager
def served_by(server: str, file: Path) -> Iterator[str]:
    if server == "nginx":
        with nginx(file.parent) as web:
            yield f"{web.url}/{file.name}"
    elif server == "nbdkit":
        with nbdkit("file", file, tcp=True) as running:
            yield running.url
    else:
        yield str(file)


@pytest.mark.parametrize("server", ["none", "nginx", "nbdkit"])
def test_the_bytes_of_the_disk_in_it(tmp_path: Path, server: str) -> None:
    require_fuse()
    www, overlay = tmp_path / "www", tmp_path / "disk.qed"
    www.mkdir()
    raw, base = random_image(tmp_path / "disk.raw", 24 * MIB), www / "base.qed"
    qemu_img("convert", "-f", "raw", "-O", "qed", raw, base)
    with served_by(server, base) as url:
        if server == "none":
            qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "qed", overlay)
        else:
            qedfs("create", overlay, "--backing", url)
        words = ("--allow-backing", www) if server == "none" else ()
        with mounted(overlay, tmp_path / "mnt", "--no-stream", *words) as mount:
            assert first_difference(mount.path("disk.raw"), raw) is None
            with mount.path("disk.raw").open("r+b") as file:
                os.pwrite(file.fileno(), b"written", 5 * MIB + 7)
            assert mount.unmount() == 0
        # The pin holds: the next mount compares the version, and goes on.
        with mounted(overlay, tmp_path / "mnt", *words) as mount:
            mount.wait()
            assert mount.unmount() == 0
    with raw.open("r+b") as file:
        os.pwrite(file.fileno(), b"written", 5 * MIB + 7)
    assert qemu_check(overlay) == (0, 0)
    assert "backing-filename" not in qemu_info(overlay)
    assert qemu_same(overlay, raw)
