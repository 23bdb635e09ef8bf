"""The sources that one image of a mount gets for itself. Without FUSE."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qedfs.errors import InUse, SourceChanged
from qedfs.image.image import Image
from qedfs.image.live_commit import LiveCommit
from qedfs.image.own_backing import OwnBacking
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.mount.images import Images
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.overlay.create import create_overlay
from qedfs.source.policy import Policy


def alone(own: OwnBacking) -> bool:
    return not own.shared


def named(images: Images, name: str) -> Served:
    return next(served for served in images.registry.everything() if served.name == name)


@pytest.mark.expect_log("is committed into it")
async def test_an_image_whose_source_another_one_has_is_not_committed(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * 65536)
    options = Options(stream=False, policy=Policy((str(tmp_path),)))
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), options, nursery)
        for name in ("one", "two"):
            create_overlay(str(tmp_path / f"{name}.qed"), image_size=65536, backing=str(tmp_path / "base.raw"))
            os.utime(tmp_path / f"{name}.qed", (1, 1))
        await images.registry.scan()
        one, two = images.registry.everything()
        assert isinstance(one.jobs, ImageJobs)
        assert one.image is not None
        own = one.image.own_backing
        assert own is not None
        assert (own.shared, alone(own)) == (True, False)
        with pytest.raises(InUse, match="another image of this mount has it"):
            one.jobs.begin("commit")
        os.unlink(two.path)
        await images.registry.scan()
        assert alone(own)
        # An overlay that appears while the backing is written is served afterwards, not meanwhile. It may name a link.
        (tmp_path / "link.raw").symlink_to("base.raw")
        (tmp_path / "hard.raw").hardlink_to(tmp_path / "base.raw")
        one.image.committing_down = True
        for name in ("base", "link", "hard"):
            create_overlay(str(tmp_path / f"{name}.qed"), image_size=65536, backing=str(tmp_path / f"{name}.raw"))
            os.utime(tmp_path / f"{name}.qed", (1, 1))
        await images.registry.scan()
        for name in ("base.raw", "link.raw", "hard.raw"):
            refusal = named(images, name).refusal
            assert refusal is not None
            assert "is being written: one.raw is committed into it" in str(refusal.error)
        one.image.committing_down = False
        await images.registry.scan()
        for name in ("base.raw", "link.raw", "hard.raw"):
            new = named(images, name)
            assert new.image is not None
            assert await own.linked()
            os.unlink(new.path)
            await images.registry.scan()
        assert not await own.linked()
        await images.registry.scan()
        fetch = await own.fetch()
        assert fetch.remote is not one.image.source
        assert await fetch.identity()
        assert own.fetch_from(fetch.remote).remote is fetch.remote
        await own.release(fetch.remote)
        assert fetch.remote.connected is None
        with trio.CancelScope(shield=True):
            await images.close()
        nursery.cancel_scope.cancel()


@pytest.mark.expect_log("so that the mount serves it as an image")
async def test_an_overlay_over_another_one_of_the_folder_is_refused_unless_that_is_only_read(tmp_path: Path) -> None:
    base, elsewhere = tmp_path / "d" / "base.qed", tmp_path / "base.qed"
    base.parent.mkdir()
    for place in (base, elsewhere):
        create_overlay(str(place), image_size=65536, backing=None)
        os.utime(place, (1, 1))
    for name, backing in (("after", "base.qed"), ("aside", str(elsewhere))):
        overlay = base.parent / f"{name}.qed"
        create_overlay(str(overlay), image_size=65536, backing=backing, raw_backing=False)
        os.utime(overlay, (1, 1))
    for read_only in (False, True):
        async with trio.open_nursery() as nursery:
            options = Options(stream=False, read_only=read_only, policy=Policy((str(tmp_path),)))
            images = Images(str(base.parent), options, nursery)
            await images.registry.scan()
            refusal = named(images, "after.raw").refusal
            assert (refusal is None) is read_only
            assert refusal is None or f"its backing {base} is in the mounted folder" in str(refusal.error)
            assert named(images, "base.raw").image is not None
            assert named(images, "aside.raw").image is not None
            with trio.CancelScope(shield=True):
                await images.close()
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def image_over(base: Path) -> AsyncIterator[Image]:
    """An image with one cluster of its own, over a backing of four, without a mount."""
    folder = str(base.parent)
    await trio.Path(base).write_bytes(b"b" * 4 * 65536)
    create_overlay(f"{folder}/disk.qed", image_size=4 * 65536, backing=str(base))
    options = Options(stream=False, policy=Policy((folder,)))
    async with trio.open_nursery() as nursery:
        images = Images(folder, options, nursery)
        await images.registry.scan()
        (served,) = images.registry.everything()
        assert served.image is not None
        await served.image.write(0, b"o" * 65536)
        yield served.image
        with trio.CancelScope(shield=True):
            await images.close()
        nursery.cancel_scope.cancel()


async def test_a_file_that_takes_the_place_of_the_backing_meanwhile_is_not_pinned(tmp_path: Path) -> None:
    base, copy = tmp_path / "base.raw", tmp_path / "copy.raw"
    async with image_over(base) as image:
        commit = LiveCommit(image)
        await commit.begin()
        shutil.copy(base, copy)
        await commit.copy(0, 1)
        os.replace(copy, base)  # the samples are the same
        with pytest.raises(SourceChanged, match="was replaced by another file since the commit has begun"):
            await commit.settle()
        await commit.leave()
        assert bytes(await image.read(0, 65536 + 1)) == b"o" * 65536 + b"b"


async def test_the_time_of_a_backing_that_was_written_in_part_is_durable_before_it_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, committing = tmp_path / "base.raw", list[bool]()
    fsync = os.fsync
    async with image_over(base) as image:

        def noted(fd: int) -> None:
            if os.path.samestat(os.fstat(fd), base.stat()):
                committing.append(image.overlay.record.committing)
            fsync(fd)

        commit = LiveCommit(image)
        await commit.begin()
        await commit.copy(0, 1)
        await commit.leave()
        monkeypatch.setattr(os, "fsync", noted)
        await image.read(65536, 1)
        assert (committing, image.overlay.record.committing) == ([True], False)
