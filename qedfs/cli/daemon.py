"""`mount --daemon`: starts the same command again in a new session, and waits for its report over a pipe.

Owns the pipe, the log file and the start of the child. The child is a new process, not a fork of this one, so it
inherits no thread, no lock and no descriptor of the terminal. Must not know what the child serves.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import click

from qedfs.cli.server_command import environment
from qedfs.cli.ui.output import remark
from qedfs.errors import QedfsError
from qedfs.host.runtime import LOG_NAME, held_folder, remove_unless_served

STOP_SECONDS = 5.0  # wait this long for a child that was told to end, which has to unmount first
MAX_LOG_BYTES = 4 << 20  # if the log, which is on a tmpfs, is larger, the next daemon starts a new one


class Readiness:
    """The child's end of the pipe. If there is none, nobody waits, and nothing is sent."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            # fusermount3 and other children must not inherit it, which would keep the pipe open.
            os.set_inheritable(fd, False)

    def ready(self, remarks: Sequence[str]) -> None:
        """Report that the mount serves. `remarks`: lines about overlays that are not served as the user may expect."""
        self._send({"exit_code": 0, "remarks": remarks})

    def failed(self, line: str, exit_code: int) -> None:
        """Report that the mount has failed."""
        self._send({"exit_code": exit_code, "error": line})

    def _send(self, message: dict[str, object]) -> None:
        if self._fd is None:
            return
        # The process that started us may have ended; the mount serves even so.
        with contextlib.suppress(OSError):
            os.write(self._fd, json.dumps(message).encode())
        os.close(self._fd)
        self._fd = None


def start(command: Callable[[int], Sequence[str]], mountpoint: str) -> None:
    """Run a command that serves a mount in the background. Returns when it serves.

    `command`: the words for a pipe at this descriptor, to which it reports (`Readiness`).

    If it fails, exits with the child's message and exit code. If interrupted before that, also ends the child.
    """
    with held_folder(mountpoint) as folder:
        log_path = folder / LOG_NAME
        answer, child = _started(command, log_path)
    if not answer:
        raise QedfsError(f"the daemon ended with {child.wait()} before it served, see {log_path}")
    message = json.loads(answer)
    if message["exit_code"]:
        child.wait()
        # For an error that is not the user's, the log may contain more details.
        hint = f" (log: {log_path})" if message["exit_code"] == QedfsError.exit_code else ""
        if not hint:
            remove_unless_served(log_path.parent)
        remark(message["error"] + hint)
        raise click.exceptions.Exit(message["exit_code"])
    for line in message["remarks"]:
        remark(line)
    # The child keeps running. Set its return code, or Popen would warn about a child that nobody waited for.
    child.returncode = 0


def _started(command: Callable[[int], Sequence[str]], log_path: Path) -> tuple[bytes, subprocess.Popen[bytes]]:
    """Start the child. Returns its report, once it serves or has failed, and the child."""
    read_fd, write_fd = os.pipe()
    with _open_log(log_path) as log:
        child = subprocess.Popen(  # noqa: S603 - the interpreter that runs us, with what the user typed
            command(write_fd),
            cwd="/",
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=[write_fd],
            start_new_session=True,
        )
    try:
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        # Ctrl-C reaches only us: the child has its own session, and would continue to mount.
        _end(child, log_path)
        raise
    return answer, child


def _end(child: subprocess.Popen[bytes], log_path: Path) -> None:
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        # Not SIGKILL, which would leave a dead mount behind and interrupt a flush.
        remark(f"the daemon (pid {child.pid}) was told to end but is still running, see {log_path}")


def _open_log(path: Path) -> BinaryIO:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > MAX_LOG_BYTES:
            path.rename(path.with_suffix(".old"))
    return path.open("ab")
