"""Many readers and a source that is away: all of them learn it within one deadline, and the hold of a dead source."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.errors import SourceUnreachable
from qedfs.overlay.create import create_overlay
from qedfs.source.base import Source
from qedfs.source.circuit_breaker import HOLD_DEADLINES
from tests.fakes.source import FakeSource
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import free_port, wait_for
from tests.served import CLUSTER, served

DEADLINE_SECONDS = 2.0


async def _refused() -> Source:
    raise SourceUnreachable("http://fake/disk.raw: connection refused")


def test_a_source_that_does_not_answer_is_named_long_before_the_deadline(tmp_path: Path) -> None:
    """The kernel accepts the connection, and nobody reads the request."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/disk.raw"
        create_overlay(str(tmp_path / "disk.qed"), image_size=CLUSTER, backing=url)
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--source-timeout", "1h") as mount:
            wait_for(lambda: mount.image()["state"] == "waiting", "the state of the image")
            assert mount.image()["reason"].startswith("source away since ")
            assert mount.image()["reason"].endswith(f": no answer from {url}")
            assert mount.image()["condition"][0]["cause"] == "source-away"
            done = qedfs("status", mount.mountpoint)
            assert "disk.raw: waiting (source away since " in done.stdout
    refused = f"http://127.0.0.1:{free_port()}/disk.raw"
    create_overlay(str(tmp_path / "other.qed"), image_size=CLUSTER, backing=refused)
    with mounted(tmp_path / "other.qed", tmp_path / "mnt", "--source-timeout", "1h") as mount:
        wait_for(lambda: mount.image()["state"] == "waiting", "the state of the image")
        assert mount.image()["reason"].endswith(": cannot connect (connection refused)")


async def test_readers_do_not_wait_for_each_others_deadlines(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(bytes(CLUSTER)), deadline_seconds=DEADLINE_SECONDS) as image:
        assert image.fetch is not None
        image.fetch.remote._opener = _refused
        waited = []

        async def read() -> None:
            begun = trio.current_time()
            with pytest.raises(SourceUnreachable):
                await image.read(0, 512)
            waited.append(trio.current_time() - begun)

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(read)
        assert len(waited) == 50
        assert max(waited) < (1.1 + HOLD_DEADLINES) * DEADLINE_SECONDS  # on a mock clock


async def test_a_killed_reader_does_not_end_the_look_at_the_source(autojump_clock: trio.testing.MockClock) -> None:
    content = b"c" * CLUSTER
    source = FakeSource(content)
    async with served(source) as image:
        with trio.move_on_after(source.round_trip / 2) as killed:
            await image.read(0, 512)
        assert killed.cancelled_caught
        with trio.fail_after(3 * source.round_trip):
            assert bytes(await image.read(0, 512)) == content[:512]
