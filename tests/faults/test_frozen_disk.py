"""A file system is frozen (fsfreeze, a snapshot of LVM): the writes to it wait, and nothing else of the mount does.

On a real ext4. The status and reads are answered while it is frozen; then the thaw lets the writes go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from qedfs.overlay.create import create_overlay
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_check
from tests.harness.mounts import mounted
from tests.harness.process import wait_for
from tests.mount.support import opened
from tests.mount.test_full_disk import small_ext4

MIB = 1 << 20
CLUSTER = 1 << 16
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # <linux/fs.h>
# Where writes go: in place, to a new cluster, to many of them. Each to an image of its own, since the kernel sends
# one write of a file at a time.
WRITES = {"a.raw": (0, b"2" * 4096), "b.raw": (MIB, b"3" * 4096), "c.raw": (2 * MIB, b"4" * MIB)}
OTHERS = ("flushed.raw", "read.raw")


@contextlib.contextmanager
def frozen(disk: Path) -> Iterator[None]:
    """The file system takes no writes while the context is open.

    Not through fsfreeze(8): the fork would close a copy of the image's descriptor, of which FUSE tells a mount that may
    hang, and then there would be no thaw.
    """
    folder = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(folder, FITHAW, 0)
    finally:
        os.close(folder)


def asleep(pid: int) -> int:
    """How many threads of the server sleep until writes are allowed. The one of the event loop must not."""
    sleeps = {int(task.name): (task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()}
    assert "percpu_rwsem" not in sleeps[pid], "the event loop waits"
    return sum("percpu_rwsem" in sleep for sleep in sleeps.values())


def test_only_who_writes_waits_for_the_thaw(tmp_path: Path) -> None:
    with small_ext4(tmp_path / "disk", 64 * MIB) as disk, ThreadPoolExecutor(4) as threads:
        overlays = {name: disk / name.replace(".raw", ".qed") for name in (*WRITES, *OTHERS)}
        for overlay in overlays.values():
            create_overlay(str(overlay), image_size=8 * MIB, backing=None)
        with mounted(disk, tmp_path / "mnt", own_interpreter=True) as mount, contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(opened(mount.path(name))) for name in overlays}
            for fd in files.values():
                os.pwrite(fd, b"1" * CLUSTER, 0)
                os.fsync(fd)
            os.pwrite(files["flushed.raw"], b"5" * 4096, 4 * MIB)  # its entry is still to be committed
            with frozen(disk):
                waiting: list[Future[object]] = [
                    threads.submit(os.pwrite, files[name], data, pos) for name, (pos, data) in WRITES.items()
                ]
                waiting.append(threads.submit(os.fsync, files["flushed.raw"]))
                wait_for(lambda: asleep(mount.pid) == len(waiting), "threads that wait for the thaw")
                assert mount.image("read.raw")["served"]
                os.posix_fadvise(files["read.raw"], 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(files["read.raw"], CLUSTER, 0) == b"1" * CLUSTER
                assert not any(step.done() for step in waiting)
            for step in waiting:
                step.result(timeout=HANG_SECONDS)
            for name, (pos, data) in WRITES.items():
                os.posix_fadvise(files[name], 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(files[name], len(data), pos) == data
            stack.close()
            assert mount.unmount() == 0
        assert [qemu_check(overlay).corruptions for overlay in overlays.values()] == [0] * len(overlays)
