"""Settings of the kernel for one mount, as far as we may change them. Owns paths under /sys; all of it is optional.

Limits that are negotiated at the start of a mount are in `fuse_init.py`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Buffered sequential reads: 128 KiB gives 2.4 GB/s, 1024 KiB 2.8 GB/s.
READ_AHEAD_KIB = 1024


def tune(mountpoint: str) -> None:
    """Raise the kernel's read-ahead for this mount. Blocks until the mount answers a stat: call it in a thread."""
    device = os.stat(mountpoint).st_dev
    tune_device(f"{os.major(device)}:{os.minor(device)}")


def tune_device(device: str) -> None:
    """The same for the file system with this device number, such as "0:57", once its mount has answered."""
    with contextlib.suppress(OSError):
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
