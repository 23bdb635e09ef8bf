"""Finds images whose waiting reads nobody needs any more, and gives these reads up.

Owns the check of who has an image open. Must not know how a read waits, nor what for.

A killed process does not end before its O_DIRECT reads and its writes are answered. The kernel reports the kill with
FUSE_INTERRUPT only, which pyfuse3 ignores. Likewise an unmount does not end before read-ahead is answered, even if the
reader has long gone. Both may take as long as a source's deadline. Nobody needs the reads of an image if

- all processes that have it open are dying: SIGKILL is pending, or the process is exiting. Some processes cannot be
  seen from here (another user's, another PID namespace's, a memory mapping), so their number is compared with the
  kernel's count of opens;
- or it is unmounted, every open() has been matched by a close() or belongs to a dying process, and no living process is
  seen to have it open. The kernel sends FLUSH at a close(), but RELEASE only after the last read has been answered. (A
  close() alone proves little: a shell that redirects closes a duplicate, and programs go on after a lazy unmount.)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import trio

from qedfs.host.beat import next_beat
from qedfs.host.device import device_of
from qedfs.mount.served import Served

LOOK_SECONDS = 1.0  # between checks; younger reads are left alone
_KILLED = 1 << 8  # SIGKILL in the masks of /proc/PID/status: bit 9 - 1
_PF_EXITING = 0x4  # <linux/sched.h>, in the flags of /proc/PID/stat


async def release_abandoned_reads(
    images: Callable[[], Sequence[Served]], mountpoint: str, stands: Callable[[], bool], device: Callable[[], str]
) -> None:
    """Give up reads that nobody needs, until cancelled.

    `images`: those that are open. `stands`: whether the mount is still there. `device`: see `holders`.
    """
    limiter = trio.CapacityLimiter(1)
    while True:
        await next_beat(LOOK_SECONDS)
        began = trio.current_time()
        waiting = [served for served in images() if _waits(served)]
        if not waiting:
            continue
        if stands():
            # An open that was closed but not released is read-ahead of a process that has ended.
            opens = {os.path.join(mountpoint, one.name): max(1, one.opens - one.closes) for one in waiting}
            deserted = await trio.to_thread.run_sync(held_by_the_dying, opens, abandon_on_cancel=True, limiter=limiter)
            left = [served for served in waiting if os.path.join(mountpoint, served.name) in deserted]
        else:
            inodes = {one.name: one.inode for one in waiting}
            held, dying = await trio.to_thread.run_sync(
                holders, inodes, device(), abandon_on_cancel=True, limiter=limiter
            )
            left = [one for one in waiting if one.name not in held and one.opens <= one.closes + dying[one.name]]
        for served in left:
            if served.image is not None:
                served.image.give_up(since=began)


def _waits(served: Served) -> bool:
    since = None if served.image is None else served.image.waiting_since
    return since is not None and trio.current_time() - since >= LOOK_SECONDS


def held_by_the_dying(opens: dict[str, int]) -> set[str]:
    """The files that only dying processes have open. `opens`: path -> the kernel's count of opens."""
    dying: Counter[str] = Counter()
    living: set[str] = set()
    for task in _tasks():
        found = [file for _, file in _links(task) if file in opens]
        if not found:
            continue
        if is_dying(task):
            dying.update(found)
        else:
            living.update(found)
    return {file for file, count in opens.items() if file not in living and 0 < count <= dying[file]}


def holders(inodes: dict[str, int], device: str) -> tuple[set[str], Counter[str]]:
    """Who has these files open: the names that living processes have, and how many descriptors dying ones have of each.

    `inodes`: name -> inode. `device`: of our file system; if it is "", no file is told apart by it. The path does not
    matter: it differs between mount namespaces, and there is none after an unmount.
    """
    living: set[str] = set()
    dying: Counter[str] = Counter()
    for task in _tasks():
        links = ((link, os.path.basename(file)) for link, file in _links(task))
        names = [name for link, name in links if name in inodes and _may_be(task, link, inodes[name], device)]
        if names and is_dying(task):
            dying.update(names)
        else:
            living.update(names)
    return living, dying


def _may_be(task: Path, link: str, inode: int, device: str) -> bool:
    """Whether a descriptor may be of this inode of ours, which is told without asking its file system.

    Since Linux 5.14 the kernel tells the inode. Other mounts may well have the same name and inode: the first image of
    every mount of ours has the inode 2. They are told by their device, as the table of mounts does not have those of
    other mount namespaces, nor what was unmounted lazily.
    """
    try:
        lines = (task / "fdinfo" / link).read_bytes().splitlines()
    except OSError:
        return True
    if any(line.startswith(b"ino:") and int(line[4:]) != inode for line in lines):
        return False
    # What cannot be told counts as ours.
    return not device or device_of(f"{task}/fd/{link}") in ("", device)


def is_dying(task: Path) -> bool:
    """Whether a process or thread is dead or dying. `task`: its folder in /proc, which may have disappeared."""
    try:
        lines = (task / "status").read_bytes().splitlines()
        masks = [int(line.split()[1], 16) for line in lines if line.startswith((b"SigPnd:", b"ShdPnd:"))]
        # After the name, which is in brackets and may hold anything: state, ppid, pgrp, session, tty, tpgid, flags.
        flags = int((task / "stat").read_bytes().rpartition(b")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return True
    return bool(flags & _PF_EXITING or any(mask & _KILLED for mask in masks))


def _tasks() -> Iterator[Path]:
    """For each process a thread that still has files. The main thread may have ended before the others."""
    try:
        processes = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return
    for process in processes:
        folder = Path(f"/proc/{process}")
        try:
            yield next((task for task in (folder / "task").iterdir() if any((task / "fd").iterdir())), folder)
        except OSError:
            continue


def _links(task: Path) -> Iterator[tuple[str, str]]:
    """(descriptor, path) of its open files. Reading these links sends no request to the files' file systems."""
    try:
        links = os.listdir(task / "fd")
    except OSError:
        return
    for link in links:
        try:
            yield link, os.readlink(task / "fd" / link)
        except OSError:
            continue
