"""A control group with a limit of memory, of whichever kind the machine has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .require import require, require_root, unavailable


@contextlib.contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A control group with so many bytes of memory. Processes are put into its cgroup.procs; at the end it is empty."""
    require_root()
    root = Path("/sys/fs/cgroup")
    v1 = root / "memory"
    group = (v1 if v1.is_dir() else root) / f"qedfs-test-{os.getpid()}"
    try:
        if not v1.is_dir():
            (root / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as exc:
        unavailable(f"needs control groups that it may make: {exc}")
    try:
        name = "memory.limit_in_bytes" if v1.is_dir() else "memory.max"
        (group / name).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def inside(group: Path) -> list[str]:
    """The command that runs another one in the group."""
    return [require("sh"), "-c", 'echo $$ > "$0"/cgroup.procs; exec "$@"', str(group)]
