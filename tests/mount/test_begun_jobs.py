"""Jobs that commands begin run among the tasks of a served image, and end with the image. Without FUSE."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from qedfs.errors import BadOverlay
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.job import Job
from qedfs.jobs.kinds import KINDS
from qedfs.jobs.state import State
from qedfs.mount.images import Images
from qedfs.mount.options import Options
from qedfs.mount.served import Served
from qedfs.overlay.create import create_overlay
from qedfs.overlay.overlay import Overlay
from tests.harness.hang import HANG_SECONDS
from tests.jobs.support import CountJob


class Endless(CountJob):
    """Has done nothing yet, whenever one looks."""

    async def _step(self) -> None:
        await self.sleep(None)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "count", Endless)


async def served(images: Images, overlay: Path) -> Served:
    create_overlay(str(overlay), image_size=65536, backing="http://127.0.0.1:1/disk")
    os.utime(overlay, (1, 1))
    await images.registry.scan()
    (found,) = images.registry.everything()
    return found


async def until(job: Job, state: State) -> None:
    with trio.fail_after(HANG_SECONDS):
        while job.state is not state:  # noqa: ASYNC110
            await trio.sleep(0.01)


async def until_gone(jobs: ImageJobs, job: Job) -> None:
    with trio.fail_after(HANG_SECONDS):
        while job in jobs.all():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_a_job_that_is_begun_ends_with_the_image(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), Options(stream=False), nursery)
        found = await served(images, tmp_path / "disk.qed")
        assert found.jobs is not None
        job = found.jobs.begin("count")
        await until(job, State.RUNNING)
        (tmp_path / "disk.qed").unlink()
        await images.registry.scan()
        await until_gone(found.jobs, job)
        with trio.CancelScope(shield=True):
            assert await images.close() == []
        nursery.cancel_scope.cancel()


@pytest.mark.expect_log("the stream has stopped: was cut", "the count has stopped: was cut")
async def test_an_overlay_that_is_damaged_ends_every_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qedfs.mount.rounds.ROUND_SECONDS", 0.01)
    damage: list[BadOverlay] = []

    async def inspect(_: Overlay) -> None:
        if damage:
            raise damage[0]

    monkeypatch.setattr(Overlay, "inspect", inspect)
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), Options(stream=False), nursery)
        found = await served(images, tmp_path / "disk.qed")
        assert found.jobs is not None
        job = found.jobs.begin("count")
        await until(job, State.RUNNING)
        damage.append(BadOverlay("was cut"))
        await until(job, State.FAILED)
        await until(found.jobs.stream, State.FAILED)
        await until_gone(found.jobs, job)
        with trio.CancelScope(shield=True):
            await images.close()
        nursery.cancel_scope.cancel()
