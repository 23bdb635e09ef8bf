"""A source that accepts and never answers costs its own image: others keep their pace, and the mount can be ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_create
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require
from tests.harness.servers import black_hole

from .support import MIB, create, opened, origin, read_direct

READERS = 200
SIZE = 32 * MIB
DEADLINE_SECONDS = 3.0
# With that many, and that many asynchronous requests, a mount of the kernel's own limits serves nobody else.
MANY = 1000
DEPTH = 256
BAD_SIZE = 256 * MIB
# Opens the image and reads at a place of its own from many threads; says when all of them are under way.
READ_MANY = """
import mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
def read(number):
    try:
        os.preadv(fd, [mmap.mmap(-1, 4096)], number * 131072)
    except OSError as exc:
        os.write(1, b"%d\\n" % exc.errno)
threads = [threading.Thread(target=read, args=(number,)) for number in range(int(sys.argv[2]))]
for thread in threads:
    thread.start()
os.write(1, b"started\\n")
for thread in threads:
    thread.join()
"""

# Read by every Python that starts with it in its PYTHONPATH: a file server that no longer knows the open overlay a.qed.
STALE = """
import errno, os
fstat = os.fstat
def stale(fd):
    if os.path.exists({flag!r}) and os.readlink(f"/proc/self/fd/{{fd}}").endswith("/a.qed"):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return fstat(fd)
os.fstat = stale
"""
# Runs a command on a terminal of its own and copies what is drawn to the standard output.
ON_A_TERMINAL = (sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)")


@contextlib.contextmanager
def readers(image: Path, count: int = READERS) -> Iterator[subprocess.Popen[bytes]]:
    """A process with many threads that wait for an image; killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", READ_MANY, str(image), str(count)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def asynchronous(image: Path, depth: int) -> Iterator[None]:
    """A process with many asynchronous requests for an image; killed at the end."""
    options = f"--filename={image} --ioengine=libaio --iodepth={depth} --direct=1 --rw=randread --bs=4k --readonly"
    process = subprocess.Popen([require("fio"), "--name=bad", *options.split()], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def half_dead(folder: Path, *, deadline_seconds: float = DEADLINE_SECONDS) -> Iterator[tuple[Mount, bytes]]:
    """A mount of bad.raw, whose source is a black hole, and good.raw; and the bytes of the latter."""
    overlays = folder / "overlays"
    overlays.mkdir()
    with black_hole() as url, origin(folder, SIZE) as source:
        create(overlays / "bad.qed", url, "--offline", "--size", str(BAD_SIZE))
        create(overlays / "good.qed", source.url)
        options = ("--source-timeout", f"{deadline_seconds:g}s")
        with mounted(overlays, folder / "mnt", *options) as mount:
            yield mount, source.data()


@pytest.mark.parametrize("load", ["threads", "asynchronous"])
def test_the_other_image_is_served_while_all_of_them_wait(tmp_path: Path, load: str) -> None:
    # What is asserted is an order, since the machine is shared: all this is done before anybody's deadline is over.
    with half_dead(tmp_path, deadline_seconds=60) as (mount, data):
        mount.wait("good.raw")
        bad, count = mount.path("bad.raw"), MANY if load == "threads" else DEPTH
        with readers(bad, count) if load == "threads" else asynchronous(bad, count):
            wait_for(lambda: _waiting(mount) == count, "all readers to wait for the source")
            for _ in range(3):
                assert _read_direct(mount.path("good.raw"), len(data)) == data
            # Names, attributes, writes, buffered reads and the status go on as well.
            assert sorted(os.listdir(mount.mountpoint)) == ["bad.raw", "good.raw"]
            assert bad.stat().st_size == BAD_SIZE
            with opened(mount.path("good.raw")) as fd:
                os.pwrite(fd, data[:4096], 0)
                os.fsync(fd)
            assert mount.path("good.raw").read_bytes() == data
            assert mount.image("good.raw")["state"] == "complete"
            assert _waiting(mount) == count
            os.kill(mount.pid, signal.SIGTERM)
            assert mount.wait_exit() == 0


def _waiting(mount: Mount) -> int:
    count: int = sum(source["readers"] for source in mount.status()["sources"])
    return count


def _read_direct(image: Path, size: int) -> bytes:
    return b"".join(read_direct(image, pos, MIB) for pos in range(0, size, MIB))


def test_umount_ends_though_the_deadline_of_killed_readers_is_far_away(tmp_path: Path) -> None:
    with half_dead(tmp_path, deadline_seconds=600) as (mount, _):
        with readers(mount.path("bad.raw")) as process:
            wait_for(lambda: _waiting(mount) == READERS, "the readers")
            process.kill()
            process.wait(HANG_SECONDS)
        assert mount.unmount() == 0


def test_sigterm_ends_the_mount_while_readers_hang(tmp_path: Path) -> None:
    with half_dead(tmp_path, deadline_seconds=600) as (mount, _), readers(mount.path("bad.raw")) as process:
        os.kill(mount.pid, signal.SIGTERM)
        assert mount.wait_exit() == 0
        # Their requests were answered with an error.
        process.wait(HANG_SECONDS)


def test_readers_of_a_dead_source_get_an_error_in_time(tmp_path: Path) -> None:
    overlay = tmp_path / "disk.qed"
    with black_hole() as url:
        create(overlay, url, "--offline", "--size", str(SIZE))
        with (
            mounted(overlay, tmp_path / "mnt", "--source-timeout", "2s") as mount,
            readers(mount.path("disk.raw")) as process,
        ):
            process.wait(HANG_SECONDS)
            assert process.stdout is not None
            assert process.stdout.read().splitlines() == [b"5"] * READERS


def test_one_bad_overlay_among_many_does_not_hold_up_the_mount(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with black_hole() as url:
        for number in range(5):
            create(overlays / f"bad{number}.qed", url, "--offline", "--size", str(SIZE))
        qemu_create(overlays / "good.qed", size=MIB)
        # Whoever waits for one of the bad ones waits longer than this test may.
        with mounted(overlays, tmp_path / "mnt", "--source-timeout", "1h") as mount:
            assert mount.path("good.raw").read_bytes() == bytes(MIB)
            assert len(mount.status()["images"]) == 6


def test_an_overlay_that_cannot_be_looked_at_any_more_costs_itself_only(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    for name in "ab":
        qemu_create(overlays / f"{name}.qed", size=MIB)
    (tmp_path / "sitecustomize.py").write_text(STALE.format(flag=str(tmp_path / "stale")))
    environment = {"PYTHONPATH": str(tmp_path), "TERM": "xterm"}
    # On a terminal the bars look at every image too.
    with mounted(overlays, tmp_path / "mnt", env=environment, through=ON_A_TERMINAL) as mount:
        wait_for(lambda: "100%" in mount.output(), "bars")
        (tmp_path / "stale").touch()
        time.sleep(1)  # in which the bars are drawn
        assert [image["disk_usage"] > 0 for image in mount.status()["images"]] == [False, True]
        assert os.listdir(mount.mountpoint) == ["b.raw"]
        assert mount.path("b.raw").read_bytes() == bytes(MIB)
        qedfs("umount", mount.mountpoint)
