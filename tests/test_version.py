"""The version of a source that is told bit by bit: each connection may know more of it than the one before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from qedfs.errors import SourceChanged
from qedfs.source.base import Identity
from qedfs.source.remote import Remote
from qedfs.source.url import parse_location
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

SIZE = 8 * CLUSTER


def versions(etags: Sequence[str | None]) -> list[FakeSource]:
    """One source for each connection, in turn; the bytes tell which one it was."""
    return [FakeSource(bytes([48 + number]) * SIZE, etag=etag) for number, etag in enumerate(etags)]


def lead(remote: Remote, etags: Sequence[str | None]) -> None:
    """Let the connections of `remote` lead to these versions, one after the other."""
    sources = iter(versions(etags))

    async def connect() -> FakeSource:
        await trio.lowlevel.checkpoint()
        return next(sources)

    remote._opener = connect


def reconnect(remote: Remote) -> None:
    """Let the next read open another connection."""
    remote._source = None


def new_overlay() -> MemoryStorage:
    return MemoryStorage(empty(cluster_size=CLUSTER, image_size=SIZE, backing=b"http://fake/disk.raw").data)


@pytest.mark.parametrize(
    ("known", "seen", "joined"),
    [
        (Identity(1), Identity(1, '"a"', "today"), Identity(1, '"a"', "today")),
        (Identity(1, '"a"'), Identity(1, None, "today"), Identity(1, '"a"', "today")),
        (Identity(1, '"a"', "today", "x"), Identity(1, None, None, "y"), Identity(1, '"a"', "today", "x")),
    ],
)
def test_what_both_tell(known: Identity, seen: Identity, joined: Identity) -> None:
    assert known.joined(seen) == joined
    assert joined.joined(seen) is joined


async def test_a_validator_that_comes_late_is_held_to(autojump_clock: trio.testing.MockClock) -> None:
    found = Remote(parse_location("http://fake/disk.raw"), FakeSource)  # type: ignore[arg-type]
    lead(found, [None, '"2"', None, '"3"'])
    buffer = bytearray(1)
    for expected in (b"0", b"1", b"2"):
        await found.read(0, memoryview(buffer))
        assert bytes(buffer) == expected
        reconnect(found)
    with pytest.raises(SourceChanged):
        await found.read(0, memoryview(buffer))


async def test_a_validator_that_comes_late_joins_the_pin_at_once(autojump_clock: trio.testing.MockClock) -> None:
    storage = new_overlay()
    async with served(FakeSource(b""), image_size=SIZE, storage=storage) as image:
        assert image.fetch is not None
        lead(image.fetch.remote, [None, '"2"'])
        assert await image.read(0, 1) == b"0"
        reconnect(image.fetch.remote)
        assert await image.read(CLUSTER, 1) == b"1"
        pin = image.overlay.record.pin
        assert pin is not None
        assert pin.etag == '"2"'
    async with served(FakeSource(b"3" * SIZE, etag='"3"'), storage=MemoryStorage(storage.bytes)) as image:
        with pytest.raises(SourceChanged):
            await image.read(4 * CLUSTER, 1)


@pytest.mark.parametrize("kept", [True, False])
async def test_a_validator_that_comes_late_is_compared_with_the_pin(
    autojump_clock: trio.testing.MockClock, kept: bool
) -> None:
    """The first connection of this session knew none; the pin of another session does."""
    first = new_overlay()
    async with served(FakeSource(b"p" * SIZE, etag='"1"'), storage=first) as image:
        await image.read(0, 1)
    storage = MemoryStorage(first.bytes)
    async with served(FakeSource(b""), image_size=SIZE, storage=storage, copy_on_read=kept) as image:
        assert image.fetch is not None
        lead(image.fetch.remote, [None, '"2"'])
        await image.read(CLUSTER, 1)
        await trio.sleep(1)
        reconnect(image.fetch.remote)
        missing = image.overlay.clusters.missing
        with pytest.raises(SourceChanged):
            await image.read(4 * CLUSTER, 1)
        await trio.sleep(1)
        assert image.overlay.clusters.missing == missing
        assert await image.read(0, 1) == b"p"
