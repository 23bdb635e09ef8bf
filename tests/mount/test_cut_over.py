"""Standby and cut-over on a real mount over a real NBD server: nothing that was read before is shown or kept after."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_same, random_image
from tests.harness.link import link
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import QEDFS, wait_for
from tests.harness.servers import Server, nbdkit

from .support import CLUSTER_SIZE, MIB, assert_whole, create, opened, read_direct, write_direct

SIZE = 16 * MIB


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return random_image(tmp_path / "disk", SIZE, seed=1)


@contextlib.contextmanager
def served(raw: Path) -> Iterator[Server]:
    # It reads the file for each request, so that changes of it show at once.
    with nbdkit("file", raw, tcp=True) as server:
        yield server


def change(raw: Path, seed: int = 2) -> bytes:
    """The machine at the source writes to every sector of its disk. Returns the new content."""
    content = random_image(raw.with_suffix(".new"), SIZE, seed=seed).read_bytes()
    with opened(raw) as fd:
        os.pwrite(fd, content, 0)
    return content


def tables_and_data(overlay: Path) -> bytes:
    """All of an overlay but its header, where the record is."""
    return overlay.read_bytes()[CLUSTER_SIZE:]


def activate(mount: Mount, *options: str) -> int:
    return qedfs("activate", mount.mountpoint, *options, check=False).returncode


def test_what_was_read_before_the_cut_over_is_neither_shown_nor_kept_after_it(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt") as mount:
            path = mount.path("disk.raw")
            assert mount.image()["state"] == "standby"
            # Like QEMU: open for reading and writing at once, and keep it open. A mapping needs the page cache.
            with opened(path) as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
                assert os.pread(fd, SIZE, 0) == mapped[:] == raw.read_bytes()
                content = change(raw)
                assert read_direct(path, 0, 4096) == content[:4096]  # as it is now
                assert activate(mount) == 0
                assert mapped[:] == content
                assert os.pread(fd, SIZE, 0) == content
                assert read_direct(path, 0, SIZE) == content
                os.pwrite(fd, content[:512], 0)
            mount.wait()
            assert mount.image()["counters"]["kept_asked"] + mount.image()["counters"]["kept_stream"] == SIZE
            assert mount.unmount() == 0
        assert_whole(overlay, raw)


def test_nothing_is_written_to_an_overlay_in_standby(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        before = tables_and_data(overlay)
        with mounted(overlay, tmp_path / "mnt") as mount:
            path = mount.path("disk.raw")
            assert path.read_bytes() == raw.read_bytes()
            with opened(path) as fd:
                with pytest.raises(OSError, match="Read-only"):
                    os.pwrite(fd, b"guest", 0)
                with pytest.raises(OSError, match="Read-only"):
                    os.utime(fd, ns=(0, 0))
            with pytest.raises(OSError, match="Read-only"):
                write_direct(path, 0, bytes(4096))
            punch = subprocess.run(["fallocate", "-p", "-o0", "-l64K", path], capture_output=True, check=False)
            assert b"Read-only" in punch.stderr
            assert mount.unmount() == 0
        # A mount without the option is in standby, too, also after a kill.
        for _ in range(2):
            with mounted(overlay, tmp_path / "mnt") as mount:
                assert mount.image()["state"] == "standby"
                assert mount.path("disk.raw").read_bytes() == raw.read_bytes()
                mount.kill()
        assert tables_and_data(overlay) == before


def test_a_source_that_is_not_there_costs_one_error_and_no_activation(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        server.stop()
        with mounted(overlay, tmp_path / "mnt") as mount:
            path = mount.path("disk.raw")
            with opened(path) as fd:
                with pytest.raises(OSError, match="Input/output"):
                    os.pread(fd, 4096, 0)
                assert (activate(mount, "--dry-run"), activate(mount)) == (4, 4)
                assert mount.image()["state"] == "standby"
                server.restart()
                assert activate(mount, "--dry-run") == 0
                assert mount.image()["state"] == "standby"
                assert activate(mount) == 0
                assert os.pread(fd, 4096, 0) == raw.read_bytes()[:4096]


def test_a_source_of_another_size_is_not_activated(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        server.stop()
        os.truncate(raw, SIZE - MIB)
        server.restart()
        with mounted(overlay, tmp_path / "mnt") as mount:
            assert (activate(mount, "--dry-run"), activate(mount)) == (5, 5)
            assert mount.path("disk.raw").read_bytes() == raw.read_bytes() + bytes(MIB)
            assert mount.image()["state"] == "standby"
            os.truncate(raw, SIZE)
            server.restart()
            assert activate(mount) == 0


class Readers:
    """Threads that read an image over and over, each in its own way, and note what they got after the cut-over."""

    def __init__(self, path: Path, count: int) -> None:
        self.cut = False  # set when `activate` has returned
        self.late: list[tuple[int, bytes]] = []  # what a read that began after that has returned
        self.errors = 0
        self._path = path
        self._ended = False
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        # Every other one past the page cache.
        flags = os.O_RDONLY | (os.O_DIRECT if number % 2 else 0)
        with opened(self._path, flags) as fd, mmap.mmap(-1, 65536) as buffer:
            for pos in itertools.cycle(range(number * 65536, SIZE, 5 * 65536)):
                if self._ended:
                    return
                cut = self.cut
                try:
                    assert os.preadv(fd, [buffer], pos) == 65536
                except OSError:
                    self.errors += 1  # a second after the link has stalled
                    continue
                if cut:
                    self.late.append((pos, buffer[:]))


# In a process of its own: a page fault keeps the interpreter's lock, without which the link does not go on.
MAPPING = """
import hashlib, mmap, sys
with open(sys.argv[1]) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    for line in sys.stdin:
        print(hashlib.sha256(mapped).hexdigest(), flush=True)
