"""Settings of the kernel's side of a mount, where we may write them. Owns paths under /sys; all of it is optional."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Buffered sequential reads: 128 KiB gives 2.4 GB/s, 1024 KiB 2.8 GB/s.
READ_AHEAD_KIB = 1024
# Read-ahead and asynchronous O_DIRECT requests that the kernel lets be in flight; its default of 12 is how many cold
# reads at once can wait for the network.
MAX_BACKGROUND = 128


def tune(mountpoint: str) -> None:
    """Raise the kernel's limits for this mount. Blocks until the mount answers a stat: call it in a thread."""
    device = os.stat(mountpoint).st_dev
    _write(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"), READ_AHEAD_KIB)
    connection = Path(f"/sys/fs/fuse/connections/{os.minor(device)}")
    _write(connection / "max_background", MAX_BACKGROUND)
    _write(connection / "congestion_threshold", MAX_BACKGROUND * 3 // 4)


def _write(path: Path, value: int) -> None:
    with contextlib.suppress(OSError):
        path.write_text(str(value))
