"""Finds the images for whose reads nobody waits any more, so that their readers' places come free.

Owns the look at who has an image open. Must not know how a read waits, nor for what.

The kernel keeps a process that was killed until its reads are answered (O_DIRECT and writes; it tells nobody of it, but
for an interruption that pyfuse3 does not pass on), and an unmount until read-ahead is answered whose reader has long
gone. That takes as long as a source's deadline. Nobody waits for an image when

- all that have it open are dying. A process is when SIGKILL is pending or it is exiting. Others may have it open that
  cannot be seen from here (another user's, another PID namespace's, a mapping): the kernel's count of opens tells;
- or it is unmounted, every open() of it has seen a close(), and nobody who lives has it open as far as can be seen. The
  kernel sends FLUSH for a close(), but RELEASE only when the last read has been answered. (A close() alone says little:
  a shell that redirects closes a copy. And after a lazy unmount programs go on.)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import trio

from qedfs.mount.served import Served

LOOK_SECONDS = 1.0  # from one look to the next; a read that is younger is left alone
_KILLED = 1 << 8  # SIGKILL in the masks of /proc/PID/status: bit 9 - 1
_PF_EXITING = 0x4  # <linux/sched.h>, in the flags of /proc/PID/stat


async def release_abandoned_reads(
    images: Callable[[], Sequence[Served]], mountpoint: str, stands: Callable[[], bool]
) -> None:
    """Give up the reads that nobody waits for, until cancelled. `stands`: whether the mount is still there."""
    limiter = trio.CapacityLimiter(1)
    while True:
        await trio.sleep(LOOK_SECONDS)
        began = trio.current_time()
        waiting = [served for served in images() if _waits(served)]
        if not waiting:
            continue
        if stands():
            # One that was closed and not released yet is read-ahead of somebody who has gone.
            opens = {os.path.join(mountpoint, one.name): max(1, one.opens - one.closes) for one in waiting}
            deserted = await trio.to_thread.run_sync(held_by_the_dying, opens, abandon_on_cancel=True, limiter=limiter)
            left = [served for served in waiting if os.path.join(mountpoint, served.name) in deserted]
        else:
            inodes = {one.name: one.inode for one in waiting if one.closes >= one.opens}
            held = await trio.to_thread.run_sync(held_by_the_living, inodes, abandon_on_cancel=True, limiter=limiter)
            left = [one for one in waiting if one.name in inodes and one.name not in held]
        for served in left:
            if served.image is not None:
                served.image.give_up(since=began)


def _waits(served: Served) -> bool:
    since = None if served.image is None else served.image.waiting_since
    return since is not None and trio.current_time() - since >= LOOK_SECONDS


def held_by_the_dying(opens: dict[str, int]) -> set[str]:
    """Of these files, each opened so many times, those that nobody has open but processes that are dying."""
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


def held_by_the_living(inodes: dict[str, int]) -> set[str]:
    """Of these names, with their inodes, those that a process which is not dying has open somewhere.

    Not by the path, which is another one in each mount namespace, and none after an unmount.
    """
    return {
        name
        for task in _tasks()
        for link, file in _links(task)
        if (name := os.path.basename(file)) in inodes and _inode(task, link) in (None, inodes[name])
        if not is_dying(task)
    }


def _inode(task: Path, link: str) -> int | None:
    """The inode behind a descriptor, without asking its file system; None if the kernel does not say (before 5.14)."""
    try:
        lines = (task / "fdinfo" / link).read_bytes().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(b"ino:")), None)


def is_dying(task: Path) -> bool:
    """Whether a process or thread will do nothing any more. `task`: its folder in /proc; it may be gone by now."""
    try:
        lines = (task / "status").read_bytes().splitlines()
        masks = [int(line.split()[1], 16) for line in lines if line.startswith((b"SigPnd:", b"ShdPnd:"))]
        # After the name, which is in brackets and may hold any: state, ppid, pgrp, session, tty, tpgid, flags.
        flags = int((task / "stat").read_bytes().rpartition(b")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return True
    return bool(flags & _PF_EXITING or any(mask & _KILLED for mask in masks))


def _tasks() -> Iterator[Path]:
    """One for each process: a thread that still has files. The first one is often gone when others are not."""
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
    """Its descriptors, and what they lead to. Reading these links asks nothing of the file systems they lead to."""
    try:
        links = os.listdir(task / "fd")
    except OSError:
        return
    for link in links:
        try:
            yield link, os.readlink(task / "fd" / link)
        except OSError:
            continue
