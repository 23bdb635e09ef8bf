"""What a commit of a served image would write: the figures of the commit itself, and both files as before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qedfs.errors import InUse, SourceChanged, UsageError
from qedfs.fetch.queue import FetchQueue
from qedfs.format.header import BACKING_FILE, NEED_CHECK
from qedfs.image import backing_file, commit_look
from qedfs.image.commit_down import Committed
from qedfs.image.commit_look import look
from qedfs.image.commit_target import RawTarget
from qedfs.image.image import Image
from qedfs.overlay.open import open_overlay
from qedfs.source.base import Source
from qedfs.source.local import LocalSource
from qedfs.source.policy import Policy
from qedfs.source.qed import QedSource
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.dead_server import DeadServer
from tests.harness.hang import HANG_SECONDS
from tests.image.commits import BASE, CHANGED, CLUSTER, DATA, OWN, SIZE, ZEROS, qed_base
from tests.overlay.images import filled

GROWN = SIZE - len(BASE)


class Own:
    """An `OwnBacking` of a file in a folder. Nobody asks it for a source."""

    def __init__(self, folder: Path) -> None:
        self.policy = Policy((str(folder),))
        self.shared = False
        self.others = False  # whether another image has the file under another name

    async def linked(self) -> bool:
        return self.others

    async def fetch(self) -> FetchQueue:
        raise AssertionError("a look needs no source of its own")

    def fetch_from(self, remote: RetryingSource) -> FetchQueue:
        raise AssertionError("a look needs no source of its own")

    async def release(self, remote: RetryingSource) -> None:
        raise AssertionError("a look needs no source of its own")


@contextlib.asynccontextmanager
async def image_over(
    folder: Path, backing: bytes = BASE, *, qed: bool = False, own: dict[int, bytes | int] = OWN
) -> AsyncIterator[Image]:
    """The image of an overlay and a backing in real files, disk.qed and base.raw, which has no pin yet.

    `own`: the clusters that the overlay has.
    """
    base, overlay = folder / "base.raw", folder / "disk.qed"
    base.write_bytes(backing)
    built = filled(own, image_size=SIZE)
    if qed:
        built.replace(features=BACKING_FILE)  # the format is found out
    overlay.write_bytes(built.data)
    location, own_backing = parse_location(str(base)), Own(folder)

    async def opened() -> Source:
        file = await LocalSource.open(location, own_backing.policy)
        return await QedSource.open(file, str(base)) if qed else file

    async with trio.open_nursery() as nursery:
        fetch = FetchQueue(RetryingSource(location, opened), CLUSTER, nursery)
        image = Image("disk.raw", await open_overlay(str(overlay), writable=True, journal_folder=folder), fetch)
        image.own_backing = own_backing
        yield image
        await image.close()
        nursery.cancel_scope.cancel()


def state(folder: Path) -> list[object]:
    """Bytes and times of both files."""
    files = [folder / "base.raw", folder / "disk.qed"]
    return [(file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ctime_ns) for file in files]


async def test_it_tells_what_the_commit_would_and_changes_nothing(tmp_path: Path) -> None:
    async with image_over(tmp_path) as image:
        before = state(tmp_path)
        assert await look(image, 0) == (Committed(DATA, ZEROS, CHANGED, GROWN), None)
        assert image.overlay.record.pin is None
        assert state(tmp_path) == before


async def test_the_backing_would_grow_also_if_there_is_nothing_to_copy(tmp_path: Path) -> None:
    async with image_over(tmp_path, own={}) as image:
        assert await look(image, 0) == (Committed(grown=GROWN), None)


async def test_what_no_commit_has_written_to_the_overlay_file_counts(tmp_path: Path) -> None:
    async with image_over(tmp_path) as image:
        await image.write(10 * CLUSTER, b"g" * CLUSTER)
        before = state(tmp_path)
        assert await look(image, 0) == (Committed(DATA + CLUSTER, ZEROS, CHANGED + CLUSTER, GROWN), None)
        assert image.overlay.commit_pending
        assert state(tmp_path) == before


@pytest.mark.parametrize(("bound", "value"), [("PART_BYTES", 1), ("MOST_PIECES", 1)])
async def test_the_parts_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> None:
    monkeypatch.setattr(commit_look, bound, value)
    monkeypatch.setattr(commit_look, "PIECE_BYTES", 2 * CLUSTER)
    async with image_over(tmp_path) as image:
        parts, pos = [], 0
        while True:
            part, following = await look(image, pos)
            parts.append(part)
            if following is None:
                break
            assert following > pos
            pos = following
        sums = [sum(getattr(part, key) for part in parts) for key in ("data", "zeros", "written")]
        assert (len(parts) > 4, sums) == (True, [DATA, ZEROS, CHANGED])
        assert max(part.grown for part in parts) == GROWN


@pytest.mark.expect_log("was not closed cleanly")
async def test_a_qed_backing_would_get_all_of_it(tmp_path: Path) -> None:
    async with image_over(tmp_path, qed_base(), qed=True) as image:
        before = state(tmp_path)
        assert await look(image, 0) == (Committed(DATA, ZEROS, DATA + ZEROS, GROWN), None)
        assert state(tmp_path) == before
        header = bytearray((tmp_path / "base.raw").read_bytes())
        header[16] |= NEED_CHECK  # the low byte of the features
    async with image_over(tmp_path, bytes(header), qed=True) as image:
        with pytest.raises(UsageError, match="was not closed cleanly"):
            await look(image, 0)


async def test_what_the_commit_would_refuse_is_refused(tmp_path: Path) -> None:
    async with image_over(tmp_path) as image:
        with (tmp_path / "base.raw").open("r+b"), pytest.raises(InUse):
            await look(image, 0)
        assert isinstance(image.own_backing, Own)
        image.own_backing.shared = True
        with pytest.raises(InUse, match="another image of this mount"):
            await look(image, 0)
        image.own_backing.shared = False
        image.own_backing.others = True
        with pytest.raises(InUse, match="another image of this mount"):
            await look(image, 0)
        image.own_backing.others = False
        os.replace(tmp_path / "base.raw", tmp_path / "old")
        (tmp_path / "base.raw").write_bytes(BASE)
        with pytest.raises(SourceChanged, match="was replaced by another file"):
            await look(image, 0)
        os.replace(tmp_path / "base.raw", tmp_path / "new")
        os.link(tmp_path / "disk.qed", tmp_path / "base.raw")
        with pytest.raises(UsageError, match="is the overlay itself"):
            await look(image, 0)


@pytest.mark.parametrize(("owner", "name"), [(backing_file, "_found"), (os, "access"), (RawTarget, "_store")])
async def test_a_look_at_a_dead_file_server_ends_when_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    async with image_over(tmp_path) as image:
        with DeadServer() as dead_server, monkeypatch.context() as patched:
            patched.setattr(owner, name, dead_server.under(getattr(owner, name)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look, image, 0)
                await dead_server.asked()
                nursery.cancel_scope.cancel()
            assert dead_server.waiting
        with trio.fail_after(HANG_SECONDS):
            while str(tmp_path / "base.raw") in locked_files():  # noqa: ASYNC110 - a thread closes it
                await trio.sleep(0.001)
        assert await look(image, 0) == (Committed(DATA, ZEROS, CHANGED, GROWN), None)


def locked_files() -> list[str]:
    """The files that this process has open as a look does. (The image's own source has its file open without locks.)"""
    found = []
    for info in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "OFDLCK" in info.read_text():
                found.append(os.readlink(f"/proc/self/fd/{info.name}"))
    return found
