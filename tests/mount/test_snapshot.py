"""A snapshot is the image at a moment between two writes, on the disk, and an overlay of its own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qedfs.control.qmp.client import Client
from qedfs.errors import InStandby, InUse, NoMemory, NoSpace, QedfsError, UsageError
from qedfs.image.live_commit import LiveCommit
from qedfs.mount import snapshot as module
from qedfs.mount.images import Images
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay
from qedfs.source.policy import Policy
from tests.cli.test_json import wrong
from tests.harness.images import qemu_check
from tests.harness.mounts import mounted, qedfs

from .support import CLUSTER_SIZE, MIB, assert_same, create, opened, origin
from .test_discard_mount import file_system, loop_device, tool

SIZE = 4 * CLUSTER_SIZE


@contextlib.asynccontextmanager
async def serving(folder: Path, **create: str) -> AsyncIterator[tuple[Images, Served]]:
    """What a mount of one overlay serves, without the mount."""
    create_overlay(str(folder / "disk.qed"), image_size=SIZE, backing=create.get("backing"))
    (folder / "journals").mkdir()
    async with trio.open_nursery() as nursery:
        policy = Policy((str(folder),))
        options = Options(stream=False, standby="standby" in create, journal_folder=folder / "journals", policy=policy)
        images = Images(str(folder / "disk.qed"), options, nursery)
        await images.registry.scan()
        (served,) = images.registry.images()
        yield images, served
        await images.close()
        nursery.cancel_scope.cancel()


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that can share blocks, played with a copy."""

    def share(source: int, target: int, _: str) -> None:
        while data := os.read(source, MIB):
            os.write(target, data)

    monkeypatch.setattr(module, "_share", share)


@pytest.mark.usefixtures("copying")
async def test_a_snapshot_is_an_overlay_of_its_own_that_needs_no_repair(tmp_path: Path) -> None:
    target = tmp_path / "copies" / "snap.qed"
    target.parent.mkdir()
    async with serving(tmp_path) as (images, served):
        assert served.image is not None
        os.chmod(tmp_path / "disk.qed", 0o640)
        await served.image.write(5, b"before")
        done = await images.snapshots.take(served, str(target), mountpoint="/mnt")
        assert done.file == str(target)
        await served.image.write(5, b"later!")
        await served.image.write(2 * CLUSTER_SIZE, b"later!")
        assert target.stat().st_mode & 0o777 == 0o640
        # The journal of the mount is not replayed into it, and it is free.
        copy = await open_overlay(str(target), writable=True, journal_folder=tmp_path / "journals")
        assert await _bytes(copy, 5, 6) == b"before"
        assert await _bytes(copy, 2 * CLUSTER_SIZE, 6) == b""
        assert copy.journal_remark == ""
        await copy.close()
        assert (await served.image.read(5, 6)) == b"later!"
        with pytest.raises(UsageError, match="exists already"):
            await images.snapshots.take(served, str(target), mountpoint="/mnt")
    assert os.listdir(target.parent) == ["snap.qed"]
    assert qemu_check(target).corruptions == 0


async def _bytes(overlay: object, pos: int, size: int) -> bytes:
    """The bytes of a cluster with data; none if it has no data."""
    (run,) = await overlay.map(pos, size)  # type: ignore[attr-defined]
    buffer = bytearray(size if run.offset > 1 else 0)
    await overlay.read_data(run.offset, memoryview(buffer))  # type: ignore[attr-defined]
    return bytes(buffer)


async def test_there_is_no_such_folder(tmp_path: Path) -> None:
    async with serving(tmp_path) as (images, served):
        with pytest.raises(UsageError, match="No such file"):
            await images.snapshots.take(served, str(tmp_path / "none" / "snap.qed"), mountpoint="/mnt")


@pytest.mark.usefixtures("copying")
async def test_the_name_comes_after_the_content_and_both_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("fsync", "fdatasync", "link"):
        real = getattr(os, name)

        def noted(*args: object, _real: object = real, _name: str = name, **more: object) -> object:
            steps.append(_name)
            return _real(*args, **more)  # type: ignore[operator]

        monkeypatch.setattr(os, name, noted)
    async with serving(tmp_path) as (images, served):
        steps.clear()
        await images.snapshots.take(served, str(tmp_path / "snap.qed"), mountpoint="/mnt")
        after = steps[steps.index("fsync") :]
        assert after == ["fsync", "link", "fsync"]
        assert "fdatasync" in steps


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (errno.EXDEV, QedfsError, "cannot share blocks with the overlay"),
        (errno.EOPNOTSUPP, QedfsError, "qedfs export copies the image while nobody writes to it"),
        (errno.ENOSPC, NoSpace, "the file system is full"),
        (errno.EIO, QedfsError, "cannot be written: Input/output error"),
    ],
)
async def test_a_copy_that_fails_leaves_nothing_and_the_guest_writes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[QedfsError], text: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    closed_by: dict[int, int] = {}
    close = os.close

    def noted(fd: int) -> None:
        closed_by[os.fstat(fd).st_nlink] = threading.get_ident()
        close(fd)

    monkeypatch.setattr(fcntl, "ioctl", fail)
    async with serving(tmp_path) as (images, served):
        assert served.image is not None
        await served.image.write(0, b"a")
        monkeypatch.setattr(os, "close", noted)
        with pytest.raises(error, match=text):
            await images.snapshots.take(served, str(tmp_path / "snap.qed"), mountpoint="/mnt")
        monkeypatch.setattr(os, "close", close)
        assert closed_by[0] != threading.get_ident()  # the kernel drops its blocks then, which takes a while
        await served.image.write(0, b"b")
        assert not (tmp_path / "snap.qed").exists()


