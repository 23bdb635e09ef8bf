"""The runtime folders: where qedfs keeps control sockets, logs and session journals, all of which a reboot may delete.

Owns the places, the checks of their owners, and the removal of folders that no server holds. Must not know what the
files contain. Imports only errors and procfs. Every folder is created with mode 0700 and must belong to us. The first
choice is not always available: /run may be missing or read-only, may belong to the root of another user namespace, or
may be on a disk, and another user may have taken a name in a shared folder. So each kind of folder has several
candidates, tried in order. A search looks into all of them, because the process that created the folder may have run as
another user or with another environment.

Users are identified by the uid outside our user namespace, so the root of a container is not uid 0 here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from qedfs.errors import Inaccessible, QedfsError
from qedfs.host.procfs import TMPFS_TYPES, filesystem_type, mount_user, outer_user, sockets

# The files in the folder of a mount.
SOCKET_NAME = "control.sock"
LOG_NAME = "log"
EXIT_REPORT_NAME = "failure"
KEPT_ENDED = 16  # folders of mounts that ended with an error
_SOCKET_ENDING = os.fsencode(f"/{SOCKET_NAME}")
_FOLDER_NAME = r"[0-9a-f]{16}"
_MOST_SOCKET_PATH = 107  # bytes: sun_path of unix(7) without its terminator
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MOST_LINKS = 40  # symbolic links that the kernel follows while it resolves one path

# System folders that ours are created in. These themselves are never created.
RUN = Path("/run")
USERS = Path("/run/user")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the owner is checked, here and below
TEMPORARY = Path("/tmp")  # noqa: S108


class RuntimeFolder(NamedTuple):
    """A folder that belongs to one user, below a system folder."""

    base: Path
    names: tuple[str, ...] = ()
    user: int | None = None  # the owner; None: any owner, the caller vouches for it
    told: bool = False  # the path of the base comes from an untrusted table, so no component of it is trusted

    @property
    def path(self) -> Path:
        """Its path."""
        return self.base.joinpath(*self.names)

    def below(self, name: str) -> Self:
        """The folder of this name in this one."""
        return self._replace(names=(*self.names, name))

    def make(self) -> Path:
        """Create it, for our own user. Raises what `private_folder` raises, and OSError if the base does not exist."""
        if not self.base.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.base))
        path = self.base
        for name in self.names:
            path = private_folder(path / name)
        return path

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """An O_PATH descriptor of the folder as its user created it, for calls with `dir_fd`.

        No symbolic link is followed below the base. Another user could mount a FUSE file system in a folder of his own,
        or on the path to a `told` base. Its server may never answer, so no request is sent to it.

        Raises:
            OSError: FileNotFoundError if this user has no such folder; PermissionError if we may not open it.
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
            raise PermissionError(errno.EACCES, "is on a FUSE file system of another user", str(self.path))

    def _check_owner(self, fd: int) -> None:
        if self.user is None:
            return
        found = os.fstat(fd)
        if outer_user(found.st_uid) != self.user or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotADirectoryError


def user_number() -> int:
    """Our uid, as seen outside our user namespace."""
    return outer_user(os.getuid())


def mount_folder(mountpoint: str) -> Path:
    """Create the folder for the server of the mount at `mountpoint`, in the first candidate that works.

    Raises:
        Inaccessible: no candidate works. The message says what is wrong with each.
    """
    name = _name_of(mountpoint)
    refusals = []
    for place in dict.fromkeys(_own_places()):
        try:
            folder = place.below(name).make()
        except OSError as exc:
            refusals.append(f"{place.path}: {exc.strerror}")
        except Inaccessible as exc:
            refusals.append(str(exc))
        else:
            if len(os.fsencode(folder / SOCKET_NAME)) <= _MOST_SOCKET_PATH:
                os.utime(folder)  # the sweep removes the oldest folders without a server
                return folder
            refusals.append(f"{folder}: too long for the path of a socket")
    raise Inaccessible(
        f"no place for a control socket ({'; '.join(refusals)}); set XDG_RUNTIME_DIR to a folder of yours"
    )


@contextlib.contextmanager
def serving_folder(mountpoint: str) -> Iterator[Path]:
    """The folder of a mount, for the lifetime of its server. Also removes the folders of old mounts.

    When the server ends without an error, the folder is removed with its log. After an error it stays, because the user
    needs the log and the exit report, until KEPT_ENDED later mounts have ended with an error. Raises what
    `mount_folder` raises.
    """
    with held_folder(mountpoint) as folder:
        _sweep(folder.parent)
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise
    remove_unless_served(folder)  # the next server of this mountpoint may have started already


@contextlib.contextmanager
def held_folder(mountpoint: str) -> Iterator[Path]:
    """The folder of a mount, which no other process removes within the block. Raises what `mount_folder` raises."""
    while True:
        folder = mount_folder(mountpoint)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # without file locks, the kernel's table of sockets still shows us
                fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:  # otherwise another process removed it before we had the lock
                yield folder
                return
        finally:
            os.close(fd)


