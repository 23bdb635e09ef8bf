"""The machine: what is told of it, and the one thing that is set up on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

_FUSECTL = Path("/sys/fs/fuse/connections")
_COMMAND_SECONDS = 20.0
_TOOLS = ("qemu-storage-daemon", "nbdkit", "nbdcopy", "nbdfuse", "nginx", "curl", "fio")
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


def describe(folder: Path) -> dict[str, str]:
    """Processor, memory, kernel, disk, and the versions of the contenders."""
    facts = {
        "processor": f"{os.cpu_count()} x {_processor()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "kernel": platform.release(),
        "work folder": _file_system(folder),
        "python": platform.python_version(),
    }
    return facts | {tool: version(tool) for tool in _TOOLS}


def version(tool: str) -> str:
    """The first number in what `tool --version` prints; "missing" if it is not installed."""
    path = shutil.which(tool, path=_PATH)
    if path is None:
        return "missing"
    flag = "-v" if tool == "nginx" else "--version"
    done = subprocess.run([path, flag], capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "unknown"


def mount_fusectl() -> None:
    """Mounts the control file system of FUSE, which systemd does on most machines, if root may."""
    if os.geteuid() == 0 and _FUSECTL.is_dir() and not os.path.ismount(_FUSECTL):
        argv = ["mount", "-t", "fusectl", "none", str(_FUSECTL)]
        subprocess.run(argv, check=False, capture_output=True, timeout=_COMMAND_SECONDS)


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _file_system(folder: Path) -> str:
    argv = ["stat", "--file-system", "--format=%T", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS)
    return done.stdout.strip()
