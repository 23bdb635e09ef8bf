"""Mounts in the background, and what the kernel and the control socket say of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qedfs.control.qmp.client import Client
from qedfs.host.runtime import mount_folder

from ..harness.hang import HANG_SECONDS
from ..harness.mounts import qedfs
from ..harness.require import require_fuse

QEDFS = [sys.executable, "-m", "qedfs"]
SLOW = ("--limit", "512K")


@contextlib.contextmanager
def daemon(source: Path, mountpoint: Path, *options: str, own_interpreter: bool = False) -> Iterator[None]:
    """A mount in the background that ends with the block, whatever happened. Without a holder, as `mounted`.

    `own_interpreter`: for a test that looks at the words of the process from outside.
    """
    require_fuse()
    held = ("--no-restart",) if {"--restart", "--no-restart"}.isdisjoint(options) else ()
    words = ["mount", str(source), str(mountpoint), "--daemon", *options, *held]
    if own_interpreter:
        subprocess.run([*QEDFS, *words], check=True, timeout=HANG_SECONDS)
    else:
        qedfs(*words)
    try:
        yield
    finally:
        if in_mount_table(mountpoint):
            subprocess.run(["umount", "--lazy", mountpoint], check=False)


def in_mount_table(mountpoint: Path) -> bool:
    return b" %s " % os.fsencode(mountpoint) in Path("/proc/self/mountinfo").read_bytes()


def image(mountpoint: Path) -> dict[str, Any]:
    """The only image's entry in what `qedfs status --json` prints."""
    with Client.connect(str(mountpoint)) as client:
        (found,) = client.execute("x-qedfs-status")["images"]
    return dict(found)


def server_pid(mountpoint: Path) -> int:
    with Client.connect(str(mountpoint)) as client:
        return client.server_pid


def is_running(pid: int) -> bool:
    """Whether the process has not ended; a zombie that nobody has waited for has, once its other threads have.

    Until the last thread has ended, the files of the process are open, and its sockets take connections.
    """
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            return True
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def connections(mountpoint: Path) -> int:
    """Clients that are connected to the control socket: rows of the kernel's table beside the listening one."""
    name = os.fsencode(mount_folder(str(mountpoint)) / "control.sock")
    return sum(row.endswith(name) for row in Path("/proc/net/unix").read_bytes().split(b"\n")) - 1


def with_click(*words: str | Path) -> tuple[int, str, str]:
    """The exit code and the outputs of a command line that click has parsed, however plain it is."""
    program = "import sys; from qedfs.cli.main import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    return done.returncode, done.stdout, done.stderr


def plain(*words: str | Path) -> tuple[int, str, str]:
    """The same of the command as it is installed."""
    done = qedfs(*words, check=False)
    return done.returncode, done.stdout, done.stderr
