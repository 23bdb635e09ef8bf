"""A source that accepts and never answers costs its own image: others keep their pace, and the mount can be ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.harness.images import qemu_create
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for

from .support import MIB, create, opened, origin, read_direct

READERS = 200
SIZE = 32 * MIB
DEADLINE_SECONDS = 3.0
# Opens the image and reads at a place of its own from READERS threads; says when all of them are under way.
READ_MANY = f"""
import mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
def read(number):
    try:
        os.preadv(fd, [mmap.mmap(-1, 4096)], number * 131072)
    except OSError as exc:
        os.write(1, b"%d\\n" % exc.errno)
threads = [threading.Thread(target=read, args=(number,)) for number in range({READERS})]
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
def black_hole() -> Iterator[str]:
    """The URL of a server that takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        taken: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/disk"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()


@contextlib.contextmanager
def readers(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with many threads that wait for an image; killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", READ_MANY, str(image)], stdout=subprocess.PIPE)
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
def half_dead(folder: Path) -> Iterator[tuple[Mount, bytes]]:
    """A mount of bad.raw, whose source is a black hole, and good.raw; and the bytes of the latter."""
    overlays = folder / "overlays"
    overlays.mkdir()
    with black_hole() as url, origin(folder, SIZE) as source:
        create(overlays / "bad.qed", url, "--size", str(SIZE))
        create(overlays / "good.qed", source.url)
        options = ("--source-timeout", f"{DEADLINE_SECONDS:g}s")
        with mounted(overlays, folder / "mnt", *options) as mount:
            yield mount, source.data()


def ended_within(seconds: float, mount: Mount) -> bool:
    """Whether the mount ends by itself so soon."""
    begun = time.monotonic()
    mount.wait_exit(seconds + 10)
    return time.monotonic() - begun <= seconds


def test_the_other_image_keeps_its_pace(tmp_path: Path) -> None:
    with half_dead(tmp_path) as (mount, data):
        mount.wait("good.raw")
        alone = _seconds_to_read(mount.path("good.raw"), data)
        with readers(mount.path("bad.raw")):
            wait_for(lambda: mount.image("bad.raw")["opens"] == 1, "the readers")
            beside = min(_seconds_to_read(mount.path("good.raw"), data) for _ in range(3))
            # The machine is shared; what matters is that nobody waits for a deadline.
            assert beside < 3 * alone + 0.5
            # Names, attributes, writes and the status go on as well.
            assert sorted(os.listdir(mount.mountpoint)) == ["bad.raw", "good.raw"]
            assert mount.path("bad.raw").stat().st_size == SIZE
            with opened(mount.path("good.raw")) as fd:
                os.pwrite(fd, data[:4096], 0)
                os.fsync(fd)
            assert mount.image("good.raw")["state"] == "complete"


def _seconds_to_read(image: Path, data: bytes) -> float:
    begun = time.monotonic()
    for pos in range(0, len(data), MIB):
        assert read_direct(image, pos, MIB) == data[pos : pos + MIB]
    return time.monotonic() - begun


def test_umount_ends_soon_after_the_readers_were_killed(tmp_path: Path) -> None:
    with half_dead(tmp_path) as (mount, _):
        with readers(mount.path("bad.raw")) as process:
            process.kill()
            begun = time.monotonic()
            process.wait(DEADLINE_SECONDS + 10)
            # The kernel keeps a killed reader until its request is answered or its interruption is.
            assert time.monotonic() - begun < DEADLINE_SECONDS + 5
        begun = time.monotonic()
        qedfs("umount", mount.mountpoint)
        assert time.monotonic() - begun < 5
        assert mount.wait_exit() == 0


def test_sigterm_ends_the_mount_while_readers_hang(tmp_path: Path) -> None:
    with half_dead(tmp_path) as (mount, _), readers(mount.path("bad.raw")) as process:
        os.kill(mount.pid, signal.SIGTERM)
        assert ended_within(5, mount)
        assert mount.returncode == 0
        # Their requests were answered with an error.
        process.wait(5)


def test_readers_of_a_dead_source_get_an_error_in_time(tmp_path: Path) -> None:
    overlay = tmp_path / "disk.qed"
    with black_hole() as url:
        create(overlay, url, "--size", str(SIZE))
        with (
            mounted(overlay, tmp_path / "mnt", "--source-timeout", "2s") as mount,
            readers(mount.path("disk.raw")) as process,
        ):
            begun = time.monotonic()
            process.wait(10)
            assert time.monotonic() - begun < 6
            assert process.stdout is not None
            assert process.stdout.read().splitlines() == [b"5"] * READERS


def test_one_bad_overlay_among_many_does_not_hold_up_the_mount(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with black_hole() as url:
        for number in range(5):
            create(overlays / f"bad{number}.qed", url, "--size", str(SIZE))
        qemu_create(overlays / "good.qed", size=MIB)
        begun = time.monotonic()
        with mounted(overlays, tmp_path / "mnt") as mount:
            assert mount.path("good.raw").read_bytes() == bytes(MIB)
            assert time.monotonic() - begun < 5


def test_an_overlay_that_cannot_be_looked_at_any_more_costs_itself_only(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    for name in "ab":
        qemu_create(overlays / f"{name}.qed", size=MIB)
    (tmp_path / "sitecustomize.py").write_text(STALE.format(flag=str(tmp_path / "stale")))
    # On a terminal the bars look at every image too.
    with mounted(overlays, tmp_path / "mnt", env={"PYTHONPATH": str(tmp_path)}, through=ON_A_TERMINAL) as mount:
        wait_for(lambda: "100%" in mount.output(), "bars")
        (tmp_path / "stale").touch()
        time.sleep(1)  # in which the bars are drawn
        assert [image["disk_usage"] > 0 for image in mount.status()["images"]] == [False, True]
        assert os.listdir(mount.mountpoint) == ["b.raw"]
        assert mount.path("b.raw").read_bytes() == bytes(MIB)
        qedfs("umount", mount.mountpoint)
