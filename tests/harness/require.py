"""Whether a test can run here, and what happens if not.

On a developer's machine a test whose tool is missing skips itself with the reason. Under CI (CI=true in the
environment) the same is a failure: a skip there is a test that silently stopped guarding its promise.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

# mkfs.ext4, nginx and losetup live in sbin, which is not in an ordinary user's PATH on Debian.
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))

GUEST_FOLDER = Path(__file__).parents[2] / ".venv" / "guest"


def unavailable(reason: str) -> NoReturn:
    """Ends the test: skipped with `reason`, or failed under CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (under CI this is a failure, not a skip)", pytrace=False)
    pytest.skip(reason)


def require(tool: str) -> str:
    """Returns the path of the program `tool`, or ends the test."""
    path = shutil.which(tool, path=_PATH)
    if path is None:
        unavailable(f"needs {tool}; contrib/setup installs it")
    return path


def require_fuse() -> None:
    """Ends the test unless this process can mount a FUSE file system."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        unavailable(f"needs /dev/fuse: {exc.strerror}")
    require("fusermount3")


def require_root() -> None:
    """Ends the test unless it runs as root."""
    if os.geteuid() != 0:
        unavailable("needs root")


def require_guest() -> str:
    """Returns the path of the emulator for the test guest, or ends the test; the guest is an x86-64 Linux."""
    if platform.machine() != "x86_64":
        unavailable("the test guest is x86-64, this machine is not")
    if not (GUEST_FOLDER / "vmlinuz").exists():
        unavailable("needs the guest's kernel; contrib/setup fetches it")
    require("busybox")
    return require("qemu-system-x86_64")
