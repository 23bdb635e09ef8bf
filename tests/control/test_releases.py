"""The event about an image that was released, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qedfs.control.qmp.releases import Releases

from .support import CLUSTER, MemorySource, controlled, talking


def test_one_event_for_each_release() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    releases = Releases(lambda name, data: events.append((name, data)))
    first = ("X_QEDFS_RELEASED", {"device": "a", "overlay": "/a.qed"})
    releases.sync({})
    releases.sync({"a.raw": "/a.qed"})
    releases.sync({"a.raw": "/a.qed"})
    assert events == [first]
    releases.sync({})
    releases.sync({"a.raw": "/a.qed"})
    assert events == [first, first]


async def test_the_command_releases_and_takes_back(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        served = await mount.add("disk", MemorySource(bytes(CLUSTER)))
        served.opens = 1
        assert await talk.get("x-qedfs-release", device="disk.raw") == {"released": False}
        served.opens = 0
        for _ in range(2):
            assert await talk.get("x-qedfs-release", device="disk") == {"released": True}
        status = await talk.get("x-qedfs-status")
        assert (status["released"], status["images"]) == (["disk.raw"], [])
        assert [event["event"] for event in talk.events].count("X_QEDFS_RELEASED") == 1
        assert await talk.get("x-qedfs-release", device="disk", undo=True) == {"released": False}
        assert (await talk.error("x-qedfs-release", device="disk"))[1].startswith("Cannot find device='disk'")
        assert (await talk.error("x-qedfs-release", device="disk", undo=True))[1].startswith("Cannot find device")
        assert served.image is not None
        await served.image.close()
