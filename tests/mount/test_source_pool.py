"""The first look at the place of a backing: what is refused is listed at once, and what hangs holds up nobody."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qedfs.errors import Refused
from qedfs.mount import source_pool
from qedfs.mount.images import Images
from qedfs.mount.options import Options
from qedfs.mount.registry import Registry
from qedfs.mount.source_pool import CHECK_SECONDS
from qedfs.overlay.create import create_overlay
from qedfs.source.policy import Policy
from qedfs.source.url import Location

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
