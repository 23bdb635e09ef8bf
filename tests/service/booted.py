"""A real systemd as process 1 of namespaces of its own, over this machine's files; what it may start is given to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.hang import HANG_SECONDS
from tests.harness.process import Child, wait_for
from tests.harness.require import require, require_root, unavailable

SCRIPT = Path(__file__).with_name("boot.sh")
UNIT_FOLDERS = (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
# What a service needs to be started, and the machine to be switched off. Their own wishes (*.wants/) stay behind.
TARGETS = (
    *("basic.target", "final.target", "local-fs.target", "multi-user.target", "network-online.target"),
    *("network.target", "poweroff.target", "remote-fs.target", "shutdown.target", "sysinit.target", "umount.target"),
    *("systemd-poweroff.service", "systemd-user-sessions.service"),
)
WANTED = ("remote-fs.target", "systemd-user-sessions.service")
COMMAND_SECONDS = HANG_SECONDS


class Booted:
    """A machine that runs. Its files are seen from outside through `path`."""

    def __init__(self, child: Child, init: int) -> None:
        self._child = child
        self._init = init

    def path(self, inside: Path) -> Path:
        """A path of the machine as it is reached from outside, mounts included."""
        return Path(f"/proc/{self._init}/root{inside}")

    def outside(self, pid: int) -> int:
        """The number that a process of the machine has here (NSpid in proc(5))."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                numbers = status.read_text().partition("NSpid:")[2].splitlines()[0].split()
                if numbers[-1] == str(pid) and len(numbers) > 1 and self._has(int(numbers[0])):
                    return int(numbers[0])
        raise LookupError(f"the machine has no process {pid}")

    def _has(self, pid: int) -> bool:
        """Whether a process, by its number here, is one of the machine."""
        return Path(f"/proc/{pid}/ns/pid").readlink() == Path(f"/proc/{self._init}/ns/pid").readlink()

    def run(
        self, *words: str | Path, seconds: float = COMMAND_SECONDS, env: dict[str, str] | None = None, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it, with the environment of a service; `text` is its standard input."""
        usual = {"PATH": os.defpath + ":/usr/local/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
        enter: list[str | Path] = [require("nsenter"), "-t", str(self._init), "-m", "-p", "-C", "-u", "-i", "-r", "-w"]
        return subprocess.run(
            [*enter, *words],
            env={**usual, **(env or {})},
            input=text,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def power_off(self, seconds: float = COMMAND_SECONDS) -> None:
        """Switch it off in order, as `systemctl poweroff` does, and wait for the end."""
        self.run("systemctl", "poweroff", "--no-block")
        self._child.wait(seconds)


def put_units(folder: Path) -> None:
    """Copy systemd's own units that any service stands on."""
    source = next((found for found in UNIT_FOLDERS if (found / TARGETS[0]).exists()), None)
    if source is None:
        unavailable("needs systemd's units; contrib/setup installs them")
    wants = folder / "multi-user.target.wants"
    wants.mkdir(parents=True)
    for name in TARGETS:
        shutil.copy(source / name, folder)
    for name in WANTED:
        (wants / name).symlink_to(f"../{name}")


@contextlib.contextmanager
def booted(shared: Path, folder: Path) -> Iterator[Booted]:
    """A machine that has come up. The folders: see boot.sh. At the end it is killed with all that runs in it."""
    require_root()
    for tool in ("unshare", "nsenter", "pivot_root", "systemctl"):
        require(tool)
    work = Path(tempfile.mkdtemp(prefix="qedfs-boot-"))
    apart = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
    child = Child([require("unshare"), *apart, "sh", SCRIPT, work, shared, folder], folder / "boot.log")
    try:
        child.wait_until(lambda: _init(child.pid) is not None, "systemd")
        init = _init(child.pid)
        assert init is not None
        machine = Booted(child, init)
        wait_for(lambda: _is_up(machine), "the machine to come up")
        yield machine
    finally:
        child.kill()
        # Its namespace ends with it, but not at the same moment.
        wait_for(lambda: _remove_cgroup(work), "the end of all that ran in the machine")
        shutil.rmtree(work)


def _init(unshare: int) -> int | None:
    """The process that is systemd."""
    try:
        (child,) = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        return int(child) if Path(f"/proc/{child}/comm").read_text().strip() == "systemd" else None
    except (OSError, ValueError):
        return None


def _is_up(machine: Booted) -> bool:
    return machine.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")


def _remove_cgroup(work: Path) -> bool:
    """Whether the groups are gone: they stay when their processes end, and are seen only where they are mounted."""
    script = """
        mount -t cgroup2 cgroup2 "$1"
        [ ! -d "$1/$2" ] || find "$1/$2" -depth -type d -exec rmdir {} +
        [ ! -d "$1/$2" ]
    """
    place = work / "cgroup"
    place.mkdir(exist_ok=True)
    unshare = (require("unshare"), "--mount", "sh", "-c", script, "sh")
    words: list[str | Path] = [*unshare, place, f"qedfs-test-{work.name}"]
    return subprocess.run(words, check=False, capture_output=True, timeout=COMMAND_SECONDS).returncode == 0
