"""Drops what the kernel holds of an image: its pages after its source was exchanged, its size after it has grown.

Owns how that is done, and how it is known to be done. Must not know why.

The kernel drops all pages of a file, mapped ones too, when the file is opened and the answer to that open does not say
that they may be kept (`Served.note_open`). It waits for pages that are being read, so the program that opens the file
waits for us to answer these reads. This must not be a thread of ours: killed while it waits, this process could not end
before its reads were answered, which nobody would do any more. So it is a program of its own, which ends with us.

A read whose answer holds old bytes must have been answered, or must be run again, before this begins. Then each page
with old bytes is there already, or is being filled, and is dropped; pages that come later hold new bytes.
"""

from __future__ import annotations

import logging
import os
import subprocess

import pyfuse3
import trio

from qedfs.errors import QedfsError
from qedfs.mount.served import Served

log = logging.getLogger(__name__)

# Lets the kernel ask us for the attributes of a file. With an empty format, it would ask for nothing.
ASKER = ("stat", "--cached=never", "-c", "%s", "--")
OPENER = ("head", "-c0", "--")  # opens a file, and reads nothing


class KernelPages:
    """The pages of the images of one mount."""

    def __init__(self, mountpoint: str) -> None:
        """`mountpoint`: with symbolic links resolved."""
        self._mountpoint = mountpoint

    async def show_size(self, served: Served) -> None:
        """Let the kernel ask for the size of an image, which has changed. Otherwise, it asks some seconds later.

        The same holds as for `drop`: the program waits for our answer, and no thread of ours does.
        """
        path = os.path.join(self._mountpoint, served.name)
        if (status := await run([*ASKER, path])) != 0:
            log.debug("%s: cannot be asked for its size at %s, exit status %s", served.name, self._mountpoint, status)

    async def drop(self, served: Served) -> None:
        """Drop all pages of an image. Waits until the reads that fill any of them are answered.

        `served.stale_pages` must be set. If this is cancelled, the kernel goes on by itself.
        """
        before = served.fresh_opens
        status = await run([*OPENER, os.path.join(self._mountpoint, served.name)])
        if status == 0 and served.fresh_opens > before:
            return
        # The path leads elsewhere: something is mounted on top, or ours was unmounted lazily and is still in use.
        log.debug("%s: cannot be opened at %s, exit status %s", served.name, self._mountpoint, status)
        await trio.to_thread.run_sync(_notify, served.inode, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))


async def run(argv: list[str]) -> int | None:
    """Run a program to its end. Returns its exit status; None if it cannot be started.

    Not `trio.run_process`: if that is cancelled, it kills the program and waits for its end, which may not come.
    """
    try:
        # Returns when the program has been started, after a millisecond. It inherits no descriptor of ours.
        child = subprocess.Popen(  # noqa: S603, ASYNC220 - our own words; see above
            argv, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        ended = os.pidfd_open(child.pid)
    except OSError as exc:
        log.debug("%s cannot be started: %s", argv[0], exc)
        return None
    try:
        await trio.lowlevel.wait_readable(ended)
        return child.poll()
    finally:
        os.close(ended)
        child.poll()


def _notify(inode: int) -> None:
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=False)
    except FileNotFoundError:
        return  # the kernel does not know the inode, so it has no pages of it
    except OSError as exc:
        raise QedfsError(f"the kernel does not drop its pages: {exc.strerror}") from exc
