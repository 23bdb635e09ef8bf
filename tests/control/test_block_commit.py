"""`block-commit` over the control socket: QEMU's arguments, and what is refused."""

from __future__ import annotations

from pathlib import Path

from .support import CLUSTER, URL, MemorySource, controlled, talking


async def test_its_arguments_are_judged_as_qemu_does(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("disk", MemorySource(b"x" * CLUSTER))

        async def error(**arguments: object) -> str:
            return str((await talk.ask("block-commit", device="disk", **arguments))["error"]["desc"])

        assert "at the same time" in await error(base="a", **{"base-node": "b"})
        assert "at the same time" in await error(top="a", **{"top-node": "b"})
        assert await error(**{"base-node": "b"}) == "Cannot find device='' nor node-name='b'"
        assert await error(base="other") == "Can't find 'other' in the backing chain"
        assert await error(**{"top-node": "other"}) == "Cannot find device='' nor node-name='other'"
        assert await error(top="other") == "Top image file other not found"
        assert "'top' is the active layer" in await error(**{"backing-file": "x"})
        assert await error(**{"job-id": "-"}) == "Invalid job ID '-'"
        assert "non-negative" in await error(speed=-1)
        # The backing of this image is no local file.
        assert "has no source" in await error(base=URL, **{"top-node": "disk"})
        assert await talk.get("query-block-jobs") == []
