"""The events about a source that is away: one for each image when it goes, one when it is back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import trio
import trio.testing

from qedfs.control.qmp.outages import Outages
from qedfs.errors import SourceUnreachable
from qedfs.image.image import Image
from qedfs.image.outage import look_at_source
from qedfs.jobs.stream import StreamJob
from tests.control.support import Served
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

CONTENT = b"c" * (8 * CLUSTER)


@dataclasses.dataclass
class Watch:
    """What is sent about one image."""

    image: Image
    events: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    gone: bool = False

    async def run(self) -> None:
        outages = Outages(lambda name, data: self.events.append((name, data)))
        found = Served("disk.raw", str(Path("/disk.qed")), self.image)
        while True:
            await trio.sleep(0.5)
            look_at_source(self.image)
            outages.sync([] if self.gone else [found])

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


async def test_two_events_for_each_outage(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        watch = Watch(image)
        nursery.start_soon(watch.run)
        for number in range(1, 4):
            source.fail = SourceUnreachable("refused")
            nursery.start_soon(_read_until_it_answers, image, number * CLUSTER)
            await trio.sleep(100)
            source.fail = None
            await trio.sleep(60)
            assert watch.names() == ["X_QEDFS_SOURCE_AWAY", "X_QEDFS_SOURCE_BACK"] * number
        away, back = watch.events[0][1], watch.events[1][1]
        assert away["device"] == back["device"] == "disk"
        assert away["backing"] == back["backing"] == "http://fake/disk.raw"
        assert away["since"] == back["since"]
        assert "no answer from http://fake/disk.raw" in away["error"]
        assert "error" not in back
        nursery.cancel_scope.cancel()


async def _read_until_it_answers(image: Image, pos: int) -> None:
    while True:
        try:
            await image.read(pos, 512)
        except SourceUnreachable:
            await trio.sleep(1)
        else:
            return


async def test_who_leaves_or_is_complete_needs_no_second_event(
    autojump_clock: trio.testing.MockClock,
) -> None:
    for completes in (True, False):
        source = FakeSource(CONTENT)
        async with served(source) as image, trio.open_nursery() as nursery:
            watch = Watch(image)
            nursery.start_soon(watch.run)
            source.gate = trio.Event()
            nursery.start_soon(_read_until_it_answers, image, 0)
            await trio.sleep(10)
            if completes:
                await image.write(0, CONTENT)  # nothing is missing any more
                await StreamJob(image).run()
                assert image.complete
            else:
                watch.gone = True
            await trio.sleep(10)
            assert watch.names() == ["X_QEDFS_SOURCE_AWAY"]
            nursery.cancel_scope.cancel()
