"""Streams as block jobs: states, events and their order as QEMU has them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from qedfs.errors import NoSpace, SourceChanged, SourceError, SourceUnreachable
from tests.harness.hang import HANG_SECONDS

from .support import CLUSTER, MemorySource, Talk, controlled, talking

SUCCESS = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
CANCELLED = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
FAILED = ["BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
SIZE = 16 * CLUSTER


def source(size: int = SIZE) -> MemorySource:
    return MemorySource(random.Random(1).randbytes(size))


def held() -> MemorySource:
    found = source()
    found.gate = trio.Event()
    return found


async def status_of(talk: Talk) -> dict[str, object]:
    jobs: list[dict[str, object]] = await talk.get("query-block-jobs")
    assert len(jobs) == 1
    return jobs[0]


async def until(talk: Talk, key: str, value: object) -> dict[str, object]:
    """The job, once it shows this value."""
    with trio.fail_after(HANG_SECONDS):
        while True:
            job = await status_of(talk)
            if job[key] == value:
                return job


async def test_success(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", source())
        assert await talk.get("block-stream", device="disk", speed=1 << 30) == {}
        assert await talk.events_until("null", "disk") == SUCCESS
        completed = next(event for event in talk.events if event["event"] == "BLOCK_JOB_COMPLETED")
        assert completed["data"] == {"type": "stream", "device": "disk", "len": SIZE, "offset": SIZE, "speed": 1 << 30}
        assert set(completed["timestamp"]) == {"seconds", "microseconds"}
        assert await talk.get("query-block-jobs") == []
        assert served.is_complete()


async def test_the_stream_of_the_mount_is_a_job_of_its_own(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = held()
        await mount.add("disk", backing, stream=True)
        job = await until(talk, "status", "running")
        assert job == {
            "type": "stream",
            "device": "disk",
            "len": SIZE,
            "offset": 0,
            "busy": True,
            "paused": False,
            "speed": 0,
            "io-status": "ok",
            "ready": False,
            "status": "running",
            "auto-finalize": True,
            "auto-dismiss": True,
        }
        assert await talk.get("query-jobs") == [
            {"id": "disk", "type": "stream", "status": "running", "current-progress": 0, "total-progress": SIZE}
        ]
        assert await talk.error("block-stream", device="disk.raw", job_id="other") == (
            "GenericError",
            "Node 'disk' is busy: block device is in use by block job: stream",
        )
        backing.gate.set()
        assert await talk.events_until("null", "disk") == SUCCESS


async def test_events_only_after_the_negotiation(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk, talking(path, negotiate=False) as other:
        await other.line()
        await mount.add("disk", source())
        await talk.get("block-stream", device="disk")
        await talk.events_until("null", "disk")
        await other.send('{"execute":"qmp_capabilities"}')
        assert await other.line() == {"return": {}}
        await other.send('{"execute":"query-name"}')
        assert await other.line() == {"return": {"name": mount.mountpoint}}


async def test_pause_and_resume(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = held()
        served = await mount.add("disk", backing)
        await talk.get("block-stream", device="disk", job_id="j0")
        await until(talk, "status", "running")
        await backing.asked.wait()
        assert await talk.error("job-resume", id="j0") == ("GenericError", "Can't resume a job that was not paused")
        await talk.get("job-pause", id="j0")
        assert (await status_of(talk))["paused"] is True
        assert await talk.error("block-job-pause", device="j0") == ("GenericError", "Job is already paused")
        backing.gate.set()
        await until(talk, "status", "paused")
        assert served.is_paused()
        assert await talk.error("block-job-cancel", device="j0") == (
            "GenericError",
            "The block job for device 'j0' is currently paused",
        )
        await talk.get("block-job-resume", device="j0")
        assert not served.is_paused()
        assert await talk.events_until("null", "j0") == [
            *["created", "running", "paused", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED"],
            *["concluded", "null"],
        ]


async def test_cancel_while_running(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = held()
        served = await mount.add("disk", backing, stream=True)
        await until(talk, "status", "running")
        await backing.asked.wait()
        await talk.get("block-job-cancel", device="disk")
        assert (await status_of(talk))["status"] == "aborting"
        assert await talk.error("job-cancel", id="disk") == (
            "GenericError",
            "Job 'disk' in state 'aborting' cannot accept command verb 'cancel'",
        )
        backing.gate.set()
        assert await talk.events_until("null", "disk") == ["created", "running", *CANCELLED]
        assert not served.is_complete()
        # And on from where it was.
        talk.events.clear()
        await talk.get("block-stream", device="disk")
        assert await talk.events_until("null", "disk") == SUCCESS


async def test_cancel_while_paused(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = held()
        await mount.add("disk", backing, stream=True)
        await until(talk, "status", "running")
        await backing.asked.wait()
        await talk.get("job-pause", id="disk")
        backing.gate.set()
        await until(talk, "status", "paused")
        await talk.get("job-cancel", id="disk")
        assert await talk.events_until("null", "disk") == ["created", "running", "paused", "running", *CANCELLED]


async def test_cancel_before_it_began(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("disk", source())
        await talk.send('{"execute":"block-stream","arguments":{"device":"disk"}}')
        await talk.send('{"execute":"job-cancel","arguments":{"id":"disk"}}')
        assert "return" in await talk.reply()
        assert "return" in await talk.reply()
        events = await talk.events_until("null", "disk")
        assert events[-4:] == CANCELLED
        assert await talk.get("query-jobs") == []


async def test_finalize_and_dismiss_by_hand(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", source())
        await talk.get("block-stream", device="disk", job_id="j0", auto_finalize=False, auto_dismiss=False)
        assert (await talk.events_until("pending", "j0"))[:4] == SUCCESS[:4]
        pending = await talk.line() if len(talk.events) == 4 else talk.events[4]
        assert (pending["event"], pending["data"]) == ("BLOCK_JOB_PENDING", {"type": "stream", "id": "j0"})
        assert not served.is_complete()
        assert await talk.error("job-pause", id="j0") == (
            "GenericError",
            "Job 'j0' in state 'pending' cannot accept command verb 'pause'",
        )
        await talk.get("job-finalize", id="j0")
        await talk.events_until("concluded", "j0")
        assert served.is_complete()
        assert (await talk.get("query-jobs"))[0]["status"] == "concluded"
        assert await talk.error("block-job-finalize", id="j0") == (
            "GenericError",
            "Job 'j0' in state 'concluded' cannot accept command verb 'finalize'",
        )
        await talk.get("block-job-dismiss", id="j0")
        await talk.events_until("null", "j0")
        assert await talk.get("query-jobs") == []


async def test_cancel_of_a_job_that_waits_to_be_finalized_keeps_the_backing(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", source())
        await talk.get("block-stream", device="disk", auto_finalize=False)
        await talk.events_until("pending", "disk")
        await talk.get("job-cancel", id="disk")
        assert (await talk.events_until("null", "disk"))[-4:] == CANCELLED
        assert not served.is_complete()


async def test_commands_for_jobs_that_are_not_there(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (_, path), talking(path) as talk:
        for name in ("pause", "resume", "cancel", "complete", "finalize", "dismiss"):
            assert await talk.error(f"job-{name}", id="j") == ("GenericError", "Job not found")
            key = "id" if name in ("finalize", "dismiss") else "device"
            expected = ("DeviceNotActive", "Block job 'j' not found")
            assert await talk.error(f"block-job-{name}", **{key: "j"}) == expected
        assert await talk.error("block-job-set-speed", device="j", speed=1) == expected


async def test_texts_of_refused_streams(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("disk", held())
        mount.add_broken("bad", SourceError("no such thing"))
        refused: list[tuple[dict[str, object], str]] = [
            ({"job_id": "bad id!"}, "Invalid job ID 'bad id!'"),
            ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
            ({"base": "nope"}, "Can't find 'nope' in the backing chain"),
            ({"base_node": "nope"}, "Cannot find device='' nor node-name='nope'"),
            ({"base": "a", "base_node": "b"}, "'base' and 'base-node' cannot be specified at the same time"),
            ({"backing_file": "x"}, "backing file specified, but streaming the entire chain"),
        ]
        for arguments, desc in refused:
            assert await talk.error("block-stream", device="disk", **arguments) == ("GenericError", desc)
        assert await talk.error("block-stream", device="bad") == (
            "GenericError",
            "Device 'bad' cannot be served: no such thing",
        )
        await talk.get("block-stream", device="disk", job_id="j0")
        await until(talk, "status", "running")
        assert await talk.error("job-complete", id="j0") == (
            "GenericError",
            "Job 'j0' in state 'running' cannot accept command verb 'complete'",
        )
        assert await talk.error("job-dismiss", id="j0") == (
            "GenericError",
            "Job 'j0' in state 'running' cannot accept command verb 'dismiss'",
        )


async def test_job_ids_are_unique(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("one", held())
        await mount.add("two", held())
        await talk.get("block-stream", device="one", job_id="j")
        assert await talk.error("block-stream", device="two", job_id="j") == (
            "GenericError",
            "Job ID 'j' already in use",
        )


async def test_nothing_to_stream_completes_at_once(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("alone", None)
        await talk.get("block-stream", device="alone")
        assert await talk.events_until("null", "alone") == SUCCESS
        completed = next(event for event in talk.events if event["event"] == "BLOCK_JOB_COMPLETED")
        assert (completed["data"]["len"], completed["data"]["offset"]) == (0, 0)


async def test_speed(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", held(), stream=True)
        await talk.get("block-job-set-speed", device="disk", speed=12345)
        assert served.job is not None
        assert served.job.rate_limiter.limit == 12345
        assert (await status_of(talk))["speed"] == 12345
        assert await talk.error("block-job-set-speed", device="disk", speed=-1) == (
            "GenericError",
            "Parameter 'speed' expects a non-negative value",
        )


# Failures.


@pytest.mark.expect_log("the stream has stopped")
async def test_report_ends_the_job_with_the_error(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source()
        backing.failures[5 * CLUSTER] = SourceUnreachable("connection refused")
        await mount.add("disk", backing)
        await talk.get("block-stream", device="disk")
        assert await talk.events_until("null", "disk") == ["created", "running", *FAILED]
        error, completed = [event["data"] for event in talk.events if event["event"].startswith("BLOCK_JOB")]
        assert error == {"device": "disk", "operation": "read", "action": "report"}
        assert completed["error"] == "connection refused"
        assert completed["offset"] < SIZE
        # And again, now that the source is there.
        backing.failures.clear()
        talk.events.clear()
        await talk.get("block-stream", device="disk")
        assert await talk.events_until("null", "disk") == SUCCESS


@pytest.mark.parametrize(("policy", "error"), [("stop", SourceUnreachable("gone")), ("enospc", NoSpace("full"))])
async def test_stop_pauses_until_resumed(tmp_path: Path, policy: str, error: SourceUnreachable | NoSpace) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source()
        backing.failures[0] = error
        await mount.add("disk", backing)
        await talk.get("block-stream", device="disk", on_error=policy)
        job = await until(talk, "status", "paused")
        assert job["io-status"] == ("nospace" if policy == "enospc" else "failed")
        assert job["paused"] is True
        backing.failures.clear()
        await talk.get("job-resume", id="disk")
        events = await talk.events_until("null", "disk")
        assert events == ["created", "running", "BLOCK_JOB_ERROR", "paused", *SUCCESS[1:]]


@pytest.mark.expect_log("the stream has stopped")
async def test_enospc_reports_other_errors(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source()
        backing.failures[0] = SourceUnreachable("gone")
        await mount.add("disk", backing)
        await talk.get("block-stream", device="disk", on_error="auto")
        assert await talk.events_until("null", "disk") == ["created", "running", *FAILED]


@pytest.mark.expect_log("the stream has stopped")
async def test_ignore_goes_on_and_ends_with_the_error(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        size = 4 << 20
        backing = source(size)
        backing.failures[1 << 20] = SourceError("bad sector")
        served = await mount.add("disk", backing)
        await talk.get("block-stream", device="disk", on_error="ignore")
        events = await talk.events_until("null", "disk")
        assert events[:2] == ["created", "running"]
        assert events[-4:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
        assert set(events[2:-4]) == {"BLOCK_JOB_ERROR"}
        assert talk.events[2]["data"]["action"] == "ignore"
        completed = next(event for event in talk.events if event["event"] == "BLOCK_JOB_COMPLETED")
        assert completed["data"]["error"] == "bad sector"
        assert served.image is not None
        assert not served.image.complete
        # All but the request with the bad sector is there.
        assert served.image.populated >= size - (2 << 20)
        assert served.image.populated < size


@pytest.mark.expect_log("the stream has stopped")
async def test_another_version_of_the_source_ends_the_job_of_the_mount(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = held()
        backing.failures[0] = SourceChanged("another version")
        await mount.add("disk", backing, stream=True)
        await until(talk, "status", "running")
        backing.gate.set()
        events = await talk.events_until("null", "disk")
        assert events[-5:] == FAILED
        (image,) = (await talk.get("x-qedfs-status"))["images"]
        advice = "what is local is served. Bring the old version back, or start a new overlay"
        assert (image["state"], image["exit_code"]) == ("source-changed", 5)
        assert image["error"] == f"another version; {advice}"


async def test_the_job_of_the_mount_waits_for_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qedfs.jobs.job.RETRY_SECONDS", (0.01, 0.01))
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = source()
        backing.failures[0] = SourceUnreachable("connection refused")
        await mount.add("disk", backing, stream=True)
        job = await until(talk, "io-status", "failed")
        assert job["status"] == "running"
        backing.failures.clear()
        assert (await talk.events_until("null", "disk"))[-6:] == SUCCESS[1:]


async def test_an_image_that_leaves_takes_its_job_along(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", held(), stream=True)
        await until(talk, "status", "running")
        mount.served.remove(served)
        assert await talk.get("query-block-jobs") == []
        assert (await talk.events_until("null", "disk"))[-4:] == CANCELLED
        assert served.image is not None
        await served.image.close()
