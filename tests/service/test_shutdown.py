"""The end of the machine: whoever runs on an image ends first, and what it writes until then is kept."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.mounts import qedfs
from tests.harness.process import wait_for
from tests.mount.support import MIB, create, origin

from .machine import CONTRIB, Machine, machine

MOUNT = "qedfs@vm1.service"
SECTORS = 20
# Told to end, it writes on for a while, each time down to the disk, as a guest does that shuts down.
GUEST = f"""
import os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
disk = os.open(sys.argv[1], os.O_RDWR)
open(sys.argv[2], "w").close()
if "--wait" in sys.argv:
    signal.sigwait([signal.SIGTERM])
for number in range({SECTORS}):
    os.pwrite(disk, b"last write".ljust(4096, b"."), number * 4096)
    os.fsync(disk)
    time.sleep(0.1)
"""
# The dependencies that libvirt and systemd-logind give to the scopes that they make.
SCOPES = {
    r"machine-qemu\x2d1\x2dvm1.scope": ("--slice=machine.slice", "-pBefore=virt-guest-shutdown.target"),
    "session-1.scope": ("--slice=user.slice", "-pAfter=systemd-user-sessions.service"),
}


FSTAB = "[Mount]\nWhat={source}\nWhere={mountpoint}\nType=qedfs\nOptions=_netdev,nofail,limit=512M\n"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as found, origin(tmp_path, 4 * MIB) as source:
        found.configure("vm1", create(tmp_path / "disk.qed", source.url), tmp_path / "mnt")
        (tmp_path / "guest.py").write_text(GUEST)
        yield found


@pytest.mark.parametrize("scope", SCOPES)
def test_a_guest_keeps_its_disk_while_it_ends(host: Machine, tmp_path: Path, scope: str) -> None:
    assert host.start(MOUNT) == 0, host.log()
    _start_guest(host, tmp_path, scope)
    _assert_the_last_write_is_kept(host, tmp_path)


def test_a_guest_on_a_mount_of_fstab_keeps_it_while_it_ends(host: Machine, tmp_path: Path) -> None:
    """The unit is what systemd-fstab-generator(8) makes of a line."""
    host.booted.run("ln", "-s", CONTRIB / "mount.qedfs", "/sbin/mount.qedfs")
    mountpoint = tmp_path / "mnt"
    name = host.booted.run("systemd-escape", "--path", "--suffix=mount", mountpoint).stdout.strip()
    host.add_unit(name, FSTAB.format(source=tmp_path / "disk.qed", mountpoint=mountpoint))
    assert host.start(name) == 0, host.log()
    _start_guest(host, tmp_path, next(iter(SCOPES)))
    _assert_the_last_write_is_kept(host, tmp_path)


def _start_guest(host: Machine, tmp_path: Path, scope: str) -> None:
    words = ["systemd-run", "--scope", f"--unit={scope}", *SCOPES[scope], *_guest(tmp_path), "--wait"]
    host.booted.run("sh", "-c", f"{shlex.join(words)} >/dev/null 2>{shlex.quote(str(tmp_path / 'error'))} &")
    wait_for((tmp_path / "up").exists, "the guest")
    assert host.state(scope) == "active"


def test_libvirt_guests_finds_the_disks_of_the_guests_that_it_shuts_down(host: Machine, tmp_path: Path) -> None:
    service = f"Type=oneshot\nRemainAfterExit=yes\nExecStart=true\nExecStop={shlex.join(_guest(tmp_path))}\n"
    host.add_unit("libvirt-guests.service", f"[Service]\n{service}")
    assert host.start(MOUNT) == 0, host.log()
    assert host.start("libvirt-guests.service") == 0
    _assert_the_last_write_is_kept(host, tmp_path)
    assert (tmp_path / "up").exists()


def _guest(folder: Path) -> list[str]:
    return [sys.executable, str(folder / "guest.py"), str(folder / "mnt" / "disk.raw"), str(folder / "up")]


def _assert_the_last_write_is_kept(host: Machine, folder: Path) -> None:
    host.booted.power_off()
    # That the mount waits for whoever has an image open, for a while, would hide that it does not come last.
    assert "in use" not in host.log()
    assert "still open" not in host.log()
    qedfs("export", folder / "disk.qed", folder / "disk.raw")
    with (folder / "disk.raw").open("rb") as image:
        assert image.read(SECTORS * 4096) == SECTORS * b"last write".ljust(4096, b".")
