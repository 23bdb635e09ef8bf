"""Where qedfs keeps what dies with the machine: control sockets, logs, session journals.

A leaf: imports nothing of the project but errors and procfs. Every folder is made 0700 and must belong to us; a folder
that another user made in a shared place is refused, not used.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from qedfs.errors import UsageError
from qedfs.procfs import TMPFS_TYPES, filesystem_type

SOCKET_NAME = "control.sock"
_MOST_LINKS = 40  # that the kernel follows on one way


def runtime_folder() -> Path:
    """The folder for sockets and logs: /run/qedfs for root, else $XDG_RUNTIME_DIR/qedfs, else /tmp/qedfs-UID."""
    uid = os.getuid()
    if uid == 0:
        # Root's $XDG_RUNTIME_DIR is there in a login session only: a service would not be found from one, and what was
        # started in one would lose its socket and its journals at the logout.
        return private_folder(Path("/run/qedfs"))
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    if xdg and os.path.isdir(xdg):
        return private_folder(Path(xdg, "qedfs"))
    return private_folder(Path(f"/tmp/qedfs-{uid}"))  # noqa: S108 - the owner is checked


def journal_folder() -> Path | None:
    """A folder on a tmpfs for session journals, or None where the machine has none that we can write to.

    A tmpfs survives the death of a process and dies with the power, as the page cache does: the pairing that a
    session journal needs.
    """
    for candidate in (runtime_folder() / "journal", Path(f"/dev/shm/qedfs-{os.getuid()}")):  # noqa: S108
        if filesystem_type(candidate.parent) in TMPFS_TYPES and os.access(candidate.parent, os.W_OK):
            return private_folder(candidate)
    return None


def mount_folder(mountpoint: str) -> Path:
    """The folder of one mount, named after its mountpoint; the same for the daemon and for the commands."""
    name = hashlib.sha256(os.fsencode(place_of(mountpoint))).hexdigest()[:16]
    return runtime_folder() / name


def place_of(mountpoint: str) -> str:
    """The path without symbolic links. Asks nothing of what is mounted there, which may hang.

    realpath(3) looks at the mountpoint itself, and that is a question to its server; readlink(2) is none.
    """
    path = os.path.abspath(mountpoint)
    for _ in range(_MOST_LINKS):
        parent, name = os.path.split(path)
        path = os.path.join(os.path.realpath(parent), name)
        try:
            target = os.readlink(path)
        except OSError:
            return path
        path = os.path.join(os.path.dirname(path), target).rstrip("/") or "/"
        if os.path.basename(path) in ("", ".", ".."):
            break
    return os.path.realpath(path)


def socket_path(mountpoint: str) -> Path:
    """The control socket of the mount at `mountpoint`."""
    return mount_folder(mountpoint) / SOCKET_NAME


def private_folder(path: Path) -> Path:
    """Make `path` a folder of ours that no other user can look into.

    Raises:
        UsageError: somebody else owns it, or it is no folder.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UsageError(f"{path} is not a folder of user {os.getuid()}; set XDG_RUNTIME_DIR to one that is")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)
    return path
