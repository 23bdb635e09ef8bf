"""The end of a mount takes away what is its own, and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from qedfs.image.image import Image
from qedfs.mount.images import Images
from qedfs.mount.mountpoint import mount_info_at
from qedfs.mount.options import Options
from qedfs.mount.source_pool import SourcePool
from qedfs.mount.supervisor import MAX_CLOSING
from qedfs.overlay.create import create_overlay
from tests.harness.fusectl import fusectl
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import mounted
from tests.harness.process import wait_for
from tests.harness.require import require, require_root
from tests.mount.support import MIB, create, mounted_over, origin

# Read by every Python that starts with it in its PYTHONPATH: a disk that, from the moment when {flag} is there, ends no
# call before {together} are under way, and fails for some.
SLOW_DISK = """
import errno, os, threading
fdatasync = os.fdatasync
begun = []
another = threading.Condition()
def slow(fd):
    if os.path.exists({flag!r}):
        with another:
            begun.append(fd)
            another.notify_all()
            another.wait_for(lambda: len(begun) >= {together})
        if os.path.basename(os.readlink(f"/proc/self/fd/{{fd}}")).startswith("bad"):
            raise OSError(errno.EIO, "Input/output error")
    fdatasync(fd)
os.fdatasync = slow
"""


def test_what_was_mounted_in_its_place_stays(tmp_path: Path) -> None:
    require_root()
    with origin(tmp_path, MIB) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        # Holds the detached file system, so that its server serves on.
        with _held(mount.path("disk.raw")) as fd:
            _run("umount", "-l", mount.mountpoint)
            with _tmpfs(mount.mountpoint):
                os.pwrite(fd, b"late", 0)
                os.kill(mount.pid, signal.SIGTERM)
                assert mount.wait_exit() == 0
                assert _kind_at(mount.mountpoint) == "tmpfs"
        assert "another file system is mounted there now; it is left alone" in mount.output()


def test_what_was_mounted_over_it_stays(tmp_path: Path) -> None:
    require_root()
    with (
        origin(tmp_path, MIB) as source,
        mounted_over(tmp_path, source.url, "--no-stream") as mount,
        _tmpfs(mount.mountpoint),
    ):
        os.kill(mount.pid, signal.SIGTERM)
        assert mount.wait_exit() == 0
        assert _kind_at(mount.mountpoint) == "tmpfs"


@pytest.mark.parametrize("way", ["fusectl", "umount -f"])
def test_a_mount_whose_connection_was_cut_is_taken_away(tmp_path: Path, way: str) -> None:
    require_root()
    with origin(tmp_path, MIB) as source:
        with mounted_over(tmp_path, source.url, "--no-stream") as mount, _held(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"late", 0)
            if way == "fusectl":
                _abort(mount.mountpoint)
            else:
                done = subprocess.run([require("umount"), "-f", mount.mountpoint], check=False, timeout=HANG_SECONDS)
                assert done.returncode != 0
            assert mount.wait_exit() == 1
            assert _kind_at(mount.mountpoint) is None
            assert mount.output().count("its connection to the kernel was cut") == 1
        with mounted_over(tmp_path, source.url, "--no-stream") as mount:
            assert mount.path("disk.raw").read_bytes() == b"late" + source.data()[4:]


def test_a_forced_unmount_that_succeeds_is_a_good_end(tmp_path: Path) -> None:
    require_root()
    with origin(tmp_path, MIB) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        wait_for(lambda: "serving" in mount.output(), "the end of the start")
        _run("umount", "-f", mount.mountpoint)
        assert mount.wait_exit() == 0


def test_overlays_are_closed_side_by_side_and_each_failure_is_told(tmp_path: Path) -> None:
    (tmp_path / "overlays").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        SLOW_DISK.format(flag=str(tmp_path / "slow"), together=MAX_CLOSING)
    )
    names = [*(f"good{number}" for number in range(30)), "bad1", "bad2"]
    with origin(tmp_path, MIB) as source:
        first = create(tmp_path / "overlays" / "good0.qed", source.url)
        for name in names[1:]:
            shutil.copy(first, first.with_name(f"{name}.qed"))
        env = {"PYTHONPATH": str(tmp_path / "site")}
        with mounted(first.parent, tmp_path / "mnt", "--no-stream", env=env) as mount:
            wait_for(lambda: "serving" in mount.output(), "the end of the start")
            (tmp_path / "slow").touch()
            os.kill(mount.pid, signal.SIGTERM)
            # Closed one after the other, the first would never be.
            assert mount.wait_exit() == 1
            for name in names:
                assert (f"ERROR {name}.raw: " in mount.output()) == name.startswith("bad")


async def test_connections_are_dropped_when_all_overlays_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2 * MAX_CLOSING):
        create_overlay(str(tmp_path / f"{number}.qed"), image_size=65536, backing="http://127.0.0.1:1/disk")
    events = []
    under_way = 0
    close, aclose = Image.close, SourcePool.aclose

    async def noted_close(image: Image) -> None:
        nonlocal under_way
        under_way += 1
        events.append(under_way)
        await trio.sleep(0.01)
        await close(image)
        under_way -= 1

    async def noted_aclose(sources: SourcePool) -> None:
        events.append(-under_way)
        await aclose(sources)

    monkeypatch.setattr(Image, "close", noted_close)
    monkeypatch.setattr(SourcePool, "aclose", noted_aclose)
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), Options(stream=False), nursery)
        await images.registry.scan()
        assert await images.close() == []
        nursery.cancel_scope.cancel()
    assert len(events) == 2 * MAX_CLOSING + 1
    assert max(events) == MAX_CLOSING
    assert events[-1] == 0


def _abort(mountpoint: Path) -> None:
    """Cut the connection through fusectl."""
    standing = mount_info_at(str(mountpoint))
    assert standing is not None
    with fusectl() as connections:
        (connections / standing.device.split(":")[1] / "abort").write_text("1")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int]:
    """A descriptor whose file system may end before it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        # ENOTCONN: the descriptor is closed all the same.
        with contextlib.suppress(OSError):
            os.close(fd)


def _kind_at(place: Path) -> str | None:
    standing = mount_info_at(str(place))
    return None if standing is None else standing.kind


@contextlib.contextmanager
def _tmpfs(place: Path) -> Iterator[None]:
    _run("mount", "-t", "tmpfs", "tmpfs", place)
    try:
        yield
    finally:
        _run("umount", "-l", place)


def _run(command: str, *arguments: str | Path) -> None:
    subprocess.run([require(command), *arguments], check=True, timeout=HANG_SECONDS)
