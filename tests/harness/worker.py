"""What sets a worker of pytest-xdist apart from the other ones: namespaces of its own.

Owns the namespaces. Knows nothing of the tests. Side by side, tests would meet in what a machine has once: a copy of
the mount table that one test makes holds the mounts of all others, and a port that was free a moment ago is taken.
The new mount table is such a copy itself, of the mounts that a user or another run has at this moment. It lets go of
them, or `qedfs umount` would find them in use here until the run ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

from qedfs.host.procfs import mounts

# <linux/sched.h>, <linux/mount.h>, <sys/mount.h>, <linux/sockios.h>, <linux/if.h>
_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def separate() -> None:
    """Gives this process a mount table and a loopback network of its own, if it may have them (root).

    Its threads keep what they have; those it starts from now on, and its children, share the new ones.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET):
        return
    if libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "cannot make the mounts of this worker private")
    for line in mounts():
        if line.kind == "fuse.qedfs":
            libc.umount2(line.place, _MNT_DETACH | _UMOUNT_NOFOLLOW)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
