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
from tests.harness.images import qemu_same
from tests.harness.link import link
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.starter import popen

from .standby import SIZE, activate, change, raw, served, tables_and_data
from .support import MIB, assert_whole, create, opened, read_direct, write_direct

__all__ = ["raw"]  # a fixture


def test_what_was_read_before_the_cut_over_is_neither_shown_nor_kept_after_it(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt") as mount:
            path = mount.path("disk.raw")
            assert mount.image()["state"] == "standby"
            assert path.read_bytes() == raw.read_bytes()
            raw.write_bytes(raw.read_bytes()[::-1])
            assert path.read_bytes() == raw.read_bytes()  # as it is now
            # Like QEMU: open for reading and writing at once, and keep it open. A mapping needs the page cache. Nobody
            # else opens it until it is active: that would let the kernel drop its pages.
            with opened(path) as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
                assert os.pread(fd, SIZE, 0) == mapped[:] == raw.read_bytes()
                content = change(raw)
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
            server.kill()  # in its own orderly way it would wait for its client
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
                # On a busy machine, a new connection may take longer than an activation allows.
                wait_for(lambda: activate(mount) == 0, "an activation")
                readers.cut = True
                assert look() == hashlib.sha256(content).hexdigest()
                slow.release()  # what was read before arrives after the cut-over
                mount.wait()
                wait_for(lambda: len(readers.late) > 500, "reads after the cut-over")
            assert [pos for pos, found in readers.late if found != content[pos : pos + 65536]] == []
            assert path.read_bytes() == read_direct(path, 0, SIZE) == content
            assert mount.unmount() == 0
        assert_whole(overlay, raw)


def read_in_vain(path: Path, pos: int = 0) -> None:
    """Read, and pass over the errors that the end of the mount is."""
    with contextlib.suppress(OSError), opened(path, os.O_RDONLY) as fd:
        os.pread(fd, 4096, pos)


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
            with popen(["activate", str(mount.mountpoint)], stderr=subprocess.DEVNULL) as activating:
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


def test_the_way_back_ends_what_is_populated_from_a_copy(tmp_path: Path, raw: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(raw.read_bytes())
    with served(raw) as server, served(copy) as other, link(other) as slow:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            assert activate(mount) == 0
            assert read_direct(mount.path("disk.raw"), 0, 4096) == raw.read_bytes()[:4096]
            # Of what it brings, only the last answer is held back, which would come after the next cut-over.
            slow.stall(new_after=SIZE // 2)
            words = ["populate", str(mount.mountpoint), "disk", "--from", slow.url]
            with popen(words, stderr=subprocess.PIPE, text=True) as populate:
                wait_for(lambda: mount.image()["populated"] >= SIZE // 4, "a part of the copy")
                assert activate(mount, "--undo") == 0
                assert mount.image()["populate"]["state"] == "cancelled"
                content = change(raw)
                assert activate(mount) == 0
                slow.release()
                _, remarks = populate.communicate(timeout=HANG_SECONDS)
            assert (populate.returncode, "was cancelled" in remarks) == (1, True)
            assert read_direct(mount.path("disk.raw"), 0, SIZE) == content
            qedfs("stream", "start", mount.mountpoint)
            mount.wait()
            assert mount.unmount() == 0
        assert_whole(overlay, raw)


def test_images_of_one_source_share_nothing_over_a_cut_over(tmp_path: Path, raw: Path) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    with served(raw) as server, link(server) as slow:
        create(folder / "one.qed", slow.url, "--standby")
        create(folder / "other.qed", slow.url, "--standby")
        with mounted(folder, tmp_path / "mnt", "--no-stream") as mount:
            assert activate(mount, "one") == 0
            assert read_direct(mount.path("one.raw"), 0, MIB) == raw.read_bytes()[:MIB]
            # A request of the active image is under way, for the same bytes, when the other one is activated.
            slow.stall()
            asked = slow.asked
            reader = threading.Thread(target=read_in_vain, args=(mount.path("one.raw"), 8 * MIB))
            reader.start()
            wait_for(lambda: slow.asked > asked, "a request whose answer does not come")
            content = change(raw)
            assert activate(mount, "other") == 0
            assert mount.path("other.raw").read_bytes() == content
            slow.release()
            reader.join()
            assert mount.path("other.raw").read_bytes() == content


def test_concurrent_activations_are_one(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server, link(server) as slow:
        overlay = create(tmp_path / "disk.qed", slow.url, "--standby")
        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            words, before = ["activate", str(mount.mountpoint)], slow.connections
            with contextlib.ExitStack() as stack:
                children = [stack.enter_context(popen(words)) for _ in range(4)]
                assert [child.wait(HANG_SECONDS) for child in children] == [0] * 4
            assert slow.connections == before + 1


def test_a_read_only_mount_of_an_overlay_in_standby_stays_there(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt", "--read-only") as mount:
            assert mount.image()["state"] == "standby"
            assert mount.path("disk.raw").read_bytes() == raw.read_bytes()
            refused = qedfs("activate", mount.mountpoint, check=False)
            assert (refused.returncode, "read-only" in refused.stderr) == (1, True)
        refused = qedfs("export", overlay, tmp_path / "copy", "--with-backing", check=False)
        assert (refused.returncode, "is in standby" in refused.stderr) == (1, True)


def test_an_overlay_that_appears_later_is_put_in_standby_too(tmp_path: Path, raw: Path) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    with served(raw) as server, mounted(folder, tmp_path / "mnt", "-o", "standby,standby_writes=hold") as mount:
        create(folder / "later.qed", server.url)
        wait_for(lambda: [image["state"] for image in mount.status()["images"]] == ["standby"], "the overlay")
        assert mount.path("later.raw").read_bytes() == raw.read_bytes()
        assert activate(mount) == 0
        mount.wait()
