"""The first look at the place of a backing: refusals are listed at once, hangs hold up nobody. And standby sources."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qedfs.errors import Refused
from qedfs.format.header import NEED_CHECK, UNTOUCHED
from qedfs.format.record import SLOT_BYTES, Record, encode_record
from qedfs.mount import source_pool
from qedfs.mount.images import Images
from qedfs.mount.options import Options
from qedfs.mount.registry import Registry
from qedfs.mount.source_pool import CHECK_SECONDS, SourcePool
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay
from qedfs.source.policy import Policy
from qedfs.source.url import Location
from tests.source.qed import support as qed

OVERLAYS = 20


class DeadServer:
    """A file server whose paths cannot be looked at until it is back."""

    def __init__(self) -> None:
        self.back = trio.Event()
        self.waited_seconds = 0.0

    async def allowed(self, location: Location, policy: Policy) -> None:
        begun = trio.current_time()
        try:
            await self.back.wait()
        finally:
            self.waited_seconds += trio.current_time() - begun
        policy.check_location(location)


@pytest.fixture
def dead_server(monkeypatch: pytest.MonkeyPatch) -> DeadServer:
    server = DeadServer()
    monkeypatch.setattr(source_pool, "allowed", server.allowed)
    return server


def create(overlay: Path) -> None:
    """An overlay outside of what may be opened that has come to rest."""
    create_overlay(str(overlay), image_size=65536, backing="/secret/base.raw")
    os.utime(overlay, (1, 1))


@contextlib.asynccontextmanager
async def registry_of(path: Path) -> AsyncIterator[Registry]:
    async with trio.open_nursery() as nursery:
        images = Images(str(path), Options(stream=False, policy=Policy(("/allowed",))), nursery)
        try:
            yield images.registry
        finally:
            with trio.CancelScope(shield=True):
                assert await images.close() == []
            nursery.cancel_scope.cancel()


async def test_a_dead_file_server_delays_a_scan_once(
    tmp_path: Path, dead_server: DeadServer, autojump_clock: trio.testing.MockClock
) -> None:
    for number in range(OVERLAYS):
        create(tmp_path / f"{number}.qed")
    async with registry_of(tmp_path) as registry:
        await registry.scan()
        assert dead_server.waited_seconds == pytest.approx(CHECK_SECONDS)
        assert len(registry.images()) == OVERLAYS


async def test_a_source_that_was_not_checked_is_checked_when_it_is_opened(
    tmp_path: Path, dead_server: DeadServer, autojump_clock: trio.testing.MockClock
) -> None:
    create(tmp_path / "disk.qed")
    async with registry_of(tmp_path) as registry:
        await registry.scan()
        (served,) = registry.images()
        assert served.image is not None
        with pytest.raises(Refused):
            await served.image.read(0, 512)


@pytest.mark.expect_log("not served: .*new.qed: backing /secret/base.raw is outside every --allow-backing prefix")
async def test_the_next_scan_checks_again(
    tmp_path: Path, dead_server: DeadServer, autojump_clock: trio.testing.MockClock
) -> None:
    create(tmp_path / "disk.qed")
    async with registry_of(tmp_path) as registry:
        await registry.scan()
        dead_server.back.set()
        create(tmp_path / "new.qed")
        await registry.scan()
        disk, new = registry.everything()
        assert disk.image is not None
        assert isinstance(new.error, Refused)


async def test_what_is_wrong_with_an_image_is_told_once_in_standby(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, journal = tmp_path / "base", Record(sequence=1, session="5" * 32, journal="1000.7.abc")
    clusters = {qed.CLUSTER - SLOT_BYTES: encode_record(journal)}
    base.write_bytes(qed.image({qed.L1: [0]}, clusters, features=NEED_CHECK, autoclear=UNTOUCHED))
    create_overlay(str(tmp_path / "disk.qed"), image_size=65536, backing=str(base), raw_backing=False)
    overlay = await open_overlay(str(tmp_path / "disk.qed"), writable=False)
    async with trio.open_nursery() as nursery:
        pool = SourcePool(str(tmp_path), Policy((str(tmp_path),)), 30, nursery)
        through = await pool.pass_through_for(overlay, overlays=1)
        with caplog.at_level(logging.DEBUG, "qedfs.source.qed"):
            for _ in range(3):
                buffer = bytearray(b"\xee" * 4096)
                await through.read([(0, memoryview(buffer))])
                assert buffer == bytes(4096)
        await pool.aclose()
    await overlay.close()
    for text in ("was not closed cleanly", "is mounted itself"):
        levels = [record.levelno for record in caplog.records if text in record.getMessage()]
        assert levels == [logging.WARNING] + 3 * [logging.DEBUG]  # `remote`, and one of its own for each read
