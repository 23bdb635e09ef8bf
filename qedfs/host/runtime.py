"""Where qedfs keeps what dies with the machine: control sockets, logs, session journals.

A leaf: imports nothing of the project but errors and procfs. Every folder is made 0700 and must belong to us. The
first choice is not to be had everywhere: /run may be missing or read-only, belong to the root of another user
namespace, or be on a disk; others may have taken a name in a shared folder. So there are several places of each kind,
tried in order, and whoever looks for something looks into all of them: the session that made it may have been another
user's, or had another environment.

Users have the numbers that the machine knows them by, also in a user namespace, where the root of a container is uid 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from qedfs.errors import QedfsError, UsageError
from qedfs.host.procfs import TMPFS_TYPES, filesystem_type, mount_user, outer_user, sockets

# What is in the folder of a mount.
SOCKET_NAME = "control.sock"
LOG_NAME = "log"
EXIT_REPORT_NAME = "failure"
KEPT_ENDED = 16  # folders of mounts that have not ended well
_FOLDER_NAME = re.compile(r"[0-9a-f]{16}")
_MOST_SOCKET_PATH = 107  # bytes: sun_path of unix(7) and its final zero
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MOST_LINKS = 40  # that the kernel follows on one way

# The folders of the system's that ours are made in. None of them is ever made.
RUN = Path("/run")
USERS = Path("/run/user")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the owner is checked, here and below
TEMPORARY = Path("/tmp")  # noqa: S108


@dataclasses.dataclass(frozen=True, slots=True)
class RuntimeFolder:
    """A folder that belongs to one user, below one of the system's."""

    base: Path
    names: tuple[str, ...] = ()
    user: int | None = None  # None: whoever owns it; the caller vouches for it
    told: bool = False  # the way to the base is somebody else's word: nothing on it is believed

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.base.joinpath(*self.names)

    def below(self, name: str) -> Self:
        """A folder in this one."""
        return dataclasses.replace(self, names=(*self.names, name))

    def make(self) -> Path:
        """Make it, for our own user. Errors as of `private_folder`, and OSError where the base is not there."""
        if not self.base.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.base))
        path = self.base
        for name in self.names:
            path = private_folder(path / name)
        return path

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor (O_PATH) of the folder as its user has made it, for calls with `dir_fd`.

        No link is followed below the base. Others could mount a file system of their own in a folder of theirs, or on
        the way to a base that we were told of; its server may never answer, so it is asked nothing.

        Raises:
            OSError: FileNotFoundError if there is no such folder of this user; PermissionError if we may not look.
        """
        folders: list[int] = []
        try:
            try:
                folders.append(os.open("/" if self.told else self.base, _FOLDER))
                for name in self.base.parts[1:] if self.told else ():
                    folders.append(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folders[-1]))
                    self._check_kind(folders[-1])
                for name in self.names:
                    self._check_kind(folders[-1])
                    folders.append(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folders[-1]))
                    self._check_kind(folders[-1])
                    self._check_owner(folders[-1])
            except NotADirectoryError as exc:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path)) from exc
            yield folders[-1]
        finally:
            for folder in folders:
                os.close(folder)

    def _check_kind(self, fd: int) -> None:
        if (self.told or self.user not in (None, user_number())) and filesystem_type(fd).startswith("fuse"):
            raise PermissionError(errno.EACCES, "is on a file system of its user's", str(self.path))

    def _check_owner(self, fd: int) -> None:
        if self.user is None:
            return
        found = os.fstat(fd)
        if outer_user(found.st_uid) != self.user or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotADirectoryError


def user_number() -> int:
    """Who we are."""
    return outer_user(os.getuid())


def mount_folder(mountpoint: str) -> Path:
    """Make the folder of the mount at `mountpoint`, for its server: the first of the places that can be had.

    Raises:
        UsageError: there is none. The message names those that were tried.
    """
    name = _name_of(mountpoint)
    refusals = []
    for place in dict.fromkeys(_own_places()):
        try:
            folder = place.below(name).make()
        except OSError as exc:
            refusals.append(f"{place.path}: {exc.strerror}")
        except UsageError as exc:
            refusals.append(str(exc))
        else:
            if len(os.fsencode(folder / SOCKET_NAME)) <= _MOST_SOCKET_PATH:
                os.utime(folder)  # of those that nobody serves in the oldest are swept
                return folder
            refusals.append(f"{folder}: is too long a name for a socket")
    raise UsageError(f"no place for a control socket ({'; '.join(refusals)}); set XDG_RUNTIME_DIR to a folder of yours")


@contextlib.contextmanager
def serving_folder(mountpoint: str) -> Iterator[Path]:
    """The folder of a mount, for the life of its server; what earlier mounts have left behind is bounded.

    After a good end it goes, with its log. After an error it stays, since the log and the last words are wanted then,
    until KEPT_ENDED later mounts have ended so. Errors as of `mount_folder`.
    """
    with held_folder(mountpoint) as folder:
        _sweep(folder.parent)
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise
    remove_unless_served(folder)  # the next server of this mountpoint may be there already


@contextlib.contextmanager
def held_folder(mountpoint: str) -> Iterator[Path]:
    """The folder of a mount, which nobody removes within the block. Errors as of `mount_folder`."""
    while True:
        folder = mount_folder(mountpoint)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: the kernel's table of sockets has us
                fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:  # else it was removed just now
                yield folder
                return
        finally:
            os.close(fd)


def is_held(place: RuntimeFolder) -> bool:
    """Whether the folder of a mount is held: its server has not ended, or one begins there."""
    try:
        with place.opened() as folder:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(fd)
    return False


def _sweep(parent: Path) -> None:
    serving = _serving()
    ended: list[tuple[int, Path]] = []
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if _FOLDER_NAME.fullmatch(folder.name) and folder not in serving:
                ended.append((folder.stat().st_mtime_ns, folder))
    for _, folder in sorted(ended, reverse=True)[KEPT_ENDED:]:
        remove_unless_served(folder)


def _serving() -> set[Path]:
    """The folders of all sockets of this network namespace."""
    return {Path(os.fsdecode(os.path.dirname(path))) for path in sockets()}


def remove_unless_served(folder: Path) -> None:
    """Remove the folder of a mount if no server lives there."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder not in _serving():
                _remove(folder)
        finally:
            os.close(fd)


