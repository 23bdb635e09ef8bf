"""A machine that qedfs was installed on as the guide says: its units, and a systemd that runs them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.harness.process import wait_for
from tests.harness.require import require_fuse

from .booted import Booted, booted, put_units

ROOT = Path(__file__).parents[2]
CONTRIB = ROOT / "contrib"
INSTALLED = "/usr/local/bin/qedfs"
UNITS = (*sorted((CONTRIB / "systemd").glob("*.service")), *sorted((CONTRIB / "libvirt").glob("*.service")))
# What the services print. systemd's journal would be one more service to start.
LOG = "[Service]\nStandardOutput=append:{log}\nStandardError=append:{log}\n"


class Installed:
    """The files of an installation in a folder: bin/qedfs, the units in units/, /etc/qedfs in etc/."""

    def __init__(self, folder: Path, python_path: Path | None = None) -> None:
        """`python_path`: more modules for the program."""
        self.folder = folder
        for name in ("bin", "units", "etc"):
            (folder / name).mkdir(parents=True)
        program = folder / "bin" / "qedfs"
        # PYTHONPATH stands for an installation, whose bytecode was written when it was made.
        bytecode = f" PYTHONPYCACHEPREFIX={sys.pycache_prefix}" if sys.pycache_prefix else ""
        modules = f"{ROOT}:{python_path}" if python_path is not None else f"{ROOT}"
        environment = f"PYTHONPATH={modules} PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1{bytecode}"
        program.write_text(f'#!/bin/sh\n{environment} exec {sys.executable} -m qedfs "$@"\n')
        program.chmod(0o755)


class Machine(Installed):
    """An installation on a machine that runs."""

    def __init__(self, folder: Path, python_path: Path | None = None) -> None:
        super().__init__(folder, python_path)
        units = folder / "units"
        put_units(units)
        # As the guide copies them.
        shutil.copytree(CONTRIB / "systemd", units, dirs_exist_ok=True)
        for unit in (CONTRIB / "libvirt").glob("*.service"):
            shutil.copy(unit, units)
        (units / "service.d").mkdir()
        (units / "service.d" / "log.conf").write_text(LOG.format(log=folder / "log"))
        self.booted: Booted

    def configure(self, instance: str, source: Path, mountpoint: Path, options: str = "") -> None:
        """Write the configuration of qedfs@instance."""
        text = f"SOURCE={source}\nMOUNTPOINT={mountpoint}\n" + (f"OPTIONS={options}\n" if options else "")
        (self.folder / "etc" / f"{instance}.conf").write_text(text)

    def add_unit(self, name: str, text: str) -> None:
        """A unit of somebody else's, there from the next start of anything on."""
        path = self.folder / "units" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        self.systemctl("daemon-reload")

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command, in the machine."""
        return self.booted.run("systemctl", *words)

    def qedfs(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """The command, in the machine."""
        return self.booted.run(INSTALLED, *words)

    def start(self, unit: str) -> int:
        """The exit code of `systemctl start`."""
        return self.systemctl("start", unit).returncode

    def stop(self, unit: str) -> int:
        """The exit code of `systemctl stop`."""
        return self.systemctl("stop", unit).returncode

    def state(self, unit: str) -> str:
        """ "active", "inactive", "failed" ..."""
        return self.systemctl("is-active", unit).stdout.strip()

    def show(self, unit: str, key: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "--value", "-p", key, unit).stdout.strip()

    def wait_for_state(self, unit: str, state: str) -> None:
        """Wait until the unit is in a state."""
        wait_for(lambda: self.state(unit) == state, f"{unit} to be {state}")

    def path(self, inside: Path) -> Path:
        """A path of the machine, as it is reached from here: mounts are seen in there only."""
        return self.booted.path(inside)

    def outside(self, pid: int) -> int:
        """The number that a process of the machine has here."""
        return self.booted.outside(pid)

    def is_mounted(self, mountpoint: Path) -> bool:
        """Whether something is mounted there, in the machine."""
        return self.booted.run("mountpoint", "-q", mountpoint).returncode == 0

    def log(self) -> str:
        """What the services have printed."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def machine(shared: Path, *, python_path: Path | None = None) -> Iterator[Machine]:
    """A machine with qedfs on it that has come up. `shared`: a folder that it shares with the test.

    `python_path`: as for `Installed`.
    """
    require_fuse()
    found = Machine(shared / "machine", python_path)
    try:
        with booted(shared, found.folder) as found.booted:
            yield found
    except BaseException:
        print(f"log of the services:\n{found.log()}")
        raise
