"""Which disk moves, as a real QEMU tells it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.cli.migration.moved_disk import MovedDisk, disk_meant, has_disk_on
from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import UsageError
from tests.harness.images import sparse_image
from tests.harness.migration.bare import bare
from tests.harness.require import require

SIZE = 1 << 20


@contextlib.contextmanager
def monitor(*arguments: str) -> Iterator[QemuClient]:
    with bare(*arguments) as qemu, QemuClient.at(qemu.monitor) as client:
        yield client


def test_the_only_writable_disk_of_a_guest(tmp_path: Path) -> None:
    disk = sparse_image(tmp_path / "disk.raw", SIZE)
    cdrom = sparse_image(tmp_path / "cdrom", SIZE)
    arguments = ["-drive", f"if=virtio,file={disk},format=raw", "-cdrom", str(cdrom)]
    with monitor(*arguments) as client:
        found = disk_meant(client, None)
        assert found.path == str(disk)
        assert (found.driver, found.size) == ("raw", SIZE)
        assert has_disk_on(client, "disk.raw")
        assert not has_disk_on(client, "k.raw")
        assert not has_disk_on(client, "disk")


def test_one_of_two_disks_is_named_as_qemu_names_it(tmp_path: Path) -> None:
    one = sparse_image(tmp_path / "one.raw", SIZE)
    two = tmp_path / "two.qcow2"
    subprocess.run([require("qemu-img"), "create", "-q", "-f", "qcow2", two, str(SIZE)], check=True)
    arguments = [
        *("-drive", f"if=none,id=first,file={one},format=raw", "-device", "virtio-blk-pci,drive=first,id=disk0"),
        *("-blockdev", f"driver=file,node-name=file,filename={two},auto-read-only=on"),
        *("-blockdev", "driver=qcow2,node-name=second,file=file", "-device", "virtio-blk-pci,drive=second"),
    ]
    with monitor(*arguments) as client:
        assert disk_meant(client, "first").path == disk_meant(client, "disk0").path == str(one)
        second = disk_meant(client, "second")
        assert second == MovedDisk(second.names, str(two), "qcow2", SIZE)
        with pytest.raises(UsageError, match=r"has not one writable disk: first, .*say with --disk which one moves"):
            disk_meant(client, None)
        with pytest.raises(UsageError, match="has no writable disk third; there is first"):
            disk_meant(client, "third")


def test_a_disk_whose_file_is_on_another_host(tmp_path: Path) -> None:
    disk = sparse_image(tmp_path / "disk.raw", SIZE)
    with monitor("-drive", f"if=virtio,file={disk},format=raw") as client:
        disk.unlink()
        with pytest.raises(UsageError, match="runs on the host whose QEMU has this disk"):
            disk_meant(client, None)


def test_a_disk_whose_file_qemu_does_not_tell(tmp_path: Path) -> None:
    disk = sparse_image(tmp_path / "disk.raw", SIZE)
    drive = f"if=virtio,driver=raw,file.driver=blkdebug,file.image.filename={disk},file.align=512"
    with monitor("-drive", drive) as client:
        with pytest.raises(UsageError, match=r"does not tell the file of its disk .*; say it with --file"):
            disk_meant(client, None)
        assert disk_meant(client, None, str(disk)).path == str(disk)
