"""Whether a test can run here, and what happens if not.

On a developer's machine a test whose tool is missing skips itself with the reason. Under CI (CI=true in the
environment) the same is a failure: a skip there is a test that silently stopped guarding its promise.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

# mkfs.ext4, nginx and losetup live in sbin, which is not in an ordinary user's PATH on Debian.
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))

GUEST_FOLDER = Path(__file__).parents[2] / ".venv" / "guest"


# The tiers of the test that runs; None outside of pytest.
_tiers: frozenset[str] | None = None


@contextlib.contextmanager
def only(tiers: Collection[str]) -> Iterator[None]:
    """For the length of the block a test may require what these tiers have."""
    global _tiers
    before, _tiers = _tiers, frozenset(tiers)
    try:
        yield
    finally:
        _tiers = before


def _uses(tier: str) -> None:
    """Fails the test if its tiers, which were told from its code, do not have this."""
    if _tiers is not None and tier not in _tiers:
        pytest.fail(f"its tiers are {', '.join(sorted(_tiers))}: mark it with @pytest.mark.{tier}", pytrace=True)


def unavailable(reason: str) -> NoReturn:
    """Ends the test: skipped with `reason`, or failed under CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (under CI this is a failure, not a skip)", pytrace=False)
    pytest.skip(reason)


def require(tool: str) -> str:
    """Returns the path of the program `tool`, or ends the test."""
    _uses("servers")
    path = shutil.which(tool, path=_PATH)
    if path is None:
        unavailable(f"needs {tool}; contrib/setup installs it")
    return path


def require_fuse() -> None:
    """Ends the test unless this process can mount a FUSE file system."""
    _uses("fuse")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        unavailable(f"needs /dev/fuse: {exc.strerror}")
    if shutil.which("fusermount3", path=_PATH) is None:
        unavailable("needs fusermount3; contrib/setup installs it")


def require_root() -> None:
    """Ends the test unless it runs as root."""
    _uses("root")
    if os.geteuid() != 0:
        unavailable("needs root")


def require_guest() -> str:
    """Returns the path of the emulator for the test guest, or ends the test; the guest is an x86-64 Linux."""
    _uses("servers")
    if platform.machine() != "x86_64":
        unavailable("the test guest is x86-64, this machine is not")
    if not (GUEST_FOLDER / "vmlinuz").exists():
        unavailable("needs the guest's kernel; contrib/setup fetches it")
    require("busybox")
    return require("qemu-system-x86_64")