def _remove(folder: Path) -> None:
    """Unless something is in it that is not a mount's."""
    with contextlib.suppress(OSError):
        for name in (SOCKET_NAME, LOG_NAME, f"{LOG_NAME}.old", EXIT_REPORT_NAME):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def mount_places(mountpoint: str) -> Iterator[RuntimeFolder]:
    """All places where the server of the mount at `mountpoint` may have its folder; none is made.

    Root finds the servers of other users, too.
    """
    path = place_of(mountpoint)
    name = _name_of(path)
    user = user_number()
    for place in _own_places():
        yield place.below(name)
    if os.getuid() == 0 and (other := mount_user(os.fsencode(path))) is not None:
        user = outer_user(other)
        for place in _places_of(user):
            yield place.below(name)
    # It may have had an environment that we know nothing of.
    ending = os.fsencode(f"/{name}/{SOCKET_NAME}")
    for found in sockets():
        if found.endswith(ending):
            yield RuntimeFolder(Path(os.fsdecode(found.removesuffix(ending)) or "/"), (name,), user, told=True)


def _name_of(mountpoint: str) -> str:
    return hashlib.sha256(os.fsencode(place_of(mountpoint))).hexdigest()[:16]


def _own_places() -> Iterator[RuntimeFolder]:
    """Where our own sockets may be, the best first."""
    user = user_number()
    if os.getuid() == 0:
        # Before root's $XDG_RUNTIME_DIR, which is there in a login session only: what was started in one would lose
        # its socket at the logout.
        yield RuntimeFolder(RUN, ("qedfs",), user)
    xdg = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(xdg):
        # What the kernel's table of sockets shows then leads there without links (`RuntimeFolder.told`).
        yield RuntimeFolder(Path(os.path.realpath(xdg)), ("qedfs",), user)
    yield from _places_of(user)


def _places_of(user: int) -> Iterator[RuntimeFolder]:
    """Where the sockets of a user may be, whatever the environment."""
    if user == 0:
        yield RuntimeFolder(RUN, ("qedfs",), user)
    yield RuntimeFolder(TEMPORARY, (f"qedfs-{user}",), user)
    yield RuntimeFolder(USERS / str(user), ("qedfs",), user)
    yield RuntimeFolder(SHARED_MEMORY, (f"qedfs-{user}",), user)


def journal_folder() -> Path | None:
    """Make the folder on a tmpfs for our session journals; None where there is none that we can have.

    A tmpfs survives the death of a process and dies with the power, as the page cache does: the pairing that a
    session journal needs. Does not depend on the environment: the next session has another one.
    """
    for place in _journal_places():
        if filesystem_type(place.base) in TMPFS_TYPES:
            with contextlib.suppress(OSError, QedfsError):
                return place.make()
    return None


def journal_places(user: int) -> list[RuntimeFolder]:
    """Where a session of this user can have put its journal; our own places as well."""
    return list(dict.fromkeys([*_journal_places(), *_journal_places_of(user)]))


def _journal_places() -> Iterator[RuntimeFolder]:
    user = user_number()
    if os.getuid() == 0:
        yield RuntimeFolder(RUN, ("qedfs", "journal"), user)
    yield from _journal_places_of(user)


def _journal_places_of(user: int) -> Iterator[RuntimeFolder]:
    if user == 0:
        yield RuntimeFolder(RUN, ("qedfs", "journal"), user)
    else:
        yield RuntimeFolder(USERS / str(user), ("qedfs", "journal"), user)
    yield RuntimeFolder(SHARED_MEMORY, (f"qedfs-{user}",), user)
    yield RuntimeFolder(TEMPORARY, (f"qedfs-{user}", "journal"), user)


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


def private_folder(path: Path) -> Path:
    """Make `path` a folder of ours that no other user can look into.

    Raises:
        UsageError: somebody else owns it, or it is no folder.
        OSError: it cannot be made, or nothing can be made in it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UsageError(f"{path} is not a folder of user {os.getuid()}")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    return path