def is_held(place: RuntimeFolder) -> bool:
    """Whether a server holds the folder of a mount: it runs, or is starting."""
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
        return False  # a file system without file locks
    finally:
        os.close(fd)
    return False


def _sweep(parent: Path) -> None:
    serving = _serving()
    ended: list[tuple[int, Path]] = []
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if re.fullmatch(_FOLDER_NAME, folder.name) and folder not in serving:
                ended.append((folder.stat().st_mtime_ns, folder))
    for _, folder in sorted(ended, reverse=True)[KEPT_ENDED:]:
        remove_unless_served(folder)


def _serving() -> set[Path]:
    """The folders of all Unix sockets of this network namespace."""
    return {Path(os.fsdecode(os.path.dirname(path))) for path in sockets()}


def remove_unless_served(folder: Path, held: int | None = None) -> None:
    """Remove the folder of a mount unless a server holds it.

    `held`: the descriptor by which this process itself holds it. Nobody finds it free, and not yet removed.
    """
    with contextlib.suppress(OSError):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(folder, flags) if held is None else os.dup(held)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder not in _serving():
                _remove(folder)
        finally:
            os.close(fd)


def _remove(folder: Path) -> None:
    """Remove the files of a mount, then the folder; it stays if it contains anything else."""
    with contextlib.suppress(OSError):
        for name in (SOCKET_NAME, LOG_NAME, f"{LOG_NAME}.old", EXIT_REPORT_NAME):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def mount_places(mountpoint: str) -> Iterator[RuntimeFolder]:
    """All folders where the server of the mount at `mountpoint` may have its socket. Creates none of them.

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
    # The server may have run with an $XDG_RUNTIME_DIR that we do not know.
    ending = os.fsencode(f"/{name}/{SOCKET_NAME}")
    for found in sockets():
        if found.endswith(ending):
            yield RuntimeFolder(Path(os.fsdecode(found.removesuffix(ending)) or "/"), (name,), user, told=True)


def with_sockets(places: Collection[str]) -> set[str]:
    """Those of these mountpoints (as `place_of`) that have a server's socket in the kernel's table. No file is opened.

    Servers in other network namespaces are not in the table.
    """
    found = {os.path.dirname(path).rpartition(b"/")[2] for path in sockets() if path.endswith(_SOCKET_ENDING)}
    return {place for place in places if os.fsencode(_folder_name(place)) in found}


def _name_of(mountpoint: str) -> str:
    return _folder_name(place_of(mountpoint))


def _folder_name(place: str) -> str:
    return _sha256(os.fsencode(place))[:16]


def _sha256(data: bytes) -> str:
    # Python's own implementation, as in its module `random`: `hashlib` loads OpenSSL, an eighth of a short command.
    for name in ("_sha2", "_sha256"):  # Python 3.12, 3.11
        with contextlib.suppress(ImportError):
            return str(importlib.import_module(name).sha256(data).hexdigest())
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _own_places() -> Iterator[RuntimeFolder]:
    """The folders that our own sockets may be in, the best one first."""
    user = user_number()
    if os.getuid() == 0:
        # Before root's $XDG_RUNTIME_DIR, because that is deleted at logout: a mount that was started in a login session
        # would lose its socket.
        yield RuntimeFolder(RUN, ("qedfs",), user)
    xdg = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(xdg):
        # Resolved, so that the path in the kernel's table of sockets contains no links (see `RuntimeFolder.told`).
        yield RuntimeFolder(Path(os.path.realpath(xdg)), ("qedfs",), user)
    yield from _places_of(user)


def _places_of(user: int) -> Iterator[RuntimeFolder]:
    """The folders that the sockets of a user may be in, without regard to the environment."""
    if user == 0:
        yield RuntimeFolder(RUN, ("qedfs",), user)
    yield RuntimeFolder(TEMPORARY, (f"qedfs-{user}",), user)
    yield RuntimeFolder(USERS / str(user), ("qedfs",), user)
    yield RuntimeFolder(SHARED_MEMORY, (f"qedfs-{user}",), user)


def journal_folder() -> Path | None:
    """Create the folder on a tmpfs for our session journals; None if no candidate works.

    A tmpfs survives the death of a process but not a power cut, just like the page cache, which is what a session
    journal needs. The choice does not depend on the environment, because the next session may have another one.
    """
    for place in _journal_places():
        if filesystem_type(place.base) in TMPFS_TYPES:
            with contextlib.suppress(OSError, QedfsError):
                return place.make()
    return None


def journal_places(user: int) -> list[RuntimeFolder]:
    """The folders that the journal of this user's session may be in, and those of our own."""
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
    """Resolve the symbolic links of a mountpoint without a request to the file system mounted there, which may hang.

    realpath(3) calls lstat(2) on the mountpoint, which its server must answer; readlink(2) is not sent to the server.
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
    """Create the folder `path` if needed, and make sure that only we can access it.

    Raises:
        Inaccessible: another user owns it, or it is not a folder.
        OSError: it cannot be created, or is on a read-only file system.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise Inaccessible(f"{path} is not a folder of user {os.getuid()}")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    return path
