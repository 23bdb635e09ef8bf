"""An image that is closed while fetched bytes are being written into its overlay."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served


async def test_closing_waits_for_adoptions_under_way(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    async with served(FakeSource(b"c" * CLUSTER)) as image:
        adopt, close = image.overlay.adopt, image.overlay.close

        async def slow_adopt(pos: int, buffer: bytearray, size: int, *, cold: bool = False) -> int:
            await trio.sleep(1.0)
            kept = await adopt(pos, buffer, size, cold=cold)
            events.append("adopted")
            return kept

        async def noted_close() -> None:
            events.append("closed")
            await close()

        monkeypatch.setattr(image.overlay, "adopt", slow_adopt)
        monkeypatch.setattr(image.overlay, "close", noted_close)
        await image.read(0, 512)
        await image.close()
        assert image.counters.kept_asked == CLUSTER
    assert events == ["adopted", "closed"]
