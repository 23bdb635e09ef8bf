"""libvirt's hook with the arguments that libvirt gives it, on a real mount; systemctl.py stands in for systemd."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.mounts import qedfs
from tests.harness.process import wait_for
from tests.mount.support import MIB, assert_whole, create, mounted_over, origin

from .machine import CONTRIB, Machine, machine

DOMAIN = CONTRIB / "libvirt" / "domain.xml"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "machine", tmp_path / "mnt") as found:
        yield found


def test_mounted_before_the_guest_and_until_the_images_are_complete(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    with origin(tmp_path, 8 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        host.configure("vm1", overlay, mountpoint, "--limit 4M")
        assert _hook(host, "prepare", "begin") == 0
        disk = mountpoint / "disk.raw"
        assert disk.exists()
        for operation in (("start", "begin"), ("started", "begin"), ("stopped", "end")):
            assert _hook(host, *operation) == 0
        assert _hook(host, "release", "end") == 0
        # Not complete yet: the mount stays, and a guest that comes back keeps it.
        wait_for(lambda: host.manager.pid("qedfs-end@vm1.service") is not None, "the wait for the end")
        server = host.manager.pid("qedfs@vm1.service")
        assert _hook(host, "prepare", "begin") == 0
        assert host.manager.pid("qedfs-end@vm1.service") is None
        assert host.manager.pid("qedfs@vm1.service") == server
        assert disk.exists()
        qedfs("stream", "limit", mountpoint, "0")
        qedfs("wait", mountpoint, "--timeout", "30s")
        assert _hook(host, "release", "end") == 0
        wait_for(lambda: host.manager.pid("qedfs@vm1.service") is None, "the end of the mount")
        assert not os.path.ismount(mountpoint)
        assert_whole(overlay, source.raw)


def test_a_guest_whose_disk_cannot_be_mounted_does_not_start(host: Machine, tmp_path: Path) -> None:
    host.configure("vm1", tmp_path / "missing.qed", tmp_path / "mnt")
    assert _hook(host, "prepare", "begin") != 0


@pytest.mark.parametrize("guest", ["other", "", "../vm1", "a guest"])
def test_other_guests_are_none_of_its_business(host: Machine, tmp_path: Path, guest: str) -> None:
    host.configure("vm1", tmp_path / "missing.qed", tmp_path / "mnt")
    assert _hook(host, "prepare", "begin", guest=guest) == 0
    assert list((host.folder / "state").iterdir()) == []


def test_the_domain_has_the_mounted_file_as_a_raw_disk() -> None:
    disk = ET.parse(DOMAIN).getroot().find("devices/disk")
    assert disk is not None
    driver, source = disk.find("driver"), disk.find("source")
    assert driver is not None
    assert source is not None
    assert (disk.get("type"), driver.get("type"), driver.get("cache")) == ("file", "raw", "none")
    assert source.get("file") == "/srv/qedfs/vm1/disk.raw"
    seclabel = source.find("seclabel")
    assert seclabel is not None
    assert seclabel.get("relabel") == "no"


def test_a_mounted_image_keeps_its_owner(tmp_path: Path) -> None:
    """Why the domain says relabel="no": libvirt would give the disk away, and fail."""
    with (
        origin(tmp_path, MIB) as source,
        mounted_over(tmp_path, source.url) as mount,
        pytest.raises(OSError, match=r"permitted|not supported|not implemented"),
    ):
        os.chown(mount.path("disk.raw"), 12345, 12345)


def _hook(host: Machine, operation: str, suboperation: str, *, guest: str = "vm1") -> int:
    environment = {"PATH": f"{host.bin}:{os.defpath}", "QEDFS_CONFIG": str(host.folder / "etc")}
    with DOMAIN.open() as xml:
        words: list[str | Path] = [CONTRIB / "libvirt" / "qemu", guest, operation, suboperation, "-"]
        return subprocess.run(words, env=environment, stdin=xml, timeout=60, check=False).returncode