"""


@contextlib.contextmanager
def mapping(path: Path) -> Iterator[Callable[[], str]]:
    """A program that maps the image. Each call returns the digest of what it sees."""
    with subprocess.Popen(
        [sys.executable, "-c", MAPPING, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        told, tell = child.stdin, child.stdout

        def look() -> str:
            told.write("\n")
            told.flush()
            return tell.readline().strip()

        try:
            yield look
        finally:
            child.kill()


def test_sixteen_readers_over_a_stalled_link_see_nothing_old(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server, link(server) as slow:
        overlay = create(tmp_path / "disk.qed", slow.url, "--standby")
        with mounted(overlay, tmp_path / "mnt") as mount:
            path = mount.path("disk.raw")
            with mapping(path) as look, Readers(path, 16) as readers:
                assert look() == hashlib.sha256(raw.read_bytes()).hexdigest()
                slow.stall()
                asked = slow.asked
                wait_for(lambda: slow.asked > asked + 16 * 28, "requests whose answers do not come")
                content = change(raw)
                assert activate(mount) == 0
                readers.cut = True
                assert look() == hashlib.sha256(content).hexdigest()
                slow.release()  # what was read before arrives after the cut-over
                mount.wait()
                wait_for(lambda: len(readers.late) > 500, "reads after the cut-over")
            assert [pos for pos, found in readers.late if found != content[pos : pos + 65536]] == []
            assert path.read_bytes() == read_direct(path, 0, SIZE) == content
            assert mount.unmount() == 0
        assert_whole(overlay, raw)


def read_in_vain(path: Path) -> None:
    """Read, and pass over the errors that the end of the mount is."""
    with contextlib.suppress(OSError), opened(path, os.O_RDONLY) as fd:
        os.pread(fd, 4096, 0)


# Over a new connection: nothing at all, or the handshake and no answer to any read.
@pytest.mark.parametrize("free", [0, 2000])
def test_a_link_that_is_dead_for_new_connections_too_leaves_it_in_standby(free: int, tmp_path: Path, raw: Path) -> None:
    with served(raw) as server, link(server) as slow:
        overlay = create(tmp_path / "disk.qed", slow.url, "--standby")
        with mounted(overlay, tmp_path / "mnt") as mount:
            with Readers(mount.path("disk.raw"), 16) as readers:
                slow.stall(new_after=free)
                assert activate(mount) == 4
                assert mount.image()["state"] == "standby"
                slow.release()
                assert activate(mount) == 0
                readers.cut = True
                wait_for(lambda: len(readers.late) > 100, "reads after the cut-over")
            data = raw.read_bytes()
            assert [pos for pos, found in readers.late if found != data[pos : pos + 65536]] == []


@pytest.mark.parametrize("free", [0, 2000])
def test_a_kill_in_the_middle_of_an_activation_leaves_it_in_standby(free: int, tmp_path: Path, raw: Path) -> None:
    with served(raw) as server, link(server) as slow:
        overlay = create(tmp_path / "disk.qed", slow.url, "--standby")
        before = tables_and_data(overlay)
        with mounted(overlay, tmp_path / "mnt") as mount:
            slow.stall(new_after=free)
            reader = threading.Thread(target=read_in_vain, args=(mount.path("disk.raw"),))
            reader.start()
            wait_for(lambda: slow.connections > 0, "the reader's connection")
            with subprocess.Popen([*QEDFS, "activate", str(mount.mountpoint)], stderr=subprocess.DEVNULL) as activating:
                wait_for(lambda: slow.connections > 1, "the connection of the activation")
                mount.kill()
                assert activating.wait(HANG_SECONDS) in (4, 10)
            reader.join()
        assert tables_and_data(overlay) == before
        slow.release()
        with mounted(overlay, tmp_path / "mnt") as mount:
            assert mount.image()["state"] == "standby"


def test_a_kill_after_an_activation_leaves_it_active(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt") as mount:
            content = change(raw)
            assert activate(mount) == 0
            mount.kill()
        # A service manager starts it with the same words again.
        with mounted(overlay, tmp_path / "mnt", "--standby") as mount:
            mount.wait()
            assert mount.path("disk.raw").read_bytes() == content
            assert mount.unmount() == 0
        assert qemu_same(overlay, raw)


def test_the_way_back_drops_what_was_kept_since_the_activation(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        before = tables_and_data(overlay)
        with mounted(overlay, tmp_path / "mnt", "--limit", "1M") as mount, opened(mount.path("disk.raw")) as fd:
            for seed in (3, 4):
                content = raw.read_bytes()
                assert activate(mount) == 0
                # Kept by copy-on-read and by the stream, and in the kernel.
                assert os.pread(fd, 8 * MIB, 0) == content[: 8 * MIB]
                wait_for(lambda: mount.image()["counters"]["kept_asked"] > 4 * MIB, "adopted clusters")
                assert activate(mount, "--undo") == 0
                assert (mount.image()["state"], mount.image()["populated"]) == ("standby", 0)
                assert tables_and_data(overlay) == before
                # The machine goes on at its source.
                content = change(raw, seed=seed)
                assert read_direct(mount.path("disk.raw"), 0, SIZE) == content
                with pytest.raises(OSError, match="Read-only"):
                    os.pwrite(fd, b"guest", 0)
            assert activate(mount, "--undo") == 0  # it is in standby
            assert activate(mount) == 0
            assert os.pread(fd, MIB, 0) == content[:MIB]
            os.pwrite(fd, content[:512], 0)
            refused = qedfs("activate", mount.mountpoint, "--undo", check=False)
            assert (refused.returncode, "a guest has written" in refused.stderr) == (1, True)
            assert mount.image()["state"] == "running"
            qedfs("stream", "limit", mount.mountpoint, "0")
            mount.wait()
            refused = qedfs("activate", mount.mountpoint, "--undo", check=False)
            assert (refused.returncode, "is complete" in refused.stderr) == (1, True)
        assert_whole(overlay, raw)
