"""A kind of job that only these tests know, over the control socket: QMP drives it as a stream, under its own type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from qedfs.errors import NoSpace, SourceError
from qedfs.jobs.kinds import KINDS
from tests.harness.hang import HANG_SECONDS
from tests.jobs.support import STEP_BYTES, CountJob

from .support import CLUSTER, MemorySource, Served, Talk, controlled, talking

SUCCESS = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
CANCELLED = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
TOTAL = CountJob.steps * STEP_BYTES
HELD = 1  # bytes per second: the first step is done at once, and the next one a quarter of an hour later


class QuickCount(CountJob):
    step_seconds = 0.001


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, CountJob.kind, QuickCount)


async def job_of(talk: Talk) -> dict[str, Any]:
    (job,) = await talk.get("query-block-jobs")
    found: dict[str, Any] = job
    return found


async def until(talk: Talk, key: str, value: object) -> dict[str, Any]:
    with trio.fail_after(HANG_SECONDS):
        while (job := await job_of(talk))[key] != value:
            pass
    return job


def begun(served: Served) -> CountJob:
    """The job beside the stream."""
    assert served.jobs is not None
    job = served.jobs.all()[1]
    assert isinstance(job, CountJob)
    return job


async def test_it_comes_through_its_states(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(b"x" * CLUSTER))
        assert await talk.get("x-qedfs-start", device="disk", type="count") == {}
        assert await talk.events_until("null", "disk") == SUCCESS
        (completed,) = (event["data"] for event in talk.events if event["event"] == "BLOCK_JOB_COMPLETED")
        assert completed == {"type": "count", "device": "disk", "len": TOTAL, "offset": TOTAL, "speed": 0}
        assert await talk.get("query-jobs") == []
        # The image is what it was, and its stream can run now.
        (image,) = (await talk.get("x-qedfs-status"))["images"]
        assert (image["state"], image["populated"], image["error"]) == ("off", 0, None)
        talk.events.clear()
        await talk.get("x-qedfs-start", device="disk", type="stream")
        assert await talk.events_until("null", "disk") == SUCCESS
        assert served.is_complete()
        # A complete image can have it, too.
        talk.events.clear()
        await talk.get("x-qedfs-start", device="disk", type="count")
        assert await talk.events_until("null", "disk") == SUCCESS


async def test_the_queries_show_its_type(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("disk", MemorySource(b"x" * CLUSTER))
        await talk.get("x-qedfs-start", device="disk", type="count", limit=HELD)
        assert await until(talk, "offset", STEP_BYTES) == {
            "type": "count",
            "device": "disk",
            "len": TOTAL,
            "offset": STEP_BYTES,
            "busy": True,
            "paused": False,
            "speed": HELD,
            "io-status": "ok",
            "ready": False,
            "status": "running",
            "auto-finalize": True,
            "auto-dismiss": True,
        }
        assert await talk.get("query-jobs") == [
            {
                "id": "disk",
                "type": "count",
                "status": "running",
                "current-progress": STEP_BYTES,
                "total-progress": TOTAL,
            }
        ]


async def test_an_image_has_one_job_at_a_time(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        source = MemorySource(b"x" * CLUSTER)
        await mount.add("disk", source)
        await talk.get("x-qedfs-start", device="disk", type="count", limit=HELD)
        busy = "Node 'disk' is busy: block device is in use by block job: count"
        for command, arguments in (
            ("block-stream", {"job_id": "other"}),
            ("x-qedfs-start", {}),
            ("x-qedfs-start", {"type": "count"}),
        ):
            assert await talk.error(command, device="disk", **arguments) == ("GenericError", busy)
        await talk.get("job-cancel", id="disk")
        assert (await talk.events_until("null", "disk"))[-4:] == CANCELLED
        source.gate = trio.Event()
        talk.events.clear()
        await talk.get("x-qedfs-start", device="disk")
        assert await talk.error("x-qedfs-start", device="disk", type="count") == (
            "GenericError",
            "Node 'disk' is busy: block device is in use by block job: stream",
        )


async def test_pause_speed_and_resume(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(b"x" * CLUSTER))
        await talk.get("x-qedfs-start", device="disk", type="count", limit=HELD)
        await talk.events_until("running", "disk")
        await talk.get("job-pause", id="disk")
        job = await until(talk, "status", "paused")
        assert (job["paused"], job["busy"]) == (True, False)
        assert await talk.error("job-pause", id="disk") == ("GenericError", "Job is already paused")
        assert not served.is_paused()  # what the overlay remembers is a pause of its stream
        await talk.get("block-job-set-speed", device="disk", speed=0)
        await talk.get("job-resume", id="disk")
        assert await talk.events_until("null", "disk") == ["created", "running", "paused", *SUCCESS[1:]]


async def test_cancel(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(b"x" * CLUSTER))
        await talk.get("x-qedfs-start", device="disk", type="count", limit=HELD)
        await talk.events_until("running", "disk")
        await talk.get("block-job-cancel", device="disk")
        assert await talk.events_until("null", "disk") == ["created", "running", *CANCELLED]
        assert await talk.get("query-block-jobs") == []
        assert served.jobs is not None
        assert served.jobs.at_work is None
        assert not served.is_complete()


@pytest.mark.expect_log("the count has stopped: 404")
async def test_an_error_ends_it_and_not_the_image(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(b"x" * CLUSTER))
        await talk.get("x-qedfs-start", device="disk", type="count", limit=HELD)
        begun(served).failures[1] = SourceError("404")
        await talk.get("block-job-set-speed", device="disk", speed=0)
        events = await talk.events_until("null", "disk")
        assert events == ["created", "running", "BLOCK_JOB_ERROR", "aborting", *SUCCESS[4:]]
        (completed,) = (event["data"] for event in talk.events if event["event"] == "BLOCK_JOB_COMPLETED")
        assert (completed["type"], completed["error"]) == ("count", "404")
        (image,) = (await talk.get("x-qedfs-status"))["images"]
        assert (image["state"], image["error"], image["exit_code"]) == ("off", None, 0)


async def test_a_full_disk_shows_in_its_io_status(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(b"x" * CLUSTER))
        await talk.get("x-qedfs-start", device="disk", type="count", limit=HELD)
        begun(served).failures[1] = NoSpace("full")
        await talk.get("block-job-set-speed", device="disk", speed=0)
        job = await until(talk, "io-status", "nospace")
        assert (await until(talk, "status", "paused"))["paused"] is True
        assert job["type"] == "count"


async def test_an_image_that_leaves_takes_it_along(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(b"x" * CLUSTER))
        await talk.get("x-qedfs-start", device="disk", type="count", limit=HELD)
        await talk.events_until("running", "disk")
        mount.served.remove(served)
        assert await talk.get("query-block-jobs") == []
        assert (await talk.events_until("null", "disk"))[-4:] == CANCELLED
        assert served.image is not None
        await served.image.close()


async def test_a_kind_that_does_not_exist(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("disk", MemorySource(b"x" * CLUSTER))
        assert await talk.error("x-qedfs-start", device="disk", type="mirror") == (
            "GenericError",
            "Parameter 'type' does not accept value 'mirror'",
        )
