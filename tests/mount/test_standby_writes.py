"""Writes that come in standby, on a real mount: they wait for the cut-over, bring it, or fail."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_same
from tests.harness.mounts import mounted
from tests.harness.process import wait_for

from .standby import SIZE, activate, change, raw, served
from .support import MIB, create, opened, write_direct

__all__ = ["raw"]  # a fixture


class Writing(threading.Thread):
    """A write in a thread, to the page cache or past it, and its error."""

    def __init__(self, path: Path, pos: int, data: bytes, *, direct: bool) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._words = (path, pos, data)
        self._direct = direct
        self.start()

    def run(self) -> None:
        path, pos, data = self._words
        try:
            if self._direct:
                write_direct(path, pos, data)
                return
            with opened(path) as fd:
                os.pwrite(fd, data, pos)
        except OSError as exc:
            self.error = exc


# Buffered: the kernel locks the page that it waits to write. Not whole: the rest is fetched from the new source.
@pytest.mark.parametrize("how", ["hold", "activate"])
def test_writes_that_come_before_the_cut_over_wait_for_it_or_bring_it(how: str, tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt", "--standby-writes", how) as mount:
            path = mount.path("disk.raw")
            with opened(path) as fd:
                assert os.pread(fd, SIZE, 0) == raw.read_bytes()  # in the page cache
                content = bytearray(change(raw))
                writes = [(512, b"a" * 512, False), (MIB, b"b" * 8192, True), (2 * MIB - 100, b"c" * 70000, False)]
                threads = [Writing(path, pos, data, direct=direct) for pos, data, direct in writes]
                if how == "hold":
                    wait_for(lambda: mount.image()["opens"] == 1 + len(writes), "the writers have it open")
                    assert mount.image()["state"] == "standby"
                    assert activate(mount) == 0
                for thread in threads:
                    thread.join()
                    assert thread.error is None
                for pos, data, _ in writes:
                    content[pos : pos + len(data)] = data
                wait_for(lambda: mount.image()["state"] != "standby", "the end of the standby")
                assert activate(mount) == 0  # which waits for the one that a write has begun
                assert os.pread(fd, SIZE, 0) == content
            mount.wait()
            assert path.read_bytes() == content
            assert mount.unmount() == 0
        assert first_difference_in(overlay, bytes(content), tmp_path) is None


def first_difference_in(overlay: Path, content: bytes, folder: Path) -> int | None:
    """Where the overlay differs from these bytes, by QEMU's reading of it."""
    expected = folder / "expected"
    expected.write_bytes(content)
    return None if qemu_same(overlay, expected) else 0


def test_a_write_that_would_activate_fails_with_the_activation(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        server.stop()
        with mounted(overlay, tmp_path / "mnt", "--standby-writes", "activate") as mount:
            with opened(mount.path("disk.raw")) as fd, pytest.raises(OSError, match="Input/output"):
                os.pwrite(fd, b"guest", 0)
            assert mount.image()["state"] == "standby"
            server.restart()
            with opened(mount.path("disk.raw")) as fd:
                os.pwrite(fd, b"guest", 0)
            assert mount.image()["state"] != "standby"


def test_a_killed_writer_and_the_end_of_the_mount_end_a_held_write(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt", "--standby-writes", "hold") as mount:
            words = ["dd", "if=/dev/zero", f"of={mount.path('disk.raw')}", "bs=4096", "count=1", "conv=notrunc"]
            with subprocess.Popen(words, stderr=subprocess.DEVNULL) as writer:
                wait_for(lambda: mount.image()["opens"] == 1, "the writer has it open")
                writer.kill()
                assert writer.wait(HANG_SECONDS) < 0
            wait_for(lambda: mount.image()["opens"] == 0, "the image is closed")
            with subprocess.Popen(words, stderr=subprocess.DEVNULL) as writer:
                wait_for(lambda: mount.image()["opens"] == 1, "the writer has it open")
                os.kill(mount.pid, signal.SIGTERM)
                assert mount.wait_exit() == 0
                assert writer.wait(HANG_SECONDS) == 1
        with mounted(overlay, tmp_path / "mnt") as mount:
            assert mount.image()["state"] == "standby"
