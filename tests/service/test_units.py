"""The units: what systemd's own tools say of them, and what a real systemd does with them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.control.qmp.client import Client
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import Mount, mounted
from tests.harness.process import wait_for
from tests.harness.require import require
from tests.mount.outlives import wait_for_takeover, wait_until_serving
from tests.mount.support import MIB, assert_whole, create, origin

from .machine import CONTRIB, INSTALLED, UNITS, Machine, machine

# "Exposure" in tenths: 0 is a unit that may do nothing, 100 one without a single restriction. What mounts for others
# can have no view of the file system of its own, which is worth much of it.
MOST_EXPOSURE = {"qedfs@.service": 45, "qedfs-wait@.service": 20, "qedfs-end@.service": 20}
MOUNT = CONTRIB / "systemd" / "qedfs@.service"

NOBODY = 65534
UNNAMED = {"syscall_0x1c3": "cachestat"}  # what strace 6.1 (Debian 12) calls it


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as found:
        yield found


def settings(unit: Path) -> dict[str, list[str]]:
    """The settings of a unit, each as often as it stands there."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in unit.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found[key].append(value)
    return found


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text()
        assert INSTALLED in text
        # Another program that is there: verify looks for it.
        (tmp_path / unit.name.replace("@", "@vm1")).write_text(text.replace(INSTALLED, "/usr/bin/true"))
    done = subprocess.run(
        [require("systemd-analyze"), "verify", "--man=no", *sorted(tmp_path.iterdir())],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_them_hardened(unit: Path) -> None:
    threshold = f"--threshold={MOST_EXPOSURE[unit.name]}"
    words: list[str | Path] = [require("systemd-analyze"), "security", "--offline=yes", "--no-pager", threshold, unit]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_nothing_hides_the_mount_from_the_machine() -> None:
    """systemd.exec(5): each of these gives the service a mount namespace of its own."""
    apart = ("ProtectSystem", "ProtectHome", "ProtectProc", "ProtectKernel", "ProtectControlGroups", "ProtectHostname")
    private = ("PrivateTmp", "PrivateDevices", "PrivateMounts", "DynamicUser", "ReadOnlyPaths", "InaccessiblePaths")
    assert [key for key in settings(MOUNT) if key.startswith((*apart, *private))] == []


def test_a_mount_and_a_wait_for_it(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "new" / "a mnt"  # with a blank, and made by the unit
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        host.configure("vm1", overlay, mountpoint, "--limit 512M --allow-other")
        assert host.start("qedfs-wait@vm1.service") == 0, host.log()
        assert "complete" in host.qedfs("status", mountpoint).stdout
        assert host.path(mountpoint / "disk.raw").stat().st_size == 4 * MIB
        assert host.stop("qedfs@vm1.service") == 0
        assert host.state("qedfs@vm1.service") == "inactive"
        assert not host.is_mounted(mountpoint)
        assert_whole(overlay, source.raw)
    lines = [line for line in host.log().splitlines() if "INFO" not in line]
    assert lines == []  # an orderly stop is nothing to complain about


def test_another_user_passes_through_the_folders_that_the_unit_makes(host: Machine, tmp_path: Path) -> None:
    """A hypervisor's user, whose overlay it is."""
    mountpoint = Path("/srv/new/vm1")  # the machine's own: into pytest's folders nobody else may look
    with origin(tmp_path, 4 * MIB) as source:
        (tmp_path / "vms").mkdir(mode=0o711)  # whose mode the mount takes over
        overlay = create(tmp_path / "vms" / "disk.qed", source.url)
        overlay.chmod(0o600)
        os.chown(overlay, NOBODY, NOBODY)
        host.configure("vm1", overlay, mountpoint, "--allow-other")
        assert host.start("qedfs@vm1.service") == 0, host.log()
        other = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
        done = host.booted.run(*other, "sha256sum", mountpoint / "disk.raw")
        assert done.stdout.split()[:1] == [hashlib.sha256(source.data()).hexdigest()], done.stderr


def test_a_folder_that_is_there_keeps_its_mode(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir(mode=0o700)
    with origin(tmp_path, MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), mountpoint)
        assert host.start("qedfs@vm1.service") == 0, host.log()
    assert mountpoint.stat().st_mode & 0o777 == 0o700


def test_an_overlay_of_another_user_in_a_mount_that_ends_by_itself(host: Machine, tmp_path: Path) -> None:
    """Waiting for it later, too: systemd starts the mount anew, and that has nothing to do."""
    mountpoint = tmp_path / "a mnt"
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        overlay.chmod(0o600)
        os.chown(overlay, NOBODY, NOBODY)
        host.configure("vm1", overlay, mountpoint, "--until-streamed")
        for _ in range(2):
            host.stop("qedfs-wait@vm1.service")
            assert host.start("qedfs-wait@vm1.service") == 0, host.log()
            host.wait_for_state("qedfs@vm1.service", "inactive")
        assert_whole(overlay, source.raw)
    assert "nothing is mounted" not in host.log()


def test_a_stop_waits_for_whom_it_names_and_ends_well(host: Machine, tmp_path: Path) -> None:
    """As `qedfs umount` refuses: a stop cannot, but it can wait."""
    mountpoint = tmp_path / "mnt"
    with origin(tmp_path, 4 * MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), mountpoint)
        assert host.start("qedfs@vm1.service") == 0, host.log()
        host.add_unit("guest.service", f"[Service]\nExecStart=sh -c 'exec tail -f {mountpoint}/disk.raw >/dev/null'\n")
        assert host.start("guest.service") == 0
        guest = host.show("guest.service", "MainPID")
        wait_for(lambda: "(tail)" in host.qedfs("umount", mountpoint).stderr, "the guest to open its disk")
        host.systemctl("stop", "--no-block", "qedfs@vm1.service")
        wait_for(lambda: f"in use by pid {guest} (tail)" in host.log(), "the word of the stop")
        assert host.state("qedfs@vm1.service") == "deactivating"
        assert host.state("guest.service") == "active"
        host.stop("guest.service")
        host.wait_for_state("qedfs@vm1.service", "inactive")
    assert "still open" not in host.log()


def test_whoever_has_an_image_taken_away_is_told_of(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    with origin(tmp_path, 4 * MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), mountpoint)
        unit = host.folder / "units" / "qedfs@.service"
        text = unit.read_text()
        assert "--wait 90s" in text
        unit.write_text(text.replace("--wait 90s", "--wait 1s"))
        host.systemctl("daemon-reload")
        assert host.start("qedfs@vm1.service") == 0, host.log()
        image = os.open(host.path(mountpoint / "disk.raw"), os.O_RDONLY)
        try:
            host.stop("qedfs@vm1.service")
            with pytest.raises(OSError, match="not connected"):
                os.pread(image, 512, MIB)
        finally:
            with contextlib.suppress(OSError):  # close() is a question to the server, too
                os.close(image)
        assert host.state("qedfs@vm1.service") == "failed"
        assert not host.is_mounted(mountpoint)
    assert "disk.raw: still open; its users get errors from now on" in host.log()


def server_of(mount: Mount) -> int:
    """The process that serves it."""
    with Client.connect(str(mount.mountpoint)) as client:
        return client.server_pid


def test_every_system_call_of_a_mount_is_allowed_to_its_unit(tmp_path: Path) -> None:
    allowed = allowed_system_calls(MOUNT)
    trace = tmp_path / "trace"
    traced: list[str | Path] = [require("strace"), "-f", "-qq", "-o", trace]
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url.replace("127.0.0.1", "localhost"))
        with mounted(overlay, tmp_path / "mnt", "--restart", "--metrics", "127.0.0.1:0", through=traced) as mount:
            wait_until_serving(mount)
            with mount.path("disk.raw").open("r+b") as image:
                image.write(b"written")
                os.fsync(image.fileno())
                image.seek(2 * MIB)
                image.read(100_000)
            mount.wait()
            os.kill(server_of(mount), signal.SIGKILL)
            wait_for_takeover(mount, 1)
            os.kill(server_of(mount), signal.SIGTERM)
            assert mount.wait_exit() == 0
    used = {UNNAMED.get(name, name) for name in re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE)}
    assert {"mount", "umount2", "fdatasync", "connect"} <= used
    assert used - allowed == set()