async def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to("../mnt")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "link")
    (tmp_path / "loop").symlink_to("loop")
    async with serving(tmp_path, backing="disk.img") as (images, served):
        for file, mountpoint, text in (
            ("snap.qed", "/mnt", "is not an absolute path"),
            (f"{tmp_path}/mnt/snap.qed", f"{tmp_path}/mnt", "is inside the mount"),
            (f"{tmp_path}/link/snap.qed", f"{tmp_path}/mnt", "is inside the mount"),
            (f"{tmp_path}/elsewhere/link/in/snap.qed", f"{tmp_path}/mnt", "is inside the mount"),
            (f"{tmp_path}/loop/snap.qed", "/mnt", "Too many levels"),
            (f"{tmp_path}/elsewhere/snap.qed", "/mnt", r"disk\.img is relative to the folder of the overlay"),
        ):
            with pytest.raises(UsageError, match=text):
                await images.snapshots.take(served, file, mountpoint=mountpoint)


async def test_an_overlay_in_standby_holds_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, backing="disk.img", standby="") as (images, served):
        with pytest.raises(InStandby):
            await images.snapshots.take(served, str(tmp_path / "snap.qed"), mountpoint="/mnt")


@pytest.mark.parametrize("earlier", [True, False])
async def test_while_the_backing_is_written_to_there_is_no_copy_that_would_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    async with serving(tmp_path, backing="base.raw") as (images, served):
        image = served.image
        assert image is not None
        image.committing_down = earlier
        monkeypatch.setattr(module, "_share", lambda *_: setattr(image, "committing_down", True))
        with pytest.raises(InUse, match="is being committed into its backing"):
            await images.snapshots.take(served, str(tmp_path / "snap.qed"), mountpoint="/mnt")
        assert not (tmp_path / "snap.qed").exists()
        image.committing_down = False


@pytest.mark.usefixtures("copying")
async def test_after_a_commit_that_was_interrupted_the_copy_knows_the_version_of_its_backing(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    async with serving(tmp_path, backing="base.raw") as (images, served):
        assert served.image is not None
        await served.image.write(0, b"o" * CLUSTER_SIZE)
        commit = LiveCommit(served.image)
        await commit.begin()
        await commit.copy(0, 1)
        await commit.leave()
        assert served.image.overlay.record.committing
        await images.snapshots.take(served, str(tmp_path / "snap.qed"), mountpoint="/mnt")
    copy = await open_overlay(str(tmp_path / "snap.qed"), writable=False)
    pin = copy.record.pin
    assert pin is not None
    assert (copy.record.committing, pin.last_modified) == (False, str((tmp_path / "base.raw").stat().st_mtime_ns))
    await copy.close()


async def test_a_file_system_that_hangs_holds_no_writer_for_ever_and_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, hangs, used = tmp_path / "snap.qed", threading.Event(), list[tuple[int, ...]]()

    def share(source: int, copy: int, _: str) -> None:
        hangs.wait()
        used.append((os.fstat(source).st_nlink, os.fstat(copy).st_nlink))
        while data := os.read(source, MIB):
            os.write(copy, data)

    monkeypatch.setattr(module, "_share", share)
    monkeypatch.setattr(module, "SHARE_SECONDS", 0.01)
    async with serving(tmp_path) as (images, served):
        assert served.image is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_hang, images, served, target, "has not shared the blocks within")
            await trio.testing.wait_all_tasks_blocked()
            await served.image.write(5, b"later!")
        assert (await served.image.read(5, 6)) == b"later!"
        await expect_hang(images, served, target, "is still waiting for an earlier copy of this overlay")
        hangs.set()
        while images.snapshots._hanging:  # noqa: ASYNC110 - a thread ends
            await trio.sleep(0.001)
        # Its descriptors were those of the overlay and of a file without a name, to the end.
        assert used == [(1, 0)]
        assert sorted(os.listdir(tmp_path)) == ["disk.qed", "journals"]
        monkeypatch.setattr(module, "SHARE_SECONDS", math.inf)
        await images.snapshots.take(served, str(target), mountpoint="/mnt")


