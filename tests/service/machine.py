"""A machine that qedfs was installed on as the README says, in a folder: programs, units, their configuration."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.harness.require import require, require_fuse, require_root

from .systemctl import Manager

ROOT = Path(__file__).parents[2]
CONTRIB = ROOT / "contrib"
UNITS = (*sorted((CONTRIB / "systemd").glob("*.service")), *sorted((CONTRIB / "libvirt").glob("*.service")))


class Machine:
    """Programs in bin/, the units of contrib/ in units/, /etc/qedfs in etc/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.manager = Manager(folder)
        for name in ("bin", "units", "etc", "state"):
            (folder / name).mkdir(parents=True)
        for unit in UNITS:
            shutil.copy(unit, folder / "units")
        environment = f"PYTHONPATH={ROOT} PYTHONSAFEPATH=1"
        self._program("qedfs", f'{environment} exec {sys.executable} -m qedfs "$@"')
        self._program("systemctl", f'{environment} exec {sys.executable} -m tests.service.systemctl {folder} "$@"')

    def configure(self, instance: str, source: Path, mountpoint: Path, options: str = "") -> None:
        """Write the configuration of qedfs@instance."""
        text = f"SOURCE={source}\nMOUNTPOINT={mountpoint}\n" + (f"OPTIONS={options}\n" if options else "")
        (self.folder / "etc" / f"{instance}.conf").write_text(text)

    def log(self) -> str:
        """What the services have printed."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def _program(self, name: str, command: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{command}\n")
        path.chmod(0o755)


@contextlib.contextmanager
def machine(folder: Path, mountpoint: Path) -> Iterator[Machine]:
    """A machine whose services and mount at `mountpoint` are gone at the end."""
    require_root()
    require_fuse()
    found = Machine(folder)
    try:
        yield found
    except BaseException:
        print(f"log of the services:\n{found.log()}")
        raise
    finally:
        for unit in (folder / "state").iterdir():
            found.manager.stop(unit.name)
        subprocess.run([require("umount"), "--lazy", mountpoint], check=False, capture_output=True, timeout=20)
