"""A complete image leaves the mount when nobody has it open: on disk, its locks free, and it does not come back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from qedfs.errors import InUse, NoSpace, QedfsError, UsageError
from qedfs.image.image import Image
from qedfs.mount.held import HolderLink
from qedfs.mount.images import Images
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay
from tests.cli.support import connections
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_check, qemu_create, qemu_io
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.starter import popen

from .outlives import kill_server, wait_for_takeover, wait_until_serving
from .support import MIB, opened
from .test_inode_numbers import Values

SIZE = 64 << 10


class Link(Values):
    """A holder that only remembers."""

    def __bool__(self) -> bool:
        return True


@contextlib.asynccontextmanager
async def serving(folder: Path, link: Link | None = None) -> AsyncIterator[Images]:
    """What a mount of this folder serves, without the mount."""
    (folder / "journals").mkdir(exist_ok=True)
    async with trio.open_nursery() as nursery:
        values = dict(link.values) if link else None
        options = Options(journal_folder=folder / "journals")
        images = Images(str(folder), options, nursery, link=cast("HolderLink", link), values=values)
        await images.registry.scan()
        try:
            yield images
        finally:
            assert await images.close() == []
            nursery.cancel_scope.cancel()


def complete(folder: Path, name: str = "disk") -> Path:
    path = folder / f"{name}.qed"
    create_overlay(str(path), image_size=SIZE, backing=None)
    return path


def the_image(images: Images) -> Served:
    (served,) = images.registry.everything()
    return served


async def until(true: Callable[[], object]) -> None:
    with trio.fail_after(HANG_SECONDS):
        while not true():  # noqa: ASYNC110 - nothing is set when it becomes so
            await trio.sleep(0.01)


def last_close(served: Served) -> None:
    served.note_release()


async def test_a_job_comes_to_its_end_first_and_one_that_is_paused_is_cancelled(tmp_path: Path) -> None:
    complete(tmp_path)
    async with serving(tmp_path) as images:
        served = the_image(images)
        assert served.jobs is not None
        await served.jobs.stream.resume()
        job = served.jobs.begin("defrag")
        await job.pause()
        served.note_open()
        assert not await images.releases.release(served)
        await trio.testing.wait_all_tasks_blocked()
        active = [job.active]  # its user may resume it, as long as the image is open
        last_close(served)
        await until(lambda: not served.releasing)
        assert [*active, job.active] == [True, False]
        assert images.released.overlays()


@pytest.mark.expect_log("is in use by another program")
async def test_an_open_image_stays_until_it_is_closed(tmp_path: Path) -> None:
    overlay, link = complete(tmp_path), Link()
    async with serving(tmp_path, link) as images:
        served = the_image(images)
        assert served.image is not None
        served.note_open()
        assert not await images.releases.release(served)
        assert not await images.releases.release(served)
        assert served.releasing
        await served.image.write(0, b"guest")
        assert images.registry.by_name("disk.raw") is served
        last_close(served)
        await trio.testing.wait_all_tasks_blocked()
        await until(lambda: not served.releasing)
        assert images.released.overlays() == {"disk.raw": str(overlay)}
        assert (images.registry.everything(), images.registry.by_inode(served.inode)) == ([], None)
        assert not list((tmp_path / "journals").iterdir())
        other = await open_overlay(str(overlay), writable=True)
        assert b"guest" in overlay.read_bytes()
        # The scan passes it over, and a server that has it open itself is named.
        await images.registry.rescan()
        assert images.registry.everything() == []
        os.utime(overlay, (1, 1))  # as after a second, in which nobody would open it
        with pytest.raises(InUse, match=r"disk\.qed"):
            await images.releases.undo("disk.raw")
        await other.close()
        assert not await images.releases.undo("disk.raw")
        await images.registry.rescan()
        assert the_image(images).image is not None
    assert not [key for key in link.values if key.startswith("release/")]


async def test_a_program_that_opens_it_during_the_flush_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(tmp_path)
    async with serving(tmp_path) as images:
        served, flushes = the_image(images), 0
        flush = Image.flush

        async def opened_meanwhile(image: Image) -> None:
            nonlocal flushes
            flushes += 1
            await flush(image)
            if flushes == 1:
                served.note_open()
            elif flushes == 2:  # opened, written and closed again
                served.note_open()
                last_close(served)

        monkeypatch.setattr(Image, "flush", opened_meanwhile)
        assert not await images.releases.release(served)
        assert images.registry.by_name("disk.raw") is served
        last_close(served)
        await until(images.released.overlays)
        assert flushes == 3


@pytest.mark.expect_log("disk.raw: is not released: no room")
async def test_an_image_that_cannot_be_flushed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(tmp_path)
    link = Link()
    async with serving(tmp_path, link) as images:
        served = the_image(images)

        async def fail(_: Image) -> None:
            raise NoSpace("no room")

        with monkeypatch.context() as patch:
            patch.setattr(Image, "flush", fail)
            with pytest.raises(NoSpace, match="no room"):
                await images.releases.release(served)
        assert images.registry.by_name("disk.raw") is served
        assert not served.releasing
        assert not [key for key in link.values if key.startswith("release/")]
        assert await images.releases.release(served)


async def test_what_only_a_mount_can_show_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"d" * SIZE)
    create_overlay(str(tmp_path / "disk.qed"), image_size=SIZE, backing="http://127.0.0.1:9/disk")
    async with serving(tmp_path) as images:
        with pytest.raises(QedfsError, match="so only a mount shows all of it") as refused:
            await images.releases.release(the_image(images))
        assert refused.value.exit_code == 1
        assert the_image(images).image is not None
    async with trio.open_nursery() as nursery:
        single = Images(str(complete(tmp_path, "single")), Options(), nursery)
        await single.registry.scan()
        with pytest.raises(UsageError, match="is the only image of this mount; qedfs umount"):
            await single.releases.release(the_image(single))
        await single.close()
        nursery.cancel_scope.cancel()


async def test_the_next_server_carries_out_an_order_and_leaves_released_files_alone(tmp_path: Path) -> None:
    complete(tmp_path)
    link = Link()
    async with serving(tmp_path, link) as images:
        the_image(images).note_open()
        assert not await images.releases.release(the_image(images))
    assert [key for key in link.values if key.startswith("release/")]
    async with serving(tmp_path, link) as images:
        await until(images.released.overlays)
        # What was released under an order of the first server is served again like any other.
        os.utime(tmp_path / "disk.qed", (1, 1))
        assert await images.releases.undo("disk.raw")
        assert not the_image(images).releasing
        assert await images.releases.release(the_image(images))
    async with serving(tmp_path, link) as images:
        assert images.registry.everything() == []
        assert list(images.released.overlays()) == ["disk.raw"]
        (tmp_path / "disk.qed").unlink()
        complete(tmp_path)
        await images.registry.scan()
        assert not images.released.overlays()
        assert the_image(images).settling or the_image(images).image is not None


@pytest.mark.expect_log("disk.raw: is not released: disk.raw: is not served")
async def test_an_order_ends_with_its_overlay(tmp_path: Path) -> None:
    overlay = complete(tmp_path)
    async with serving(tmp_path) as images:
        served = the_image(images)
        served.note_open()
        assert not await images.releases.release(served)
        overlay.rename(tmp_path / "away")
        await images.registry.scan()
        last_close(served)
        await images.registry.close_if_unused(served)
        await until(lambda: not served.releasing)
        assert not images.released.overlays()


async def test_an_order_that_is_taken_back(tmp_path: Path) -> None:
    complete(tmp_path)
    async with serving(tmp_path) as images:
        served = the_image(images)
        served.note_open()
        assert not await images.releases.release(served)
        assert await images.releases.undo("disk.raw")
        last_close(served)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert images.registry.by_name("disk.raw") is served
        assert not served.releasing


# With the kernel, and with QEMU.


@contextlib.contextmanager
def folder_mounted(folder: Path, *options: str) -> Iterator[Mount]:
    """Two complete overlays that QEMU has made."""
    (folder / "overlays").mkdir()
    for name in ("a", "b"):
        qemu_create(folder / "overlays" / f"{name}.qed", size=4 * MIB)
    with mounted(folder / "overlays", folder / "mnt", *options) as mount:
        yield mount


def test_qemu_opens_what_was_released_at_once(tmp_path: Path) -> None:
    overlay = tmp_path / "overlays" / "a.qed"
    with folder_mounted(tmp_path) as mount, opened(mount.path("b.raw")) as other:
        with opened(mount.path("a.raw")) as fd:
            os.pwrite(fd, b"g" * 65536, MIB)
            done = qedfs("release", mount.mountpoint, "a")
            assert done.stdout == "a.raw: is released as soon as nobody uses it: 1 have it open\n"
            done = qedfs("release", mount.mountpoint, "a", "--wait", "--timeout", "0s", check=False)
            assert (done.returncode, done.stderr.count("\n")) == (7, 2)  # what it waits for, and that it has not come
            assert "released as soon as nobody uses it: a.raw\n" in qedfs("status", mount.mountpoint).stdout
        qedfs("release", mount.mountpoint, "a", "--wait")
        assert "Pattern verification failed" not in qemu_io(overlay, "read -P 0x67 1M 64k", "write -P 1 0 64k")
        assert not mount.path("a.raw").exists()
        assert os.listdir(mount.mountpoint) == ["b.raw"]
        assert mount.status()["released"] == ["a.raw"]
        qedfs("wait", mount.mountpoint, "a", "--for", "unused")
        os.pwrite(other, b"still", 0)
        assert os.pread(other, 5, 0) == b"still"
        done = qedfs("umount", mount.mountpoint, check=False)
        assert done.returncode == 8  # b is open
        assert qedfs("release", mount.mountpoint, "a", "--undo").stdout == "a.raw: is served\n"
        wait_for(mount.path("a.raw").exists, "the image again")
        with opened(mount.path("a.raw")) as fd:
            assert os.pread(fd, 4, 0) == b"\1\1\1\1"
    assert qemu_check(overlay).corruptions == 0


def is_watched(mount: Mount) -> bool:
    """Whether a client stays connected, so that it is past the order."""
    looks = [connections(mount.mountpoint)]
    time.sleep(0.2)
    return all([*looks, connections(mount.mountpoint)])


def test_a_killed_server_leaves_the_order_and_the_release_to_the_next(tmp_path: Path) -> None:
    with folder_mounted(tmp_path, "--restart") as mount:
        wait_until_serving(mount)
        qedfs("release", mount.mountpoint, "b")
        with opened(mount.path("a.raw")) as fd:
            os.pwrite(fd, b"guest", 0)
            qedfs("release", mount.mountpoint, "a")
            waiting = popen(["release", mount.mountpoint, "a", "--wait"], stdout=subprocess.PIPE)
            wait_for(lambda: is_watched(mount), "a command that waits")
            kill_server(mount)
            wait_for_takeover(mount, 1)
            assert os.pread(fd, 5, 0) == b"guest"
            assert mount.status()["released"] == ["b.raw"]
            assert mount.image()["releasing"]
        out, _ = waiting.communicate(timeout=HANG_SECONDS)
        assert out == b"a.raw: is released; its overlay is free\n"
        assert os.listdir(mount.mountpoint) == []
        qemu_io(tmp_path / "overlays" / "a.qed", "write 0 64k")
        assert mount.unmount() == 0
