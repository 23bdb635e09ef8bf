"""The units: what systemd's own tools say of them, and their commands on a real mount."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.mounts import qedfs
from tests.harness.process import wait_for
from tests.mount.support import MIB, assert_whole, create, origin

from .machine import CONTRIB, UNITS, Machine, machine
from .support import tool
from .systemctl import INSTALLED, Unit

# "Exposure" in tenths: 0 is a unit that may do nothing, 100 one without a single restriction. What mounts for others
# can have no view of the file system of its own, which is worth much of it.
MOST_EXPOSURE = {"qedfs@.service": 45, "qedfs-wait@.service": 20, "qedfs-end@.service": 30}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "machine", tmp_path / "a mnt") as found:
        yield found


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text()
        assert INSTALLED in text
        # Another program that is there: verify looks for it.
        (tmp_path / unit.name.replace("@", "@vm1")).write_text(text.replace(INSTALLED, "/usr/bin/true"))
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", *sorted(tmp_path.iterdir())],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_them_hardened(unit: Path) -> None:
    threshold = f"--threshold={MOST_EXPOSURE[unit.name]}"
    words = [tool("systemd-analyze"), "security", "--offline=yes", "--no-pager", threshold, unit]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_nothing_hides_the_mount_from_the_machine() -> None:
    """systemd.exec(5): each of these gives the service a mount namespace of its own."""
    unit = Unit("qedfs@vm1.service", CONTRIB / "systemd")
    apart = ("ProtectSystem", "ProtectHome", "ProtectProc", "ProtectKernel", "ProtectControlGroups", "ProtectHostname")
    private = ("PrivateTmp", "PrivateDevices", "PrivateMounts", "DynamicUser", "ReadOnlyPaths", "InaccessiblePaths")
    assert [key for key in unit.settings if key.startswith((*apart, *private))] == []


def test_the_commands_of_a_mount_and_of_waiting_for_it(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "a mnt"  # with a blank, and made by the unit
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        host.configure("vm1", overlay, mountpoint, "--limit 512M --allow-other")
        assert host.manager.start("qedfs-wait@vm1.service") == 0
        status = qedfs("status", mountpoint).stdout
        assert "complete" in status
        assert (mountpoint / "disk.raw").stat().st_size == 4 * MIB
        assert host.manager.stop("qedfs@vm1.service") == 0
        assert not os.path.ismount(mountpoint)
        assert "stopping on SIGTERM" in host.log()
        assert_whole(overlay, source.raw)


def test_a_mount_that_cannot_be_is_a_unit_that_fails(host: Machine, tmp_path: Path) -> None:
    host.configure("vm1", tmp_path / "missing.qed", tmp_path / "a mnt")
    assert host.manager.start("qedfs@vm1.service") == 2
    assert "missing.qed" in host.log()


def test_after_a_crash_nothing_is_in_the_way(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "a mnt"
    with origin(tmp_path, 4 * MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), mountpoint, "--no-stream")
        assert host.manager.start("qedfs@vm1.service") == 0
        pid = host.manager.pid("qedfs@vm1.service")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: _is_dead(mountpoint), "the end of the server")
        assert host.manager.stop("qedfs@vm1.service") == 0  # systemd runs ExecStopPost= by itself
        assert host.manager.start("qedfs@vm1.service") == 0
        assert (mountpoint / "disk.raw").read_bytes()[:4096] == source.data()[:4096]


def _is_dead(mountpoint: Path) -> bool:
    try:
        os.statvfs(mountpoint)
    except OSError:
        return True
    return False
