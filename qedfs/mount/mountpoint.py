"""The mountpoint: which file system is mounted there, whether ours can be, and the command that unmounts it.

Owns the queries of the kernel's table of mounts, which send no request to a file system that may hang. Must not know
what is served there, nor by which process.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from qedfs.errors import InUse, UsageError, file_error
from qedfs.host.procfs import is_denied_privileges, mounts
from qedfs.host.runtime import place_of

if TYPE_CHECKING:
    import subprocess

NO_NEW_PRIVILEGES = (
    "fusermount3 gets no privileges here (NoNewPrivs, see qedfs doctor); run it outside of what forbids them, "
    "such as NoNewPrivileges=yes in a unit"
)
ANSWER_SECONDS = 3.0  # wait this long for a server to show that it lives


class MountInfo(NamedTuple):
    """A mounted file system."""

    device: str  # "0:57": the kernel gives it to another file system as soon as this one is mounted nowhere
    kind: str
    source: bytes


def mount_info_at(place: str) -> MountInfo | None:
    """The file system mounted at this path (`place_of`), the topmost if there are several; None if there is none."""
    wanted = os.fsencode(place)
    found = None
    for line in mounts():
        if line.place == wanted:
            found = MountInfo(line.device, line.kind, line.source)
    return found


def is_dead(mountpoint: str) -> bool:
    """Whether a FUSE mount is there whose server has died, or whose connection to the kernel was aborted.

    False if there is no answer within ANSWER_SECONDS: that server is stopped, or busy, and may go on.
    """
    dead: list[bool] = []

    def ask() -> None:
        try:
            # Not stat: the kernel would answer it from cached attributes.
            os.statvfs(mountpoint)
        except OSError as exc:
            dead.append(exc.errno == errno.ENOTCONN)

    import threading  # here, because most commands look at mounts that live

    # A thread can be abandoned. It does not keep the process from ending.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return any(dead)


def remove_dead(mountpoint: str) -> None:
    """Unmount a mount of ours whose connection to the kernel nobody has open any more. Leave all other mounts alone."""
    found = known_at(mountpoint)
    if found is not None and found.kind == "fuse.qedfs" and is_dead(mountpoint):
        unmount(mountpoint, lazy=True)


def check_mountpoint(mountpoint: str, source: str) -> None:
    """Check that `source` can be mounted there, as far as this can be known without trying.

    Raises:
        InUse: something is mounted there already.
        UsageError: it is not a folder, or it is the folder of the overlays.
        Inaccessible: we may not look there.
    """
    if is_dead(mountpoint):
        raise InUse(f"{mountpoint}: a mount whose server has died is there; run: qedfs umount {mountpoint}")
    # Before the folder is asked: a FUSE mount of another user does not even tell us that it is a folder, and one whose
    # server is stopped tells us nothing.
    found = known_at(mountpoint)
    if found is not None and found.kind == "fuse.qedfs":
        what = os.fsdecode(found.source)
        raise InUse(
            f"{mountpoint}: {what} is mounted there already; run qedfs umount {mountpoint}, or choose another folder"
        )
    if found is not None or os.path.ismount(mountpoint):
        raise InUse(f"{mountpoint}: something is mounted there already; unmount it or choose another folder")
    try:
        mode = os.stat(mountpoint).st_mode
    except OSError as exc:
        raise file_error(f"{mountpoint}: {_why_no_folder(mountpoint, exc)}", exc) from exc
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{mountpoint}: is not a folder; name the overlay first, then the folder to mount on")
    if os.path.realpath(mountpoint) == os.path.realpath(source):
        raise UsageError(f"{mountpoint}: holds the overlays; mount on another folder")


def _why_no_folder(mountpoint: str, exc: OSError) -> str:
    if exc.errno == errno.ENOENT and not os.path.lexists(mountpoint):
        return f"there is no such folder; make it first: mkdir -p {mountpoint}"
    if exc.errno == errno.ENOENT:
        return "is a symbolic link to a folder that is not there"
    return f"cannot be mounted on: {exc.strerror}"


def known_at(mountpoint: str) -> MountInfo | None:
    """What is mounted there, as `mount_info_at`; None also if the table of mounts cannot be read."""
    try:
        return mount_info_at(place_of(mountpoint))
    except (OSError, ValueError, LookupError):  # then the attempt to mount will show it
        return None


def why_not_mounted(mountpoint: str, said: str) -> str:
    """The reason of a failed mount, and the way out. `said`: what libfuse and fusermount3 have printed."""
    import shutil  # here, because most commands look at mounts and mount nothing

    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse; load the kernel's module (modprobe fuse), or give the container this device"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user; ask for the mode 0666 that udev gives it"
    if "exec fusermount" in said or (os.getuid() != 0 and shutil.which("fusermount3") is None):
        return f"there is no fusermount3, which mounts for users other than root; install the package fuse3 ({said})"
    if os.getuid() != 0 and is_denied_privileges():
        return f"{NO_NEW_PRIVILEGES} ({said})"
    if not os.access(mountpoint, os.W_OK):
        return "this user may not write to that folder; mount on one of your own"
    return said or "libfuse does not say why"


def unmount(mountpoint: str, *, lazy: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the system's unmount command: umount for root, fusermount3 for others. Sends no request to the mount."""
    import subprocess  # here, because most commands look at mounts and unmount nothing

    place = place_of(mountpoint)
    if os.getuid() == 0:
        # -c: otherwise umount(8) resolves the path, and hangs if the server hangs.
        command = ["umount", "-c", *(["-l"] if lazy else []), "--", place]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", place]
    # Callers search the message for "busy"; the path in it may be in any encoding.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(  # noqa: S603 - no shell
            command, capture_output=True, text=True, errors="surrogateescape", env=environment, check=False
        )
    except OSError as exc:  # no such program, or no memory or process left for it
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: {exc.strerror}")
