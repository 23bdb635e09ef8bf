"""Drops the name of an image that has left the mount from the kernel's cache.

Owns how that is done. Must not know why the image has left.

The kernel keeps names for a while (`fuse_attributes.py`). An open() of such a name reaches us with the number of the
image. We answer ESTALE, and the kernel looks the name up again before it opens anything, and drops it as it is not
there. As in `kernel_pages.py`, a program of its own opens the file, because no thread of ours may wait for the mount.
"""

from __future__ import annotations

import os

from qedfs.mount.kernel_pages import OPENER, run


class KernelNames:
    """The names of one mount."""

    def __init__(self, mountpoint: str) -> None:
        """`mountpoint`: with symbolic links resolved."""
        self._mountpoint = mountpoint

    async def drop(self, name: str) -> None:
        """Drop a name that is not in the mount any more. If this is cancelled, the kernel goes on by itself."""
        await run([*OPENER, os.path.join(self._mountpoint, name)])