def allowed_system_calls(unit: Path) -> set[str]:
    """Those of SystemCallFilter=, and the few that are always allowed (systemd.exec(5))."""
    words = [require("systemd-analyze"), "syscall-filter", "--no-pager"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    groups: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("@"):
            groups[line.strip()] = members = []
        elif line.startswith("    ") and not line.strip().startswith("#"):
            members.append(line.strip())

    def calls(name: str) -> set[str]:
        return set().union(*map(calls, groups[name])) if name.startswith("@") else {name}

    allowed = calls("@default")
    for setting in settings(unit)["SystemCallFilter"]:
        for name in setting.removeprefix("~").split():
            allowed = allowed - calls(name) if setting.startswith("~") else allowed | calls(name)
    return allowed


def test_a_mount_that_cannot_be_is_a_unit_that_fails(host: Machine, tmp_path: Path) -> None:
    host.configure("vm1", tmp_path / "missing.qed", tmp_path / "a mnt")
    assert host.start("qedfs@vm1.service") != 0
    assert host.state("qedfs@vm1.service") == "failed"
    assert host.show("qedfs@vm1.service", "ExecMainStatus") == "2"
    assert "missing.qed" in host.log()


def test_without_its_configuration_none_begins(host: Machine) -> None:
    """systemd says that an assertion failed, instead of one try after the other."""
    for number, name in enumerate(("qedfs", "qedfs-wait", "qedfs-end")):
        assert host.start(f"{name}@new{number}.service") != 0, name
        assert host.show(f"qedfs@new{number}.service", "AssertResult") == "no", name
        assert host.show(f"qedfs@new{number}.service", "NRestarts") == "0", name
    assert "usage" not in host.log().lower()


def test_after_a_crash_it_is_mounted_again(host: Machine, tmp_path: Path) -> None:
    mountpoint = tmp_path / "a mnt"
    with origin(tmp_path, 4 * MIB) as source:
        host.configure("vm1", create(tmp_path / "disk.qed", source.url), mountpoint, "--no-stream")
        assert host.start("qedfs@vm1.service") == 0, host.log()
        first = host.show("qedfs@vm1.service", "MainPID")
        host.systemctl("kill", "--signal", str(int(signal.SIGKILL)), "qedfs@vm1.service")
        wait_for(lambda: host.show("qedfs@vm1.service", "MainPID") not in ("0", first), "another server")
        host.wait_for_state("qedfs@vm1.service", "active")
        assert host.path(mountpoint / "disk.raw").read_bytes()[:4096] == source.data()[:4096]
