"""Places that a redirect led to come and go; the origin knows where the file is now."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from qedfs.errors import Reason, SourceChanged, SourceError, SourceUnreachable
from qedfs.source.http.route import MOMENT_SECONDS, RouteHealth
from qedfs.source.open import remote_source
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.mounts import qedfs
from tests.source.http.conftest import CONTENT

DEADLINE_SECONDS = 6.0  # so that a silent mirror costs two


@pytest.fixture
def mirrors() -> Iterator[list[FakeHttpServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeHttpServer(CONTENT)) for _ in range(2)]


@asynccontextmanager
async def remote(url: str, *, deadline_seconds: float = DEADLINE_SECONDS) -> AsyncIterator[RetryingSource]:
    async with trio.open_nursery() as nursery:
        source = remote_source(parse_location(url), Policy(), nursery, deadline_seconds=deadline_seconds)
        try:
            yield source
        finally:
            await source.aclose()


async def read(source: RetryingSource, pos: int = 9, size: int = 10) -> None:
    buffer = bytearray(size)
    await source.read(pos, memoryview(buffer))
    assert buffer == CONTENT[pos : pos + size]


def behave(name: str) -> Callable[[FakeHttpServer], None]:
    def trouble(server: FakeHttpServer) -> None:
        server.behaviour = name

    return trouble


TROUBLES = {
    "gone": FakeHttpServer.close,
    **{
        name: behave(name)
        for name in (
            *(f"status-{code}" for code in (400, 401, 403, 404, 410, 429, 500, 501, 503)),
            *("retry-after-hour", "silence", "slow-header", "close-at-once", "reset", "garbage", "gzip", "wrong-start"),
        )
    },
}


@pytest.mark.parametrize("code", [301, 302])
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_lasting_trouble_at_a_mirror_leads_to_the_next_one(
    server: FakeHttpServer, mirrors: list[FakeHttpServer], trouble: str, code: int
) -> None:
    server.behaviour, server.redirect_to = f"redirect-{code}", mirrors[0].url("/a")
    async with remote(server.url()) as source:
        await read(source)
        server.redirect_to = mirrors[1].url("/b")
        TROUBLES[trouble](mirrors[0])
        await read(source)
        asked, received = len(server.requests), len(mirrors[0].requests)
        await read(source)
        # It stays there, and tells nobody else about it.
        assert (len(server.requests), len(mirrors[0].requests)) == (asked, received)
    assert asked == 2


async def test_trouble_of_a_moment_asks_nobody(server: FakeHttpServer, mirrors: list[FakeHttpServer]) -> None:
    server.behaviour, server.redirect_to = "redirect-302", mirrors[0].url("/a")
    async with remote(server.url()) as source:
        for _ in range(3):
            await read(source)
            mirrors[0].queue.append("status-503")
        await read(source)
    assert len(server.requests) == 1


async def test_the_origin_is_asked_once_in_a_deadline(server: FakeHttpServer, mirrors: list[FakeHttpServer]) -> None:
    """However many readers there are: the mirror is dead, and the origin knows no better."""
    server.behaviour, server.redirect_to = "redirect-302", mirrors[0].url("/a")
    async with remote(server.url(), deadline_seconds=2) as source:
        await read(source)
        mirrors[0].behaviour = "status-404"

        async def fails() -> None:
            with pytest.raises(SourceUnreachable, match=r"redirected to .*/a\) has no such file"):
                await read(source)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(fails)
    # At the opening, when the trouble began, and perhaps when the last reader's last try met the next deadline.
    assert 2 <= len(server.requests) <= 3


async def test_a_mirror_that_comes_back_is_used_again(server: FakeHttpServer, mirrors: list[FakeHttpServer]) -> None:
    """The origin may be down by then, or lead to a mirror that has another version."""
    server.behaviour, server.redirect_to = "redirect-302", mirrors[0].url("/a")
    mirrors[1].etag = '"version-2"'
    async with remote(server.url(), deadline_seconds=1) as source:
        for behaviour, target in (("status-500", ""), ("redirect-302", mirrors[1].url("/b"))):
            await read(source)
            server.behaviour, server.redirect_to = behaviour, target
            mirrors[0].behaviour = "close-at-once"
            with pytest.raises(SourceUnreachable, match="asked again"):
                await read(source)
            mirrors[0].behaviour = "ok"
            await read(source)


async def test_an_expired_link_that_leads_to_another_version(
    server: FakeHttpServer, mirrors: list[FakeHttpServer]
) -> None:
    server.behaviour, server.redirect_to = "redirect-302", mirrors[0].url("/a")
    mirrors[1].etag = '"version-2"'
    async with remote(server.url()) as source:
        await read(source)
        mirrors[0].behaviour, server.redirect_to = "status-401", mirrors[1].url("/b")
        with pytest.raises(SourceChanged):
            await read(source)


@pytest.mark.parametrize("trouble", ["status-404", "status-403", "ignore-range", "unknown-total", "silence"])
async def test_a_bad_mirror_does_not_end_an_opening(
    server: FakeHttpServer, mirrors: list[FakeHttpServer], trouble: str
) -> None:
    server.behaviour, server.redirect_to = "redirect-302", mirrors[0].url("/a")
    mirrors[0].behaviour = trouble
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def rotate() -> None:
            await trio.to_thread.run_sync(mirrors[0].asked.wait)
            server.redirect_to = mirrors[1].url("/b")

        async with remote(server.url()) as source:
            assert (await source.connect()).size == len(CONTENT)
            await read(source)


async def test_what_is_missing_for_good_is_said_at_once(server: FakeHttpServer, mirrors: list[FakeHttpServer]) -> None:
    """A permanent redirect, as from http to https, is no rotation."""
    server.behaviour, server.redirect_to = "redirect-301", mirrors[0].url("/a")
    mirrors[0].behaviour = "status-404"
    async with remote(server.url(), deadline_seconds=30) as source:
        with pytest.raises(SourceError, match=r"redirected to .*/a\) has no such file") as caught:
            await source.connect()
        assert not isinstance(caught.value, SourceUnreachable)


def test_create_goes_on_to_the_next_mirror(
    server: FakeHttpServer, mirrors: list[FakeHttpServer], tmp_path: Path
) -> None:
    server.queue.append("redirect-307")
    server.behaviour, server.redirect_to = "ok", mirrors[0].url("/a")
    mirrors[0].behaviour = "status-404"
    qedfs("create", tmp_path / "disk.qed", "--backing", server.url())


def test_the_rule() -> None:
    """In the order in which one place lives: trouble, a question, no news until a deadline is over, a good read."""
    cut, refused = SourceUnreachable("cut", reason=Reason.CUT), SourceError("404")
    health = RouteHealth(30)
    assert health.silent_seconds(0) == 10
    assert not health.lasting(cut, 100)
    assert not health.lasting(cut, 100 + MOMENT_SECONDS / 2)
    assert health.lasting(cut, 100 + MOMENT_SECONDS)
    assert health.may_ask(101)
    health.asked(101)
    assert not health.may_ask(130.9)
    assert health.silent_seconds(130.9) == math.inf
    assert health.may_ask(131)
    health.asked(131)
    health.succeeded()
    assert health.may_ask(132)
    assert not health.lasting(cut, 132)
    for at_once in (
        refused,
        SourceUnreachable("silent", reason=Reason.TIMEOUT),
        SourceUnreachable("busy", reason=Reason.SERVER, retry_after_seconds=5),
    ):
        assert RouteHealth(30).lasting(at_once, 1)
