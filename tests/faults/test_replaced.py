"""A server that serves another version of the file: in the middle of a session, across a remount, and back again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qedfs.control.qmp.client import Client
from qedfs.overlay.create import create_overlay
from tests.harness.images import random_image
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.servers import nbdkit, nginx
from tests.mount.support import CLUSTER_SIZE, MIB, assert_whole, read_direct

SIZE = 4 * MIB
CHANGED = 5  # the exit code
TIMEOUT = ("--source-timeout", "2s")


class Replaceable(NamedTuple):
    """A server and the two versions of what it serves."""

    url: str
    old: Path
    serve: Callable[[Path], None]


@contextlib.contextmanager
def by_http(folder: Path, location: str) -> Iterator[Replaceable]:
    """Two files of one length; `location` decides what tells them apart."""
    with nginx(folder, location=location) as server:

        def serve(path: Path) -> None:
            # A new name for the same inode: nginx opens the file for each request.
            (folder / "next").unlink(missing_ok=True)
            os.link(path, folder / "next")
            (folder / "next").replace(folder / "disk")

        yield Replaceable(f"{server.url}/disk", _versions(folder, SIZE), serve)


@contextlib.contextmanager
def by_nbd(folder: Path) -> Iterator[Replaceable]:
    """NBD has nothing but the size."""
    old = _versions(folder, SIZE + CLUSTER_SIZE)
    os.link(old, folder / "disk")
    with nbdkit("file", folder / "disk", tcp=True) as server:

        def serve(path: Path) -> None:
            server.stop()
            (folder / "disk").unlink()
            os.link(path, folder / "disk")
            server.restart()

        yield Replaceable(server.url, old, serve)


def _versions(folder: Path, new_size: int) -> Path:
    """Writes `old` and `new`; returns the old one."""
    old = random_image(folder / "old", SIZE, seed=1)
    random_image(folder / "new", new_size, seed=2)
    os.utime(old, (10**9, 10**9))
    return old


KINDS = {
    "ETag": lambda folder: by_http(folder, ""),
    "Last-Modified": lambda folder: by_http(folder, "etag off;"),
    "NBD size": by_nbd,
}


# The ETag takes the road of the date through the mount, and has its tests at the level of the source.
@pytest.fixture(params=[pytest.param("ETag", marks=pytest.mark.slow), "Last-Modified", "NBD size"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Replaceable]:
    folder = tmp_path / "served"
    folder.mkdir()
    with KINDS[request.param](folder) as replaceable:
        replaceable.serve(replaceable.old)
        yield replaceable


def _status(mount: Mount) -> dict[str, Any]:
    """The entry of the image in `qedfs status`, without starting a program for it."""
    with Client.connect(str(mount.mountpoint)) as client:
        image: dict[str, Any] = client.execute("x-qedfs-status")["images"][0]
    return image


def _assert_changed(mount: Mount, old: bytes) -> None:
    """What is local is served, the rest is EIO, writes work, the state and the exit code say why."""
    wait_for(lambda: _status(mount)["state"] == "source-changed", "the state")
    path = mount.path("disk.raw")
    assert read_direct(path, 0, CLUSTER_SIZE) == old[:CLUSTER_SIZE]
    with pytest.raises(OSError, match="Input/output"):
        read_direct(path, SIZE - CLUSTER_SIZE, 4096)
    with path.open("r+b", buffering=0) as image:
        assert image.write(old[:CLUSTER_SIZE]) == CLUSTER_SIZE
    done = qedfs("wait", mount.mountpoint, check=False)
    assert done.returncode == CHANGED
    assert "version" in done.stderr or "is now" in done.stderr


def test_in_a_session_across_a_remount_and_back(server: Replaceable, tmp_path: Path) -> None:
    old = server.old.read_bytes()
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=SIZE, backing=server.url)
    with mounted(overlay, tmp_path / "mnt", "--limit", "1M", *TIMEOUT) as mount:
        wait_for(lambda: _status(mount)["populated"] >= CLUSTER_SIZE, "the stream")
        server.serve(server.old.with_name("new"))
        _assert_changed(mount, old)
        populated = _status(mount)["populated"]
        assert mount.unmount() == 0
    with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
        _assert_changed(mount, old)
        assert _status(mount)["populated"] == populated
        assert "Bring the old version back, or start a new overlay" in mount.output()
        assert mount.unmount() == 0
    server.serve(server.old)
    with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
        wait_for(lambda: _status(mount)["state"] == "complete", "the end of the stream")
        assert mount.unmount() == 0
    assert_whole(overlay, server.old)


@pytest.mark.parametrize("server", ["Last-Modified"], indirect=True)
def test_nothing_was_kept_of_the_old_version(server: Replaceable, tmp_path: Path) -> None:
    """Its version had been stored before the first byte came, which never did."""
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=SIZE, backing=server.url)
    with mounted(overlay, tmp_path / "mnt", "--no-stream", "--no-copy-on-read", *TIMEOUT) as mount:
        assert read_direct(mount.path("disk.raw"), 0, 4096) == server.old.read_bytes()[:4096]
        assert mount.unmount() == 0
    new = server.old.with_name("new")
    server.serve(new)
    with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
        wait_for(lambda: _status(mount)["state"] == "complete", "the end of the stream")
        assert mount.output().count("nothing had been kept") == 1
        assert mount.unmount() == 0
    os.truncate(new, SIZE)
    assert_whole(overlay, new)
