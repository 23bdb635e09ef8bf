"""What QMP lacks: by image, forgiving, and with the exit code of the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import trio

from qedfs.errors import SourceError, SourceUnreachable
from qedfs.image import backing_file
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.stream import StreamJob
from tests.fakes.dead_server import DeadServer
from tests.image.test_commit_look import image_over

from .support import CLUSTER, MemorySource, Served, controlled, talking

MIB = 1 << 20


async def test_steps_lead_through_the_image(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = MemorySource(random.Random(2).randbytes(2 * MIB))
        served = await mount.add("disk", backing)
        offset: int | None = 0
        seen = 0
        while offset is not None:
            step = await talk.get("x-qedfs-step", device="disk", offset=offset)
            assert step["pos"] == offset
            assert 0 < step["size"] < 2 * MIB
            seen += step["size"]
            offset = step["next"]
        assert seen == 2 * MIB
        assert served.image is not None
        assert served.image.populated == 2 * MIB
        assert await talk.get("x-qedfs-step", device="disk") == {"pos": 0, "size": 0, "next": None}


async def test_step_begins_where_it_is_told(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("disk", MemorySource(random.Random(2).randbytes(MIB)))
        step = await talk.get("x-qedfs-step", device="disk", offset=MIB // 2 + 1)
        assert step["pos"] == MIB // 2
        assert await talk.get("x-qedfs-next-missing", device="disk") == {"offset": 0}
        behind = MIB // 2 + step["size"]
        expected = {"offset": None if behind == MIB else behind}
        assert await talk.get("x-qedfs-next-missing", device="disk", offset=MIB // 2 + 7) == expected


async def test_step_on_a_dead_source_fails_with_its_exit_code(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = MemorySource(bytes(CLUSTER))
        backing.failures[0] = SourceUnreachable("connection refused")
        await mount.add("disk", backing)
        answer = await talk.ask("x-qedfs-step", device="disk")
        error = {"class": "GenericError", "desc": "connection refused", "x-qedfs-exit-code": 4}
        assert answer == {"error": error}


async def test_pause_resume_cancel_twice_are_no_errors(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        backing = MemorySource(random.Random(2).randbytes(16 * CLUSTER))
        backing.gate = trio.Event()
        served = await mount.add("disk", backing)
        for name in ("start", "start", "pause", "pause", "resume", "resume", "cancel", "cancel"):
            assert await talk.get(f"x-qedfs-{name}", device="disk.raw") == {}
        backing.gate.set()
        await talk.events_until("null", "disk")
        await talk.get("x-qedfs-start", device="disk", limit=1 << 30)
        talk.events.clear()
        await talk.events_until("null", "disk")
        assert served.image is not None
        assert served.image.complete
        assert served.job is not None
        assert served.job.rate_limiter.limit == 1 << 30
        for name in ("start", "pause", "resume", "cancel"):
            assert await talk.get(f"x-qedfs-{name}", device="disk") == {}
        assert not served.image.overlay.record.paused


async def test_start_ends_a_pause_that_the_overlay_remembers(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(random.Random(2).randbytes(16 * CLUSTER)))
        await talk.get("x-qedfs-pause", device="disk")
        assert served.image is not None
        assert served.image.overlay.record.paused
        await talk.get("x-qedfs-start", device="disk")
        await talk.events_until("null", "disk")
        assert served.image.complete


async def test_limit_without_a_job(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(bytes(CLUSTER)))
        await talk.get("x-qedfs-limit", device="disk", limit=5)
        assert served.job is not None
        assert served.job.rate_limiter.limit == 5
        assert await talk.error("x-qedfs-limit", device="disk", limit=-1) == (
            "GenericError",
            "Parameter 'limit' expects a non-negative value",
        )


async def test_the_limit_of_the_mount(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await talk.get("x-qedfs-limit-total", limit=5)
        assert mount.total.limiter.limit == 5
        assert (await talk.get("x-qedfs-status"))["limit_total"] == 5
        assert await talk.error("x-qedfs-limit-total", limit=-1) == (
            "GenericError",
            "Parameter 'limit' expects a non-negative value",
        )


async def test_rescan(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await talk.get("x-qedfs-rescan")
        assert mount.rescans == 1


@pytest.mark.parametrize("name", ["start", "pause", "resume", "cancel", "step", "next-missing"])
async def test_images_that_are_not_there(tmp_path: Path, name: str) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        mount.add_broken("bad", SourceError("no such thing"))
        assert (await talk.error(f"x-qedfs-{name}", device="nope"))[1].startswith("Cannot find device='nope'")
        assert (await talk.error(f"x-qedfs-{name}", device="bad"))[1] == "Device 'bad' cannot be served: no such thing"


async def test_the_rule_for_a_source_that_is_away(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(bytes(CLUSTER)))
        assert served.image is not None
        command = "x-qedfs-on-source-error"
        await talk.get(command, device="disk", action="wait", bound=60)
        assert served.image.overlay.record.on_source_error == "wait:60"
        assert (await talk.get("x-qedfs-status"))["images"][0]["wait_bound_seconds"] == 60
        for action, bound in (("eio", 5), ("wait", 0), ("wait", 10**12)):
            _, text = await talk.error(command, device="disk", action=action, bound=bound)
            assert text == "Parameter 'bound' expects seconds, with the action 'wait'"
        await talk.get(command, device="disk", action="eio")
        assert served.image.overlay.record.on_source_error == ""


async def test_what_is_missing_and_where_to_get_it(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(bytes(64 * CLUSTER)))
        assert served.image is not None
        await served.image.write(3 * CLUSTER, b"g" * CLUSTER)
        assert await talk.get("x-qedfs-missing", device="disk") == {
            "ranges": [[0, 3 * CLUSTER], [4 * CLUSTER, 60 * CLUSTER]],
            "next": None,
        }
        assert (await talk.get("x-qedfs-missing", device="disk", offset=50 * CLUSTER + 5))["ranges"] == [
            [50 * CLUSTER + 5, 14 * CLUSTER - 5]
        ]
        await talk.get("x-qedfs-populate", device="disk", **{"from": "/backup"}, format="raw", force=True)
        assert mount.populated == [("disk.raw", "/backup", "raw", True)]
        await talk.get("x-qedfs-populate-cancel", device="disk")  # there is none
        await talk.get("x-qedfs-source-set", device="disk", url="http://mirror/disk")
        assert mount.moved == [("disk.raw", "http://mirror/disk", False)]
        assert (await talk.get("x-qedfs-status"))["images"][0]["populate"] is None
        await mount.add("whole", None)
        await talk.get("x-qedfs-populate", device="whole", **{"from": "/backup"})
        assert len(mount.populated) == 1


async def test_a_dry_run_is_refused_what_the_job_would_be(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(b"x" * CLUSTER))
        assert served.jobs is not None

        async def error(**arguments: object) -> str:
            return (await talk.error("x-qedfs-dry-run", device="disk", **arguments))[1]

        assert "Parameter 'type'" in await error()
        assert "does not accept value 'stream'" in await error(type="stream")
        assert "non-negative" in await error(type="commit", offset=-1)
        assert "has no source" in await error(type="commit")  # as no local file is known here
        assert await talk.get("x-qedfs-dry-run", device="disk", type="defrag") == {
            "data": 0,
            "pieces": 0,
            "longest_piece": 0,
            "to_move": 0,
            "next": None,
        }
        served.jobs.begin("defrag")
        assert "in use by block job: defrag" in await error(type="commit")


async def test_a_dry_run_over_a_dead_file_server_does_not_keep_the_server_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DeadServer() as dead_server:
        monkeypatch.setattr(backing_file, "_found", dead_server.under(backing_file._found))
        command = {"execute": "x-qedfs-dry-run", "arguments": {"device": "disk", "type": "commit"}}
        async with image_over(tmp_path) as image, controlled(tmp_path) as (mount, path), talking(path) as talk:
            job = StreamJob(image, enabled=False)
            mount.served.append(Served("disk.raw", str(tmp_path / "disk.qed"), image, job, ImageJobs(job)))
            await talk.send(json.dumps(command))
            await dead_server.asked()
            mount.nursery.cancel_scope.cancel()
        assert dead_server.waiting
