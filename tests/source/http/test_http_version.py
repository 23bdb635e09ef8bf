"""A file that is replaced while it is read, or is told of in another way: every kind of validator against every other.

The scripted server's content and validators change between two reads. What must never happen is that bytes of another
version are handed out; what should not happen is that the same bytes are refused.
"""

from __future__ import annotations

import base64
import hashlib
import itertools

import pytest
import trio

from qedfs.errors import SourceChanged, SourceUnreachable
from qedfs.source.base import Identity, Sameness
from qedfs.source.http import HttpSource
from qedfs.source.pinning import By, Pinning
from qedfs.source.policy import Policy
from qedfs.source.samples import Samples
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.source.http.conftest import CONTENT, OpenSource, read

MONDAY, TUESDAY = "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"
KINDS = {
    "none": ("", ""),
    "date": ("", MONDAY),
    "weak": ('W/"a"', ""),
    "weak, date": ('W/"a"', MONDAY),
    "strong": ('"a"', ""),
    "strong, date": ('"a"', MONDAY),
}
OTHERS = {
    "none": ("", ""),
    "date": ("", TUESDAY),
    "weak": ('W/"b"', ""),
    "weak, date": ('W/"b"', TUESDAY),
    "strong": ('"b"', ""),
    "strong, date": ('"b"', TUESDAY),
}
OTHER = CONTENT[::-1]
KIB = 1024


def tell(server: FakeHttpServer, validators: tuple[str, str]) -> None:
    server.etag, server.last_modified = validators


async def read_some(source: HttpSource) -> None:
    """As a guest does: so there are blocks to compare."""
    for pos in (0, 300 * KIB, 600 * KIB):
        assert await read(source, pos, 64 * KIB) == CONTENT[pos : pos + 64 * KIB]


@pytest.mark.parametrize(("pinned", "shown"), [*itertools.product(KINDS, KINDS)])
async def test_the_same_bytes_are_the_same_version(
    server: FakeHttpServer, open_source: OpenSource, pinned: str, shown: str
) -> None:
    tell(server, KINDS[pinned])
    source = await open_source(server.url())
    await read_some(source)
    tell(server, KINDS[shown])
    for pos in (64 * KIB, 128 * KIB):
        assert await read(source, pos, 64 * KIB, urgent=True) == CONTENT[pos : pos + 64 * KIB]
    # And back again.
    tell(server, KINDS[pinned])
    assert await read(source, 192 * KIB, 64 * KIB) == CONTENT[192 * KIB : 256 * KIB]


# A server that never tells anything cannot be caught in the middle, but at a remount (tests/image/test_pin.py).
@pytest.mark.parametrize(
    ("pinned", "shown"), [pair for pair in itertools.product(KINDS, OTHERS) if pair != ("none",) * 2]
)
async def test_other_bytes_are_another_version(
    server: FakeHttpServer, open_source: OpenSource, pinned: str, shown: str
) -> None:
    tell(server, KINDS[pinned])
    source = await open_source(server.url())
    await read_some(source)
    tell(server, OTHERS[shown])
    server.content = OTHER
    for urgent in (False, True):
        with pytest.raises(SourceChanged):
            await read(source, 64 * KIB, 64 * KIB, urgent=urgent)


def _unproved(pinned: str, shown: str) -> bool:
    """Whether nothing that is told says that it is the same version."""
    known, seen = (Identity(1, KINDS[kind][0] or None, KINDS[kind][1] or None) for kind in (pinned, shown))
    return pinned != shown and known.compare(seen).sameness is not Sameness.SAME


@pytest.mark.parametrize(("pinned", "shown"), [pair for pair in itertools.product(KINDS, KINDS) if _unproved(*pair)])
async def test_other_bytes_that_are_told_of_in_another_way(
    server: FakeHttpServer, open_source: OpenSource, pinned: str, shown: str
) -> None:
    """Tag and date are the same where they are told, as after `cp -p`: so it is the bytes that tell."""
    tell(server, KINDS[pinned])
    source = await open_source(server.url())
    await read_some(source)
    tell(server, KINDS[shown])
    server.content = OTHER
    with pytest.raises(SourceChanged, match="the bytes at 0 differ"):
        await read(source, 64 * KIB, 64 * KIB)


