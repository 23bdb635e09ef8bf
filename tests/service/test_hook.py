"""libvirt's hook with the arguments that libvirt gives it, under a real systemd."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.hang import HANG_OPTION
from tests.harness.process import wait_for
from tests.mount.support import MIB, assert_whole, create, mounted_over, origin

from .machine import CONTRIB, Machine, machine

DOMAIN = CONTRIB / "libvirt" / "domain.xml"
MOUNT, END = "qedfs@vm1.service", "qedfs-end@vm1.service"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as found:
        yield found


def test_mounted_before_the_guest_and_until_the_images_are_complete(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    with origin(tmp_path, 8 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        host.configure("vm1", overlay, mountpoint, "--no-stream")
        assert _hook(host, "prepare", "begin") == 0
        assert host.path(mountpoint / "disk.raw").exists()
        for operation in (("start", "begin"), ("started", "begin"), ("stopped", "end")):
            assert _hook(host, *operation) == 0
        assert _hook(host, "release", "end") == 0
        # Not complete yet: the mount stays, and a guest that comes back keeps it.
        host.wait_for_state(END, "activating")
        server = host.show(MOUNT, "MainPID")
        assert _hook(host, "prepare", "begin") == 0
        assert host.state(END) == "inactive"  # and not "failed"
        assert host.show(MOUNT, "MainPID") == server
        assert host.path(mountpoint / "disk.raw").exists()
        host.qedfs("stream", "start", mountpoint)
        host.qedfs("wait", mountpoint, "--timeout", HANG_OPTION)
        assert _hook(host, "release", "end") == 0
        host.wait_for_state(MOUNT, "inactive")
        host.wait_for_state(END, "inactive")
        assert not host.is_mounted(mountpoint)
        assert_whole(overlay, source.raw)
    assert "nothing is mounted" not in host.log()


def test_a_mount_whose_image_somebody_else_reads_does_not_end(host: Machine, tmp_path: Path) -> None:
    """A backup, say."""
    mountpoint = tmp_path / "mnt"
    with origin(tmp_path, MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), mountpoint)
        assert _hook(host, "prepare", "begin") == 0
        with host.path(mountpoint / "disk.raw").open("rb"):
            assert _hook(host, "release", "end") == 0
            wait_for(lambda: "disk.raw is open" in host.log(), "the word of the wait")
            assert host.state(MOUNT) == "active"
        host.wait_for_state(MOUNT, "inactive")


def test_a_mount_that_was_stopped_under_its_guest_stays_so(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    with origin(tmp_path, MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), mountpoint)
        assert _hook(host, "prepare", "begin") == 0
        with host.path(mountpoint / "disk.raw").open("rb"):
            host.systemctl("stop", "--no-block", MOUNT)
            wait_for(lambda: "in use" in host.log(), "the word of the stop")
            assert _hook(host, "release", "end") == 0
        wait_for(lambda: host.systemctl("list-jobs", "--no-legend").stdout == "", "the end of all jobs")
    assert host.log().count("INFO serving") == 1


def test_a_guest_may_be_restarted_as_often_as_it_likes(host: Machine, tmp_path: Path) -> None:
    with origin(tmp_path, MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), tmp_path / "mnt")
        unit = host.folder / "units" / "qedfs@.service"
        unit.write_text(re.sub("StartLimitBurst=.*", "StartLimitBurst=1", unit.read_text()))
        host.systemctl("daemon-reload")
        for _ in range(2):
            assert _hook(host, "prepare", "begin") == 0, host.log()
            assert _hook(host, "release", "end") == 0
            host.wait_for_state(MOUNT, "inactive")
        host.wait_for_state(END, "inactive")


def test_a_guest_whose_disk_cannot_be_mounted_does_not_start(host: Machine, tmp_path: Path) -> None:
    host.configure("vm1", tmp_path / "missing.qed", tmp_path / "mnt")
    assert _hook(host, "prepare", "begin") != 0


def test_other_guests_are_none_of_its_business(host: Machine, tmp_path: Path) -> None:
    host.configure("vm1", tmp_path / "missing.qed", tmp_path / "mnt")
    for guest in ("other", "", "../vm1", "a guest"):
        assert _hook(host, "prepare", "begin", guest=guest) == 0, guest
    assert host.systemctl("list-units", "--all", "--plain", "--no-legend", "qedfs*").stdout == ""


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
    hook = CONTRIB / "libvirt" / "qemu"
    return host.booted.run(hook, guest, operation, suboperation, "-", text=DOMAIN.read_text()).returncode
