"""Standby and cut-over on a real mount over a real NBD server: nothing that was read before is shown or kept after."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.images import random_image
from tests.harness.mounts import Mount, mounted, qedfs
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
