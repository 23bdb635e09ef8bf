"""A commit of a served image on two recording disks, with a guest beside it, for power cuts of both."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio

from qedfs.errors import QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.image import live_commit
from qedfs.image.backing_file import BackingFile
from qedfs.image.commit_target import RawTarget
from qedfs.image.image import Image
from qedfs.image.live_commit import LiveCommit
from qedfs.image.qed_target import QedTarget
from qedfs.overlay.open import open_storage
from qedfs.source.base import Identity, Source
from qedfs.source.policy import Policy
from qedfs.source.qed import QedSource
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.source import FakeSource
from tests.image.commits import CLUSTER, SIZE, Two, wanted
from tests.model import SectorModel

LOCATION = parse_location("/base.raw")


class Disk(FakeSource):
    """The backing as a mount opens it. Its version is a time: "old" until it is written to, "new" afterwards."""

    def __init__(self, content: Callable[[], bytes], modified: str) -> None:
        super().__init__(content(), round_trip=0, etag=None, last_modified=modified)
        self._now = content

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        self.content = self._now()
        await super().read(pos, buffer, urgent=urgent)


class Own:
    """An `OwnBacking` of the recording disk."""

    policy = Policy(())
    shared = False
    is_linked = False

    def __init__(self, two: Two, nursery: trio.Nursery) -> None:
        self._two = two
        self._nursery = nursery
        self.released: list[RetryingSource] = []

    async def linked(self) -> bool:
        return self.is_linked

    async def fetch(self) -> FetchQueue:
        return self.fetch_from(self.source())

    def source(self) -> RetryingSource:
        modified = "old" if self._two.backing.bytes == self._two.backing.start else "new"
        disk = Disk(lambda: bytes(self._two.backing.bytes), modified)

        async def opened() -> Source:
            disk.identity = Identity(len(self._two.backing.bytes), last_modified=modified)
            disk.content = bytes(self._two.backing.bytes)
            return await QedSource.open(disk, "/base") if self._two.qed else disk

        return RetryingSource(LOCATION, opened, samples=disk.samples)

    def fetch_from(self, remote: RetryingSource) -> FetchQueue:
        return FetchQueue(remote, CLUSTER, self._nursery)

    async def release(self, remote: RetryingSource) -> None:
        self.released.append(remote)
        await remote.aclose()


class Fails:
    """Takes the place of a step that fails once."""

    def __init__(self, step: Callable[..., Any], error: Exception) -> None:
        self._step, self._error = step, error
        self.failed = False

    def __call__(self, *arguments: object) -> object:
        if self.failed:
            return self._step(*arguments)
        self.failed = True
        raise self._error


@contextlib.asynccontextmanager
async def image_of(two: Two, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Image]:
    """The image of both, whose commit works on the recording disk."""

    async def found(self: LiveCommit) -> BackingFile:
        await self._image.source_size()
        return BackingFile("/base", os.stat("/"), two.qed)

    async def unused(*_: object) -> None: ...

    async def qed(*_: object) -> QedTarget:
        target = await two.target()
        assert isinstance(target, QedTarget)
        return target

    async def raw(*_: object) -> RawTarget:
        return await RawTarget.of(two.backing, lambda: None)

    monkeypatch.setattr(LiveCommit, "_found", found)
    monkeypatch.setattr(LiveCommit, "_check_file", lambda *_: None)
    monkeypatch.setattr(live_commit, "open_qed", qed)
    monkeypatch.setattr(live_commit, "check_unused", unused)
    monkeypatch.setattr(live_commit, "open_raw", raw)
    monkeypatch.setattr(RawTarget, "close", unused)
    async with trio.open_nursery() as nursery:
        own = Own(two, nursery)
        image = Image("disk.raw", await open_storage(two.overlay), await own.fetch())
        image.own_backing = own
        await image.overlay.count_missing()
        yield image
        with contextlib.suppress(QedfsError):  # of a disk that has failed
            await image.close()
        nursery.cancel_scope.cancel()


async def guest(image: Image, two: Two, model: SectorModel, rng: random.Random, count: int) -> None:
    """Write, flush, discard and read, so that the clusters of the overlay and its neighbours are met."""
    for number in range(count):
        for _ in range(rng.randrange(6)):
            await trio.lowlevel.checkpoint()
        pos = rng.choice((0, 1, 2, 5, 7, 10, 23, 30, 39)) * CLUSTER + rng.choice((0, 512))
        size = min(rng.choice((512, CLUSTER, 2 * CLUSTER)), SIZE - pos)
        data = (b"guest%3d" % number * 64) * (size // 512)
        version = model.begin(len(two.moments), pos, data)
        await image.write(pos, data)
        model.returned(version)
        since = model.events
        found = bytes(await image.read(pos, size))
        for at in range(0, size, 512):
            if found[at : at + 512] not in model.legal_read((pos + at) // 512, since, model.events):
                raise AssertionError(f"sector {(pos + at) // 512} was read wrong")
        if rng.random() < 0.4:
            flushing = model.flushing()
            await image.flush()
            model.flushed(flushing, len(two.moments))


async def commit_beside(two: Two, monkeypatch: pytest.MonkeyPatch, *, seed: int, writes: int) -> SectorModel:
    """A commit beside a guest, to its end. Returns what the image may be at each moment."""
    rng = random.Random(seed)
    model = SectorModel(wanted())
    async with image_of(two, monkeypatch) as image:
        commit = LiveCommit(image)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest, image, two, model, rng, writes)
            await commit.begin()
            await steps(commit, image)
            await commit.leave()
    return model


async def steps(commit: LiveCommit, image: Image, *, keep: bool = False) -> None:
    """All steps from the first to the last."""
    at: Any = 0
    while at < commit.clusters:
        at, _ = await commit.copy(at, 3)
        await trio.lowlevel.checkpoint()
    await commit.settle()
    for first in range(0, 0 if keep else commit.clusters, 2):
        while await commit.drop(first, min(2, commit.clusters - first)) is None:
            pass  # the machine is busy
        if first % 8 == 0:
            await image.overlay.commit()
            await image.overlay.give_space_back()
    await image.overlay.commit()
    await image.overlay.give_space_back()


async def read_after_a_failure(two: Two, which: str, kind: str, nth: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What the image reads as after a commit during which the nth operation of one disk has failed."""
    async with image_of(two, monkeypatch) as image:
        commit = LiveCommit(image)
        getattr(two, which).fail(kind, QedfsError("the disk is broken"), nth=nth)
        with contextlib.suppress(QedfsError):
            await commit.begin()
            await steps(commit, image)
        await commit.leave()
        with contextlib.suppress(QedfsError):  # a failure that has not been met yet
            return bytes(await image.read(0, SIZE))
        return bytes(await image.read(0, SIZE))
