"""A new rule for a source that is away: what it does to requests that wait is in test_stalls.py."""

from __future__ import annotations

import trio
import trio.testing

from qedfs.image.source_errors import EIO, OnSourceError
from qedfs.image.source_rule import set_source_errors
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

CONTENT = b"c" * (4 * CLUSTER)


async def test_a_rule_is_kept_in_the_record(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await set_source_errors(image, OnSourceError(wait=True, bound_seconds=60))
        assert image.overlay.record.on_source_error == "wait:60"
        await set_source_errors(image, EIO)
        assert image.overlay.record.on_source_error == ""


async def test_a_complete_image_records_no_rule(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await set_source_errors(image, OnSourceError(wait=True))
        await StreamJob(image).run()
        assert image.complete
        assert image.overlay.record.on_source_error == ""
        await set_source_errors(image, OnSourceError(wait=True))
        assert image.overlay.record.on_source_error == ""
