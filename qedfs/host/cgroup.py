"""The memory limit of this process: the machine's memory, or the limit of a control group if that is lower.

Owns the parsing of the kernel's files (cgroups(7); Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst). Must
not know what the memory is used for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# systemd and all container engines mount the hierarchies here.
_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc/self/cgroup")
_V2_MOUNTS = ("", "unified")  # v2 alone, and v2 beside the v1 hierarchies
# Above memory.high the kernel does not kill a process but throttles it almost to a standstill.
_V2_FILES = ("memory.max", "memory.high")
_V1_MOUNTS = ("memory",)
_V1_FILES = ("memory.limit_in_bytes",)


def memory_limit(proc: Path = _PROC, root: Path = _ROOT) -> int:
    """Bytes that this process may use, page cache included: the lowest limit of its groups and their parents.

    Never more than the machine has.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits(proc, root)])


def _limits(proc: Path, root: Path) -> Iterator[int]:
    try:
        lines = proc.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        if number == b"0" and not controllers:
            yield from _group_limits(root, _V2_MOUNTS, path, _V2_FILES)
        elif b"memory" in controllers.split(b","):
            yield from _group_limits(root, _V1_MOUNTS, path, _V1_FILES)


def _group_limits(root: Path, mounts: tuple[str, ...], path: bytes, names: tuple[str, ...]) -> Iterator[int]:
    """The limits of a group and its parents, as far as they are visible.

    In a container the path may be relative to the host's hierarchy, while only the container's own group is mounted, as
    the root.
    """
    parts = [part for part in os.fsdecode(path).split("/") if part]
    if ".." in parts:  # the group is outside our cgroup namespace
        parts = []
    for mount in mounts:
        for depth in range(len(parts), -1, -1):
            for name in names:
                limit = _read_limit(root.joinpath(mount, *parts[:depth], name))
                if limit is not None:
                    yield limit


def _read_limit(path: Path) -> int | None:
    """The limit in this file; None if it says "max" or does not exist."""
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):  # "max"
        return None
