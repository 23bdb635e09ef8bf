"""What the kernel, the limits of this process and the folders of the machine mean for a mount.

Owns the list of what qedfs uses of newer kernels, and the rules for memory, open files and runtime folders. Must not
know FUSE (`fuse_checks.py`). The functions take what was found, so each case can be shown without such a machine.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from qedfs.cli.doctor.finding import Finding, ok, warn
from qedfs.host.cgroup import memory_limit
from qedfs.host.procfs import filesystem_type
from qedfs.host.runtime import SOCKET_NAME, journal_folder, mount_folder, remove_unless_served
from qedfs.units import format_size

PRESSURE = Path("/proc/pressure")
LEAST_MEMORY = 100 << 20  # bytes; a mount keeps to a limit down to that
LEAST_FILES = 1024


class Feature(NamedTuple):
    """Something that only newer kernels have, or only some configurations. `without`: what qedfs lacks then."""

    name: str
    since: str
    there: Callable[[], bool]
    without: str


def checks() -> Sequence[tuple[str, Callable[[], Finding]]]:
    """The checks with their names."""
    return (
        ("system", lambda: ok("system", system())),
        ("kernel", lambda: kernel(platform.release(), [feature for feature in FEATURES if not feature.there()])),
        ("memory", lambda: memory(memory_limit())),
        ("open files", lambda: open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
        ("runtime folder", runtime_folder),
        ("journal folder", lambda: journal(journal_folder())),
    )


def system() -> str:
    """Distribution and architecture."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.machine()}"


def kernel(release: str, missing: Sequence[Feature]) -> Finding:
    """`missing`: the features that this kernel does not have."""
    check = "kernel"
    if not missing:
        return ok(check, f"Linux {release}, has all that qedfs uses")
    lacks = "; ".join(f"without {feature.name} {feature.without}" for feature in missing)
    wanted = ", ".join(f"{feature.name}: {feature.since}" for feature in missing)
    return warn(check, f"Linux {release}: {lacks}", f"another kernel would have it ({wanted})")


def memory(limit: int) -> Finding:
    """`limit`: bytes that this process may use."""
    check = "memory"
    found = f"{format_size(limit)} for this process (the machine's, or the limit of its control group)"
    if limit >= LEAST_MEMORY:
        return ok(check, found)
    return warn(
        check, f"{found}: a mount may be killed for lack of memory", f"allow {format_size(LEAST_MEMORY)} (MemoryMax=)"
    )


def open_files(most: int) -> Finding:
    """`most`: the hard limit, to which a mount raises its own."""
    check = "open files"
    if most == resource.RLIM_INFINITY or most >= LEAST_FILES:
        return ok(check, "no limit" if most == resource.RLIM_INFINITY else f"up to {most}")
    return warn(check, f"up to {most}: not enough for many overlays", "raise the hard limit (ulimit -Hn, LimitNOFILE=)")


def runtime_folder() -> Finding:
    """Make the folder of a mount where its control socket would be, look at it, and remove it again."""
    # Nothing is there, and nothing is mounted. The error says why no place will do, and the way out.
    folder = mount_folder(f"/qedfs-doctor-{os.getpid()}")
    try:
        return socket_place(folder, os.stat(folder.parent))
    finally:
        remove_unless_served(folder)


def socket_place(folder: Path, parent: os.stat_result) -> Finding:
    """`folder`: of a mount, in which its socket is. `parent`: of the folder that it is in."""
    length = len(os.fsencode(folder / SOCKET_NAME))
    mode = f"{stat.S_IMODE(parent.st_mode):04o}"
    found = f"{folder.parent} ({filesystem_type(folder)}), mode {mode}, user {parent.st_uid}"
    return ok("runtime folder", f"{found}, path of a socket {length} of 107 bytes")


def journal(folder: Path | None) -> Finding:
    """`folder`: for session journals; None if no tmpfs will do."""
    check = "journal folder"
    if folder is not None:
        return ok(check, f"{folder} (tmpfs)")
    return warn(
        check,
        "no tmpfs for session journals, so that each first write to a cluster waits for the disk",
        "have a tmpfs on /run or /dev/shm that this user may write to",
    )


def _has_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _has_inodes() -> bool:
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        return b"\nino:" in Path(f"/proc/self/fdinfo/{fd}").read_bytes()
    finally:
        os.close(fd)


def _has_pressure() -> bool:
    try:
        return all((PRESSURE / kind).read_bytes() for kind in ("io", "cpu"))
    except OSError:
        return False


def is_since(release: str, *version: int) -> bool:
    """Whether a kernel of this release is at least of this version."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[: len(version)])
    return numbers >= version


FEATURES = (
    Feature("PSI", "Linux 4.20 with psi=1", _has_pressure, "--stream idle cannot see the machine's load"),
    Feature("pidfd_open", "Linux 5.3", _has_pidfd, "umount has to look again and again whether a mount has ended"),
    Feature("inodes in fdinfo", "Linux 5.14", _has_inodes, "reads that nobody needs any more end later"),
    Feature(
        "cachestat",
        "Linux 6.5",
        lambda: is_since(platform.release(), 6, 5),
        "it cannot be seen whether the page cache is empty after a failed barrier",
    ),
)