async def test_without_anything_to_compare_a_validator_that_vanishes_is_a_change(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    source = await open_source(server.url())
    assert await read(source, 0, 100) == CONTENT[:100]  # less than a block
    tell(server, ("", ""))
    with pytest.raises(SourceChanged, match=r"ETag was .* is now not told"):
        await read(source, 0, 100)


async def test_before_anything_was_read_it_is_told_on(server: FakeHttpServer, open_source: OpenSource) -> None:
    """There is nothing to differ from, but an overlay may have a pin, so it must hear what is told no longer."""
    source = await open_source(server.url())
    tell(server, ("", ""))
    assert await read(source, 0, 100) == CONTENT[:100]
    assert (source.identity.etag, source.identity.last_modified) == (None, None)


async def test_samples_of_an_earlier_session_count_before_anything_was_read(
    server: FakeHttpServer, nursery: trio.Nursery
) -> None:
    samples = Samples()
    samples.offer(0, memoryview(OTHER)[: 64 * KIB])
    source = await HttpSource.open(parse_location(server.url()), Policy(), nursery, samples=samples)
    tell(server, ("", ""))
    with pytest.raises(SourceChanged, match="the bytes at 0 differ"):
        await read(source, 0, 100)


async def test_a_doubt_is_proved_once(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    await read_some(source)
    tell(server, ("", ""))
    await read(source, 0, 64 * KIB)
    before = len(server.requests)
    for _ in range(5):
        await read(source, 64 * KIB, 64 * KIB)
    assert len(server.requests) == before + 5


async def test_many_readers_in_doubt_prove_it_once(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    await read_some(source)
    tell(server, ("", ""))
    server.requests.clear()

    async def check(pos: int) -> None:
        assert await read(source, pos, 5 * KIB) == CONTENT[pos : pos + 5 * KIB]

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(check, number * 16 * KIB)
    compared = [f"bytes={pos}-{pos + 4095}" for pos in (0, 300 * KIB, 600 * KIB)]
    asked = [request.headers["range"] for request in server.requests]
    assert sorted(asked_range for asked_range in asked if asked_range in compared) == compared


# Conditions.


async def test_a_server_that_finds_no_condition_met(server: FakeHttpServer, open_source: OpenSource) -> None:
    """412 to every If-Match, as some storages and proxies answer: the file is the same all the same."""
    source = await open_source(server.url())
    server.behaviour = "unmet"
    for pos in (0, 64 * KIB, 128 * KIB):
        assert await read(source, pos, 64 * KIB) == CONTENT[pos : pos + 64 * KIB]
    # Asked once; from then on without condition.
    assert [request.headers["range"] for request in server.requests].count("bytes=0-511") == 2
    assert sum("if-match" in request.headers for request in server.requests) == 1
    server.etag = '"b"'
    with pytest.raises(SourceChanged, match="ETag was"):
        await read(source, 0, 100)


async def test_412_because_the_file_was_replaced(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    server.etag, server.content = '"version-2"', OTHER
    with pytest.raises(SourceChanged, match='ETag was "version-1", is now "version-2"'):
        await read(source, 0, 100)


# Several servers behind one name, each with tags of its own for the same bytes.


@pytest.mark.parametrize("by", [By.DATE, By.SIZE, By.NONE])
async def test_nodes_with_tags_of_their_own(server: FakeHttpServer, nursery: trio.Nursery, by: By) -> None:
    source = await HttpSource.open(parse_location(server.url()), Policy(), nursery, pinning=Pinning(by))
    for number in range(20):
        server.etag = f'"{number % 3}"'
        assert await read(source, number * KIB, 40 * KIB) == CONTENT[number * KIB : (number + 40) * KIB]
    assert not any("if-match" in request.headers for request in server.requests)
    server.content = CONTENT + b"x"
    with pytest.raises(SourceChanged, match="size was"):
        await read(source, 0, 100)


async def test_nodes_whose_dates_differ(server: FakeHttpServer, nursery: trio.Nursery) -> None:
    tell(server, ('W/"a"', MONDAY))
    source = await HttpSource.open(parse_location(server.url()), Policy(), nursery, pinning=Pinning(By.ETAG))
    for day in (MONDAY, TUESDAY, MONDAY, ""):
        tell(server, ('W/"a"', day))
        assert await read(source, 0, 100) == CONTENT[:100]
    tell(server, ('W/"b"', MONDAY))
    with pytest.raises(SourceChanged):
        await read(source, 0, 100)


async def test_nodes_that_publish_the_same_digest(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.extra = {"Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()}:"}
    source = await open_source(server.url())
    assert source.identity.digest == f"sha-256:{hashlib.sha256(CONTENT).hexdigest()}"
    for number in range(6):
        server.etag = f'"{number % 3}"'
        assert await read(source, number * KIB, 40 * KIB) == CONTENT[number * KIB : (number + 40) * KIB]
    server.extra = {"X-Checksum-SHA256": hashlib.sha256(OTHER).hexdigest()}
    server.content = OTHER
    with pytest.raises(SourceChanged, match="digest was sha-256:"):
        await read(source, 0, 100)


async def test_a_server_that_contradicts_itself_is_no_other_version(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    """A new story with each answer: nothing is handed out, and nobody is told that the file was replaced."""
    source = await open_source(server.url())
    await read_some(source)
    server.behaviour = "never-the-same"
    with pytest.raises(SourceUnreachable, match="contradicts itself"):
        await read(source, 0, 100)
    server.behaviour = "ok"
    assert await read(source, 0, 100) == CONTENT[:100]


# Redirectors.


@pytest.mark.parametrize("same", [True, False])
async def test_another_mirror(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource, same: bool
) -> None:
    """The first one goes away; the redirector leads to one with tags and dates of its own."""
    with FakeHttpServer(CONTENT if same else OTHER) as second:
        tell(second, ('"mirror"', TUESDAY))
        server.behaviour, server.redirect_to = "redirect-302", other_server.url()
        source = await open_source(server.url())
        await read_some(source)
        other_server.behaviour, server.redirect_to = "status-404", second.url()
        if same:
            for pos in (0, 64 * KIB):
                assert await read(source, pos, 64 * KIB) == CONTENT[pos : pos + 64 * KIB]
            assert source.identity.etag == '"mirror"'
        else:
            with pytest.raises(SourceChanged, match="the bytes at 0 differ"):
                await read(source, 0, 64 * KIB)


async def test_a_redirector_that_publishes_the_digest(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource
) -> None:
    server.behaviour, server.redirect_to = "redirect-302", other_server.url()
    server.extra = {"Digest": f"SHA-256={base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()}"}
    source = await open_source(server.url())
    assert source.identity.digest == f"sha-256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert await read(source, 0, 100) == CONTENT[:100]
