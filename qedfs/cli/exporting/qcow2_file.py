"""A raw file -> a qcow2 file, by QEMU's own program, qemu-img.

qemu-img gets a raw file, not the overlay. If an overlay is not complete, it would open the backing itself, without our
pin and policy; it does not know the journal of a killed mount; and it cannot open every overlay that is valid, such
as one whose tables take one cluster.

Owns the call, the progress that qemu-img prints, and what its failures mean. Must not know where the raw file comes
from.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import signal
import subprocess

import trio

from qedfs.cli.ui.copy_progress import CopyProgress
from qedfs.errors import NoSpace, QedfsError

_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")
_LINE_BYTES = 64  # more than a line of the progress has


def qemu_img() -> str:
    """The path of qemu-img. Raises QedfsError if it is not installed."""
    program = shutil.which("qemu-img")
    if program is None:
        raise QedfsError("--format qcow2 needs qemu-img, which is in the package qemu-utils")
    return program


async def convert(program: str, raw: int, target: int, name: str, progress: CopyProgress) -> None:
    """Make the file `target` a qcow2 image of the file `raw`, both open descriptors. Holes stay holes.

    `name`: of the new file, for messages. Counts `progress.total` bytes. If it is cancelled, qemu-img is ended.

    Raises:
        NoSpace: the file system is full, or allows no larger file.
        QedfsError: any other failure of qemu-img, in its words.
    """
    files = [f"/proc/self/fd/{fd}" for fd in (raw, target)]
    start = functools.partial(
        trio.run_process,
        [program, "convert", "-p", "-f", "raw", "-O", "qcow2", *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
        pass_fds=(raw, target),
        # Its messages are parsed, so they must be English. And Ctrl-C is meant for us: if it also ended qemu-img, that
        # would look like a failure.
        env={**os.environ, "LC_ALL": "C"},
        process_group=0,
    )
    said = bytearray()
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(start)
        if process.stdout is None or process.stderr is None:
            raise AssertionError  # these are the pipes that we have asked for
        nursery.start_soon(_follow, process.stdout, progress)
        async for piece in process.stderr:
            said += piece
    if process.returncode:
        raise _failure(name, process.returncode, said.decode(errors="replace"))


async def _follow(lines: trio.abc.ReceiveStream, progress: CopyProgress) -> None:
    """Count what qemu-img has done, from lines such as `    (12.50/100%)`."""
    counted, rest = 0, b""
    async for piece in lines:
        rest += piece
        if found := _PERCENT.findall(rest):
            done = round(progress.total * float(found[-1]) / 100)
            progress.add(done - counted)
            counted = done
        rest = rest[-_LINE_BYTES:]


def _failure(name: str, returncode: int, said: str) -> QedfsError:
    if os.strerror(errno.ENOSPC) in said or os.strerror(errno.EDQUOT) in said:
        return NoSpace(f"{name}: the file system is full")
    if os.strerror(errno.EFBIG) in said or returncode == -signal.SIGXFSZ:
        return NoSpace(f"{name}: the file system, or a process limit, does not allow a file of that size")
    if returncode < 0:
        return QedfsError(f"{name}: qemu-img was ended by signal {-returncode}")
    reason = said.strip().rpartition("\n")[2].removeprefix("qemu-img: ")
    return QedfsError(f"{name}: qemu-img: {reason or f'exit code {returncode}'}")
