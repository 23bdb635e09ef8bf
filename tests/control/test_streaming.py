"""Streaming as a manager drives it: what comes of the image, what moves while it is held, several jobs at once.

The cases are those of QEMU's own test of image streaming (qemu-iotests 030) that concern one overlay over one backing.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from tests.harness.hang import HANG_SECONDS

from .support import CLUSTER, URL, MemorySource, Served, Talk, controlled, talking

SIZE = 1 << 20
COMPLETED = "BLOCK_JOB_COMPLETED"


def source(size: int = SIZE, *, held: bool = False) -> MemorySource:
    found = MemorySource(random.Random(size).randbytes(size))
    if held:
        found.gate = trio.Event()
    return found


async def content_of(served: Served) -> bytes:
    assert served.image is not None
    return bytes(await served.image.read(0, served.image.size))


async def job_of(talk: Talk) -> dict[str, object]:
    (job,) = await talk.get("query-block-jobs")
    found: dict[str, object] = job
    return found


async def until_paused(talk: Talk) -> dict[str, object]:
    with trio.fail_after(HANG_SECONDS):
        while (job := await job_of(talk))["status"] != "paused":
            pass
    return job


async def test_the_image_is_whole_and_no_job_is_left(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source()
        served = await mount.add("disk", backing)
        assert await talk.get("query-block-jobs") == []
        await talk.get("block-stream", device="disk")
        await talk.events_until("null", "disk")
        assert await talk.get("query-block-jobs") == await talk.get("query-jobs") == []
        received = backing.received
        assert await content_of(served) == backing.content
        assert backing.received == received
        assert served.image is not None
        assert served.image.overlay.backing is None


async def test_nothing_moves_while_it_is_paused(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source(4 * SIZE, held=True)
        served = await mount.add("disk", backing)
        await talk.get("block-stream", device="disk")
        await backing.asked.wait()
        await talk.get("block-job-pause", device="disk")
        backing.gate.set()
        await until_paused(talk)
        assert served.image is not None
        with trio.fail_after(HANG_SECONDS):  # until what was on its way has been kept
            while served.image.populated < backing.received:  # noqa: ASYNC110 - kept in a thread
                await trio.sleep(0.01)
        job = await job_of(talk)
        received = backing.received
        await trio.sleep(0.1)
        assert await job_of(talk) == job
        assert (job["paused"], backing.received) == (True, received)
        await talk.get("block-job-resume", device="disk")
        await talk.events_until("null", "disk")
        assert await content_of(served) == backing.content


@pytest.mark.parametrize("base", [URL, "http://example.org/disk.img?token=...", "bottom"])
async def test_a_stream_down_to_the_backing_changes_nothing(tmp_path: Path, base: str) -> None:
    """Also by the name that `query-block` shows, which holds no secret."""
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source()
        served = await mount.add("disk", backing)
        before = await trio.Path(served.path).read_bytes()
        await talk.get("block-stream", device="disk", **({"bottom": "disk"} if base == "bottom" else {"base": base}))
        await talk.events_until("null", "disk")
        (completed,) = (event["data"] for event in talk.events if event["event"] == COMPLETED)
        assert completed == {"type": "stream", "device": "disk", "len": 0, "offset": 0, "speed": 0}
        assert await trio.Path(served.path).read_bytes() == before
        assert backing.received == 0
        assert served.image is not None
        assert not served.image.complete
        assert await content_of(served) == backing.content


async def test_jobs_in_parallel_end_each_in_its_time(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backings = [source(SIZE + number * CLUSTER, held=True) for number in range(4)]
        images = [await mount.add(f"disk{number}", backing) for number, backing in enumerate(backings)]
        for number in range(4):
            await talk.get("block-stream", device=f"disk{number}", job_id=f"job{number}", speed=(number + 1) << 30)
        jobs = {job["device"]: job["speed"] for job in await talk.get("query-block-jobs")}
        assert jobs == {f"job{number}": (number + 1) << 30 for number in range(4)}
        for number in (2, 0, 3, 1):
            backings[number].gate.set()
            await talk.events_until("null", f"job{number}")
        ends = [event["data"] for event in talk.events if event["event"] == COMPLETED]
        assert [end["device"] for end in ends] == ["job2", "job0", "job3", "job1"]
        assert all("error" not in end and end["len"] == end["offset"] for end in ends)
        assert await talk.get("query-block-jobs") == []
        for served, backing in zip(images, backings, strict=True):
            assert await content_of(served) == backing.content


@pytest.mark.parametrize("backing_size", [0, 1, CLUSTER, SIZE - 1])
async def test_a_smaller_backing_ends_too_and_zeros_follow(tmp_path: Path, backing_size: int) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source(backing_size)
        served = await mount.add("disk", backing, size=2 * SIZE)
        await talk.get("block-stream", device="disk")
        await talk.events_until("null", "disk")
        (completed,) = (event["data"] for event in talk.events if event["event"] == COMPLETED)
        assert (completed["len"], completed["offset"]) == (2 * SIZE, 2 * SIZE)
        assert await content_of(served) == backing.content + bytes(2 * SIZE - backing_size)


async def test_a_stream_that_is_held_says_nothing_and_can_be_cancelled(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source(held=True)
        served = await mount.add("disk", backing)
        await talk.get("block-stream", device="disk")
        await talk.events_until("running", "disk")
        talk.events.clear()
        await backing.asked.wait()
        with trio.move_on_after(0.1) as silence:
            await talk.line()
        assert silence.cancelled_caught
        await talk.get("block-job-cancel", device="disk")
        backing.gate.set()
        await talk.events_until("null", "disk")
        (cancelled,) = (event["data"] for event in talk.events if event["event"] == "BLOCK_JOB_CANCELLED")
        assert cancelled.keys() == {"type", "device", "len", "offset", "speed"}
        assert cancelled["len"] == SIZE
        assert served.image is not None
        assert not served.image.complete
        assert await talk.get("query-block-jobs") == []
        assert await content_of(served) == backing.content


async def test_the_speed_of_a_job(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source(16 * SIZE, held=True)
        await mount.add("disk", backing)
        assert (await talk.error("block-stream", device="disk", speed=-1))[0] == "GenericError"
        assert await talk.get("query-block-jobs") == []
        for arguments, speed in (({}, 0), ({"speed": 4 << 20}, 4 << 20), ({}, 0)):
            await talk.get("block-stream", device="disk", **arguments)
            assert (await job_of(talk))["speed"] == speed
            await talk.get("block-job-set-speed", device="disk", speed=8 << 20)
            assert (await job_of(talk))["speed"] == 8 << 20
            assert (await talk.error("block-job-set-speed", device="disk", speed=-1))[0] == "GenericError"
            assert (await job_of(talk))["speed"] == 8 << 20
            await talk.get("block-job-cancel", device="disk")
            backing.gate.set()
            await talk.events_until("null", "disk")
            talk.events.clear()
            backing.gate = trio.Event()
