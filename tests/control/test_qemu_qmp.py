"""The `qemu.qmp` library, which QEMU's own tools use, drives a mount unchanged."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from qemu.qmp import ExecuteError, QMPClient
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message

from .support import CLUSTER, MemorySource, controlled

SIZE = 64 * CLUSTER


async def with_library(path: Path, drive: Callable[[QMPClient], Awaitable[Any]]) -> Any:
    """Runs asyncio, which the library needs, in a thread of its own."""

    async def main() -> Any:
        client = QMPClient("test")
        await client.connect(str(path))
        try:
            return await asyncio.wait_for(drive(client), 20)
        finally:
            await client.disconnect()

    return await trio.to_thread.run_sync(lambda: asyncio.run(main()))


async def returned(client: QMPClient, name: str) -> list[dict[str, Any]]:
    """What a query that answers with a list of objects returns; the library calls it an object of any kind."""
    found = await client.execute(name)
    assert isinstance(found, list)
    return found


def data_of(event: Message) -> dict[str, Any]:
    data = event["data"]
    assert isinstance(data, dict)
    return data


async def test_a_stream_from_start_to_end(tmp_path: Path) -> None:
    async def drive(client: QMPClient) -> list[tuple[str, Any]]:
        assert client.greeting is not None
        assert client.greeting.QMP.capabilities == []
        names = {command["name"] for command in await returned(client, "query-commands")}
        assert "block-stream" in names
        seen = []
        with client.listener() as listener:
            await client.execute("block-stream", {"device": "disk", "job-id": "job0"})
            async for event in listener:
                seen.append((str(event["event"]), data_of(event)))
                if event["event"] == "JOB_STATUS_CHANGE" and data_of(event)["status"] == "null":
                    break
        return seen

    async with controlled(tmp_path) as (mount, path):
        served = await mount.add("disk", MemorySource(random.Random(3).randbytes(SIZE)))
        seen = await with_library(path, drive)
        assert [data.get("status", name) for name, data in seen] == [
            *["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
        ]
        assert served.image is not None
        assert served.image.complete


async def test_pause_speed_resume_while_events_flow(tmp_path: Path) -> None:
    async def drive(client: QMPClient) -> Any:
        await client.execute("job-pause", {"id": "disk"})
        await client.execute("block-job-set-speed", {"device": "disk", "speed": 1 << 30})
        (job,) = await returned(client, "query-block-jobs")
        assert job["paused"] is True
        listener = EventListener("BLOCK_JOB_COMPLETED")
        client.register_listener(listener)
        await client.execute("job-resume", {"id": "disk"})
        trio.from_thread.run_sync(backing.gate.set)
        return data_of(await listener.get())

    async with controlled(tmp_path) as (mount, path):
        backing = MemorySource(random.Random(3).randbytes(SIZE))
        backing.gate = trio.Event()
        await mount.add("disk", backing, stream=True)
        await backing.asked.wait()
        data = await with_library(path, drive)
        assert data == {"type": "stream", "device": "disk", "len": SIZE, "offset": SIZE, "speed": 1 << 30}


async def test_errors_are_the_librarys_errors(tmp_path: Path) -> None:
    async def drive(client: QMPClient) -> None:
        with pytest.raises(ExecuteError) as caught:
            await client.execute("block-job-cancel", {"device": "nope"})
        assert caught.value.error_class == "DeviceNotActive"
        with pytest.raises(ExecuteError, match="The command nonsense has not been found"):
            await client.execute("nonsense")
        replies = await asyncio.gather(*(client.execute("query-version") for _ in range(20)))
        assert len(replies) == 20

    async with controlled(tmp_path) as (_, path):
        await with_library(path, drive)


async def test_three_clients_at_once(tmp_path: Path) -> None:
    async def drive(client: QMPClient) -> str:
        listener = EventListener("BLOCK_JOB_COMPLETED")
        client.register_listener(listener)
        await client.execute("query-block-jobs")
        ready.release()
        return str(data_of(await listener.get())["device"])

    ready = threading.Semaphore(0)
    heard: list[str] = []
    async with controlled(tmp_path) as (mount, path):
        backing = MemorySource(random.Random(3).randbytes(SIZE))
        backing.gate = trio.Event()
        await mount.add("disk", backing, stream=True)

        async def hear() -> None:
            heard.append(await with_library(path, drive))

        async with trio.open_nursery() as hearing:
            for _ in range(3):
                hearing.start_soon(hear)
            for _ in range(3):
                await trio.to_thread.run_sync(ready.acquire)
            backing.gate.set()
    assert heard == ["disk"] * 3
