"""The kernel's list of FUSE connections (fusectl): where it is mounted, and a mount of it where it is not.

Knows nothing of qedfs and its mounts.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .require import require, require_root

# Where systemd mounts it. A container and a machine without systemd do not have it there.
_USUAL = Path("/sys/fs/fuse/connections")


@contextlib.contextmanager
def fusectl() -> Iterator[Path]:
    """A folder with a folder for each connection, named by its device's minor number. Ends the test unless root."""
    require_root()
    if _USUAL.is_mount():
        yield _USUAL
        return
    with tempfile.TemporaryDirectory(prefix="qedfs-fusectl-") as folder:
        subprocess.run([require("mount"), "-t", "fusectl", "fusectl", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([require("umount"), folder], check=True)