async def test_a_copy_for_which_there_is_no_thread_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, start = tmp_path / "snap.qed", trio.to_thread.run_sync

    async def starts(function: Callable[..., object], *args: object, **options: Any) -> object:
        if options:
            raise RuntimeError("can't start new thread")
        return await start(function, *args)

    async with serving(tmp_path) as (images, served):
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(trio.to_thread, "run_sync", starts)
        with pytest.raises(NoMemory, match="no thread can be started"):
            await images.snapshots.take(served, str(target), mountpoint="/mnt")
        assert len(os.listdir("/proc/self/fd")) == before
        assert not images.snapshots._hanging
        assert not target.exists()


async def expect_hang(images: Images, served: Served, target: Path, text: str) -> None:
    with pytest.raises(QedfsError, match=text):
        await images.snapshots.take(served, str(target), mountpoint="/mnt")


# On file systems that share blocks.

DISK = 400 * MIB
MKFS = {"xfs": ("mkfs.xfs", "-q", "-K"), "btrfs": ("mkfs.btrfs", "-q", "-K")}


@contextlib.contextmanager
def sharing(folder: Path, kind: str) -> Iterator[Path]:
    """A file system that can share blocks."""
    disk = folder / kind
    with disk.open("wb") as file:
        file.truncate(DISK)
    tool(*MKFS[kind], disk)
    with loop_device(disk) as device, file_system(device, folder / "fs") as place:
        yield place


class Numbered:
    """A guest that writes its numbers one after the other to places that only its seed decides."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.returned = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def write(self, number: int) -> tuple[int, bytes]:
        source = random.Random(number)
        # Whole pages: the kernel makes two requests of a write that begins or ends within one.
        length = source.choice((1, 2, 16, 37)) * 4096
        return source.randrange(0, self.size - length, 4096), number.to_bytes(8, "big") * (length // 8)

    def _run(self) -> None:
        with opened(self.path) as fd:
            while not self._stop.is_set():
                pos, data = self.write(self.returned)
                os.pwrite(fd, data, pos)
                self.returned += 1

    def __enter__(self) -> Numbered:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("kind", ["xfs", pytest.param("btrfs", marks=pytest.mark.slow)])
def test_a_guest_that_writes_has_written_so_many_and_no_more(tmp_path: Path, kind: str) -> None:
    size = 2 * MIB
    with origin(tmp_path, size) as source, sharing(tmp_path, kind) as place:
        create(place / "disk.qed", source.url)
        with mounted(place, tmp_path / "mnt", "--limit", "512K") as mount:
            taken: list[tuple[Path, int, int]] = []
            with Numbered(mount.path("disk.raw"), size) as guest:
                for number in range(3):
                    before = guest.returned
                    snap = place / f"snap{number}"  # not .qed, so that this mount does not serve it
                    done = json.loads(qedfs("snapshot", mount.mountpoint, "disk", snap, "--json").stdout)
                    assert wrong(done, "qedfs snapshot") == []
                    assert done["file"] == str(snap)
                    taken.append((snap, before, guest.returned))
            assert mount.unmount() == 0
        for snap, least, most in taken:
            assert qemu_check(snap).corruptions == 0
            with mounted(_as_overlay(snap, tmp_path), tmp_path / "look", "--no-stream") as look:
                found = look.path("disk.raw").read_bytes()
            assert any(found == model for model in models(source.data(), guest, least, most)), (least, most)


def _as_overlay(snap: Path, folder: Path) -> Path:
    path = folder / "look-at" / "disk.qed"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(snap, path)
    return path


def models(content: bytes, guest: Numbered, least: int, most: int) -> Iterator[bytes]:
    """The image after so many writes, for each number from `least` to one that was under way after `most`."""
    model = bytearray(content)
    for number in range(most + 1):
        if number >= least:
            yield bytes(model)
        pos, data = guest.write(number)
        model[pos : pos + len(data)] = data
    yield bytes(model)


def test_without_such_a_file_system_it_is_refused(tmp_path: Path) -> None:
    with sharing(tmp_path, "xfs") as place, origin(tmp_path, MIB) as source:
        create(tmp_path / "disk.qed", source.url)
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount:
            done = qedfs("snapshot", mount.mountpoint, "disk", place / "snap", check=False)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1)
            assert "qedfs export" in done.stderr
            assert os.listdir(place) == []
            (tmp_path / "link").symlink_to("mnt")
            with (
                pytest.raises(UsageError, match="is inside the mount"),
                Client.connect(str(mount.mountpoint)) as client,
            ):
                client.execute("x-qedfs-snapshot", device="disk", file=str(tmp_path / "link" / "snap"))
            done = qedfs("snapshot", mount.mountpoint, "disk", mount.mountpoint / "snap", check=False)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            mount.wait()
            assert_same(mount.path("disk.raw"), source.raw)
