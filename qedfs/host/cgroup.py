"""How much memory this process may use: the machine's, or less where a control group says so.

Owns the reading of the kernel's files (cgroups(7); Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst). Must
not know what the memory is for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Where systemd, and every container engine, mounts the hierarchies.
_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc/self/cgroup")
_V2_PLACES = ("", "unified")  # alone, and beside the old hierarchies
# Beyond memory.high the kernel slows a process down instead of killing one, so that it hardly moves.
_V2_FILES = ("memory.max", "memory.high")
_V1_PLACES = ("memory",)
_V1_FILES = ("memory.limit_in_bytes",)


def memory_limit(proc: Path = _PROC, root: Path = _ROOT) -> int:
    """Bytes that this process may use, page cache included: the least of what our groups and all above them allow."""
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
            yield from _of_group(root, _V2_PLACES, path, _V2_FILES)
        elif b"memory" in controllers.split(b","):
            yield from _of_group(root, _V1_PLACES, path, _V1_FILES)


def _of_group(root: Path, places: tuple[str, ...], path: bytes, names: tuple[str, ...]) -> Iterator[int]:
    """The limits of a group and of those above it, as far as they can be seen.

    In a container the path may be that of the whole machine, and only the container's own group be there, as the root.
    """
    parts = [part for part in os.fsdecode(path).split("/") if part]
    if ".." in parts:  # outside of our namespace
        parts = []
    for place in places:
        for depth in range(len(parts), -1, -1):
            for name in names:
                limit = _number(root.joinpath(place, *parts[:depth], name))
                if limit is not None:
                    yield limit


def _number(path: Path) -> int | None:
    """What the file says; None: no limit, or no such file."""
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):  # "max"
        return None
