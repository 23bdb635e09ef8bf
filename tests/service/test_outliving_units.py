"""The unit of a mount that outlives its server, under a real systemd: crashes, hangs, the OOM killer, upgrades."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.cgroup import limited
from tests.harness.process import wait_for
from tests.mount.outlives import servers
from tests.mount.support import MIB, create, opened, origin

from .machine import Machine, machine

UNIT = "qedfs@vm1.service"
SPINS, EATS = signal.SIGWINCH, signal.SIGURG
# What a bug may do to a server: its event loop never comes back, or it takes all memory.
ILL = """
import signal
def spin(*_):
    while True:
        pass
def eat(*_):
    taken = []
    while True:
        taken.append(b"x" * (1 << 20))
signal.signal(signal.SIGWINCH, spin)
signal.signal(signal.SIGURG, eat)
"""
MEMORY = 160 * MIB
WATCHDOG = "[Service]\nWatchdogSec=4s\nRestartSec=0\n"
# A busy machine may let the watchdog bite more often than the test does.
OPTIONS = "--restart --most-deaths 100 --no-stream"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "ill").mkdir()
    (tmp_path / "ill" / "sitecustomize.py").write_text(ILL)
    with machine(tmp_path, python_path=tmp_path / "ill") as found:
        yield found


def holder(host: Machine) -> int:
    """The unit's main process, by its number outside of the machine."""
    return host.outside(int(host.show(UNIT, "MainPID")))


def harm(main: int, number: int) -> None:
    """Send a signal to the server, and wait for the next one."""
    (server,) = servers(main)
    os.kill(server, number)
    wait_for(lambda: servers(main) not in ([], [server]), f"another server after signal {number}")


def test_whatever_becomes_of_the_server_readers_go_on(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    with origin(tmp_path, 4 * MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), mountpoint, OPTIONS)
        host.add_unit(f"{UNIT}.d/watchdog.conf", WATCHDOG)
        assert host.start(UNIT) == 0, host.log()
        main = holder(host)
        with limited(MEMORY) as group:
            for process in (main, *servers(main)):
                (group / "cgroup.procs").write_text(str(process))
            with opened(host.path(mountpoint / "disk.raw")) as fd:
                for count, number in enumerate((signal.SIGKILL, signal.SIGSTOP, SPINS, EATS)):
                    harm(main, number)
                    assert os.pread(fd, 5000, count * MIB) == source.data()[count * MIB : count * MIB + 5000]
            assert holder(host) == main
            assert (host.state(UNIT), host.show(UNIT, "NRestarts")) == ("active", "0")
            assert host.log().count("has been silent for") >= 2  # the stopped one, and the one that spun
            # Only the manager can see that the holder itself hangs, and that ends the mount.
            os.kill(main, signal.SIGSTOP)
            wait_for(lambda: host.show(UNIT, "NRestarts") == "1", "the manager's watchdog")
            host.wait_for_state(UNIT, "active")
            assert host.path(mountpoint / "disk.raw").read_bytes() == source.data()
            assert host.stop(UNIT) == 0
        assert host.state(UNIT) == "inactive"
        assert not host.is_mounted(mountpoint)


def test_a_reload_is_an_upgrade_and_a_restart_is_another_mount(host: Machine, tmp_path: Path) -> None:
    mountpoint, keys = tmp_path / "mnt", tmp_path / "keys"
    keys.touch(mode=0o600)
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        host.configure("vm1", overlay, mountpoint, f"--restart --no-stream --credentials {keys}")
        assert host.start(UNIT) == 0, host.log()
        main = holder(host)
        first = servers(main)
        with opened(host.path(mountpoint / "disk.raw")) as fd:
            os.pwrite(fd, b"before", 0)
            assert host.systemctl("reload", UNIT).returncode == 0, host.log()
            second = servers(main)
            assert second not in ([], first)
            os.pwrite(fd, b"after", MIB)
            keys.unlink()
            assert host.systemctl("reload", UNIT).returncode != 0
            assert "the new server could not start, so the old one serves on" in host.log()
            assert (host.state(UNIT), holder(host), servers(main)) == ("active", main, second)
            expected = b"before" + source.data()[6:MIB] + b"after" + source.data()[MIB + 5 :]
            assert os.pread(fd, 4 * MIB, 0) == expected
        keys.touch(mode=0o600)
        assert host.systemctl("restart", UNIT).returncode == 0, host.log()
        assert holder(host) != main
        assert host.path(mountpoint / "disk.raw").read_bytes() == expected
        assert host.stop(UNIT) == 0
        assert host.state(UNIT) == "inactive"
