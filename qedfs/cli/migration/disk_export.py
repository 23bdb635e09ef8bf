"""The source's disk over NBD: a qemu-nbd that outlives this command, and so does a lock against writers.

QEMU's programs tell each other by byte-range locks what they do with an image (block/file-posix.c). A qemu-nbd that
only reads takes the one of a reader, and keeps nobody from writing. So the command opens the file as well, and qemu-nbd
inherits that open file: a lock on it stays for as long as qemu-nbd lives, whatever becomes of the command.

Owns the command line of qemu-nbd, its start and end, and that lock. Must not know QMP, nor when the source has stopped
writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Self

from qedfs.errors import InUse, QedfsError, file_error
from qedfs.source.url import NBD_DEFAULT_PORT, Location

START_SECONDS = 20.0
STOP_SECONDS = 30.0
# Bytes of QEMU's locks: who has one of the first uses the permission, who has one of the second does not share it.
_USES_WRITE, _USES_RESIZE = 101, 103
_SHARES_NO_WRITE, _SHARES_NO_RESIZE = 201, 203
_FLOCK = struct.Struct("hhqqi4x")  # struct flock, fcntl(2)


class DiskExport:
    """A running server of a disk. It has ended only after `end`."""

    def __init__(self, pid: int, pidfd: int, file: int, path: str) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._file = file
        self._path = path

    @classmethod
    def start(cls, path: str, driver: str, listen: Sequence[str], export: str) -> Self:
        """Serve the image at `path`; returns when clients may connect. `listen`: as `listen_words` makes it.

        Raises QedfsError if it cannot be served there.
        """
        program = shutil.which("qemu-nbd")
        if program is None:
            raise QedfsError("qemu-nbd is not there; it is in the package qemu-utils")
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise file_error(f"{path}: {exc.strerror}", exc) from exc
        # Past the page cache if that is possible: each byte is read once, and the host is to become free.
        words = ("--fork", "--read-only", "--persistent", "--shared=0", f"--export-name={export}")
        try:
            for cache in ("none", "writeback"):
                with tempfile.TemporaryDirectory(prefix="qedfs-") as folder:
                    pid_file = os.path.join(folder, "pid")
                    opened = (f"--cache={cache}", f"--pid-file={pid_file}", *_image_words(path, driver))
                    try:
                        failure = _run([program, *words, *listen, *opened], file)
                        if failure is None:
                            return cls(*_process(pid_file), file, path)
                    except BaseException:
                        _end_started(pid_file)
                        raise
            raise QedfsError(f"qemu-nbd does not serve {path}: {failure}")
        except BaseException:
            os.close(file)
            raise

    def guard(self) -> None:
        """From now on refuse QEMU's programs to write to the image, for as long as the server runs.

        The QEMU that had the disk must have given it up. Raises InUse if there is another writer already.
        """
        for byte in (_SHARES_NO_WRITE, _SHARES_NO_RESIZE):
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        # As QEMU does it: first say what one does not share, then look. Of two who come at once, one sees the other.
        for byte in (_USES_WRITE, _USES_RESIZE):
            wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            kind = _FLOCK.unpack(fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, wanted))[0]
            if kind != fcntl.F_UNLCK:
                raise InUse(f"{self._path}: another program has the image open for writing")

    def end(self) -> None:
        """Stop serving. The image may be deleted afterwards."""
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
            if select.select([self._pidfd], [], [], seconds)[0]:
                break
        self.leave()

    def leave(self) -> None:
        """Forget about it; it serves on."""
        os.close(self._pidfd)
        os.close(self._file)


def listen_words(backing: Location, given: str | None) -> list[str]:
    """Where qemu-nbd listens: at the port or the socket that the backing names, or where the user says.

    `given`: the path of a Unix socket, [HOST:]PORT, or None.
    """
    if given is not None and "/" in given:
        return [f"--socket={given}"]
    if given is not None:
        host, _, port = given.rpartition(":")
        return [*([f"--bind={host.strip('[]')}"] if host else []), f"--port={port}"]
    if backing.path is not None:
        return [f"--socket={backing.path}"]
    return [f"--port={backing.port or NBD_DEFAULT_PORT}"]


def _image_words(path: str, driver: str) -> list[str]:
    # The QEMU that still has the disk open shares a raw image with readers. Of other formats it allows no reader that
    # wants to be sure of what it reads, and we know by other means when it has stopped writing.
    if driver == "raw":
        return ["--format=raw", path]
    escaped = path.replace(",", ",,")
    return ["--image-opts", f"driver={driver},file.driver=file,file.filename={escaped},force-share=on"]


def _run(words: Sequence[str], inherited: int) -> str | None:
    """Run qemu-nbd until it serves in the background. Returns what it complained of, None if it serves."""
    try:
        # A session of its own: a Ctrl-C that is meant for this command must not end it.
        done = subprocess.run(  # noqa: S603 - no shell, and qemu-nbd takes the file's name as it is
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=START_SECONDS,
            pass_fds=(inherited,),
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {START_SECONDS:g} s"
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"exit code {done.returncode}"


def _end_started(pid_file: str) -> None:
    """End a server of which nobody knows, as after Ctrl-C. Before it has written the file, it fails by itself."""
    with contextlib.suppress(OSError, ValueError):
        pidfd = _process(pid_file)[1]
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)


def _process(pid_file: str) -> tuple[int, int]:
    """The pid of a server that has just started, and a descriptor that stays with this process."""
    with open(pid_file) as file:
        pid = int(file.read())
    return pid, os.pidfd_open(pid)
