"""The units: what systemd's own tools say of them, and their commands on a real mount."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.control.client import Client
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require
from tests.mount.support import MIB, assert_whole, create, origin

from .machine import CONTRIB, UNITS, Machine, machine
from .support import tool
from .systemctl import INSTALLED, Unit

# "Exposure" in tenths: 0 is a unit that may do nothing, 100 one without a single restriction. What mounts for others
# can have no view of the file system of its own, which is worth much of it.
MOST_EXPOSURE = {"qedfs@.service": 45, "qedfs-wait@.service": 20, "qedfs-end@.service": 20}


NOBODY = 65534


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
    words: list[str | Path] = [tool("systemd-analyze"), "security", "--offline=yes", "--no-pager", threshold, unit]
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


def test_an_overlay_of_another_user_in_a_mount_that_ends_by_itself(host: Machine, tmp_path: Path) -> None:
    """Waiting for it later, too: systemd starts the mount anew, and that has nothing to do."""
    mountpoint = tmp_path / "a mnt"
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        overlay.chmod(0o600)
        os.chown(overlay, NOBODY, NOBODY)
        host.configure("vm1", overlay, mountpoint, "--until-streamed")
        for _ in range(2):
            assert host.manager.start("qedfs-wait@vm1.service") == 0, host.log()
            wait_for(lambda: not os.path.ismount(mountpoint), "the end of the mount")
        assert_whole(overlay, source.raw)


def test_every_system_call_of_a_mount_is_allowed_to_its_unit(tmp_path: Path) -> None:
    allowed = allowed_system_calls(Unit("qedfs@vm1.service", CONTRIB / "systemd"))
    trace = tmp_path / "trace"
    traced: list[str | Path] = [require("strace"), "-f", "-qq", "-o", trace]
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url.replace("127.0.0.1", "localhost"))
        with mounted(overlay, tmp_path / "mnt", "--metrics", "127.0.0.1:0", through=traced) as mount:
            with mount.path("disk.raw").open("r+b") as image:
                image.write(b"written")
                os.fsync(image.fileno())
                image.seek(2 * MIB)
                image.read(100_000)
            mount.wait()
            with Client.connect(str(mount.mountpoint)) as client:
                server = client.server_pid
            os.kill(server, signal.SIGTERM)
            assert mount.wait_exit() == 0
    used = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    assert {"mount", "umount2", "fdatasync", "connect"} <= used
    assert used - allowed == set()


def allowed_system_calls(unit: Unit) -> set[str]:
    """Those of SystemCallFilter=, and the few that are always allowed (systemd.exec(5))."""
    words = [tool("systemd-analyze"), "syscall-filter", "--no-pager"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    groups: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("@"):
            groups[line.strip()] = members = []
        elif line.startswith("    ") and not line.strip().startswith("#"):
            members.append(line.strip())

    def calls(name: str) -> set[str]:
        return set().union(*map(calls, groups[name])) if name.startswith("@") else {name}

    allowed = calls("@default")
    for setting in unit.settings["SystemCallFilter"]:
        for name in setting.removeprefix("~").split():
            allowed = allowed - calls(name) if setting.startswith("~") else allowed | calls(name)
    return allowed


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
