"""A server that tells no validator at first: what it tells later is held to from then on."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import SourceChanged
from qedfs.source.base import Source
from qedfs.source.http import HttpSource
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.source.http.conftest import CONTENT, OpenSource, read


async def opened_blind(server: FakeHttpServer, open_source: OpenSource) -> HttpSource:
    """A source whose server has told nothing but the size."""
    server.behaviour = "no-validator"
    source = await open_source(server.url())
    assert (source.identity.etag, source.identity.last_modified) == (None, None)
    assert await read(source, 0, 100) == CONTENT[:100]
    server.behaviour = "ok"
    return source


async def test_what_an_answer_tells_is_held_to(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await opened_blind(server, open_source)
    await read(source, 100, 100)
    assert source.identity.etag == server.etag
    assert source.identity.last_modified == server.last_modified
    server.etag = '"version-2"'
    with pytest.raises(SourceChanged):
        await read(source, 200, 100)


async def test_a_garbled_validator_is_not_taken_over(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await opened_blind(server, open_source)
    server.etag, server.last_modified = "W/version-1", "yesterday"
    await read(source, 100, 100)
    assert (source.identity.etag, source.identity.last_modified) == (None, None)


async def test_a_weak_one_is(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await opened_blind(server, open_source)
    server.etag, server.last_modified = 'W/"version-1"', ""
    await read(source, 100, 100)
    server.etag = 'W/"version-2"'
    with pytest.raises(SourceChanged):
        await read(source, 200, 100)


async def test_the_remote_knows_what_its_source_has_learnt(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await opened_blind(server, open_source)

    async def connect() -> Source:
        await trio.lowlevel.checkpoint()
        return source

    remote = RetryingSource(parse_location(server.url()), connect)
    assert (await remote.connect()).etag is None
    buffer = bytearray(100)
    await remote.read(100, memoryview(buffer))
    assert buffer == CONTENT[100:200]
    assert remote.identity is not None
    assert remote.identity.etag == server.etag
    again = remote.identity
    await remote.read(300, memoryview(buffer))
    assert remote.identity is again
