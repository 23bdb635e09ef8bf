"""HttpSource against a server that does one thing wrong at a time."""

from __future__ import annotations

import contextlib
import socket

import pytest
import trio

from qedfs.errors import QedfsError, SourceChanged, SourceError, SourceUnreachable, UsageError
from qedfs.source.base import Identity
from qedfs.source.http import HttpSource, handle
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.hang import HANG_SECONDS
from tests.source.http.conftest import CONTENT, OpenSource, read

RIGHT = [
    *(
        "ok",
        "chunked",
        "interim",
        "close-after",
        "weak-etag",
        "no-validator",
        "busybox",
        "aws-chunked",
        "unknown-total",
    ),
    "ignore-whole-range",
]
TRANSIENT = [
    *("wrong-start", "wrong-end", "no-content-range", "garbled-content-range", "multipart"),
    *("short-body", "short-content-length", "long-content-length", "short-chunked", "short-chunked-clean"),
    *("long-chunked", "until-close", "close-at-once", "reset", "half-close", "garbage", "garbled-header"),
    *("huge-header", "endless-header", "retry-after-seconds", "ignore-range"),
    *(f"status-{code}" for code in (408, 425, 429, 500, 502, 503, 504, 507)),
]
PERMANENT = [
    *("gzip", "brotli", "redirect-nowhere"),
    *(f"status-{code}" for code in (204, 304, 400, 401, 403, 404, 410, 412, 416, 501)),
]
CHANGED = ["wrong-total", "other-etag", "ignore-range-other-version"]


@pytest.mark.parametrize("urgent", [False, True])
@pytest.mark.parametrize("behaviour", RIGHT)
async def test_right_answers_bring_the_right_bytes(
    server: FakeHttpServer, open_source: OpenSource, behaviour: str, urgent: bool
) -> None:
    source = await open_source(server.url())
    server.behaviour = behaviour
    for pos, size in ((0, 1), (1000, 65536), (len(CONTENT) - 7, 7), (0, len(CONTENT)), (5, 0)):
        assert await read(source, pos, size, urgent=urgent) == CONTENT[pos : pos + size]


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        *((name, SourceUnreachable) for name in TRANSIENT),
        *((name, SourceError) for name in PERMANENT),
        *((name, SourceChanged) for name in CHANGED),
    ],
)
async def test_a_hostile_answer_is_the_right_error_and_the_next_read_succeeds(
    server: FakeHttpServer, open_source: OpenSource, behaviour: str, error: type[QedfsError]
) -> None:
    source = await open_source(server.url())
    server.behaviour = behaviour
    with pytest.raises(QedfsError, match=f"127.0.0.1:{server.port}/disk.raw") as caught:
        await read(source, 1000, 65536)
    assert type(caught.value) is error
    server.behaviour = "ok"
    assert await read(source, 1000, 65536) == CONTENT[1000:66536]


async def test_a_changed_date_is_a_changed_file(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.etag = ""
    source = await open_source(server.url())
    server.behaviour = "other-date"
    with pytest.raises(SourceChanged, match="Last-Modified was"):
        await read(source, 0, 10)


async def test_bytes_behind_an_answer_reach_nobody(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    server.behaviour = "extra-bytes"
    right = 0
    for pos in range(0, 40, 4):
        # libcurl drops a connection on which something waits. What comes later still fails the judge.
        with contextlib.suppress(SourceUnreachable):
            assert await read(source, pos, 4) == CONTENT[pos : pos + 4]
            right += 1
    assert right


async def test_the_servers_wish_to_wait_is_passed_on(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    for behaviour, seconds in (("retry-after-seconds", 7), ("retry-after-hour", 60), ("retry-after-garbled", None)):
        server.behaviour = behaviour
        with pytest.raises(SourceUnreachable) as caught:
            await read(source, 0, 10)
        assert caught.value.retry_after_seconds == seconds


@pytest.mark.parametrize("behaviour", ["silence", "slow-header", "slow-body"])
async def test_a_transfer_that_does_not_move_is_given_up(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setattr(handle, "STALL_SECONDS", 1)
    source = await open_source(server.url())
    server.behaviour = behaviour
    with trio.fail_after(HANG_SECONDS), pytest.raises(SourceUnreachable, match="too slow"):
        await read(source, 0, 65536)


async def test_identity(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    place = source.identity.place
    assert len(place) == 16
    assert source.identity == Identity(len(CONTENT), server.etag, server.last_modified, server.url(), place=place)
    assert await source.extents(0, 10) is None


async def test_what_is_sent(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url("/a?b=c").replace("//", "//us%20er:pass@"), headers=["X-Token: yes"])
    await read(source, 10, 20)
    opening, reading = server.requests
    assert opening.headers["range"] == "bytes=0-511"
    assert reading.headers["range"] == "bytes=10-29"
    assert "if-match" not in opening.headers
    assert reading.headers["if-match"] == server.etag
    for request in (opening, reading):
        assert (request.method, request.path) == ("GET", "/a?b=c")
        assert request.headers["accept-encoding"] == "identity"
        assert request.headers["user-agent"].startswith("qedfs/")
        assert request.headers["authorization"] == "Basic dXMgZXI6cGFzcw=="
        assert request.headers["x-token"] == "yes"


@pytest.mark.parametrize(
    ("etag", "last_modified", "condition"),
    [
        ('W/"weak"', "Mon, 01 Jan 2024 00:00:00 GMT", ("if-unmodified-since", "Mon, 01 Jan 2024 00:00:00 GMT")),
        ("", "", None),
    ],
)
async def test_the_condition_without_a_strong_etag(
    server: FakeHttpServer,
    open_source: OpenSource,
    etag: str,
    last_modified: str,
    condition: tuple[str, str] | None,
) -> None:
    server.etag, server.last_modified = etag, last_modified
    source = await open_source(server.url())
    await read(source, 0, 10)
    sent = server.requests[-1].headers
    conditions = [(name, sent[name]) for name in ("if-match", "if-unmodified-since") if name in sent]
    assert conditions == ([condition] if condition else [])


@pytest.mark.parametrize("with_etag", [True, False])
async def test_a_file_replaced_by_one_of_the_same_length(
    server: FakeHttpServer, open_source: OpenSource, with_etag: bool
) -> None:
    if not with_etag:
        server.etag = ""
    source = await open_source(server.url())
    await read(source, 0, 10)
    server.content = CONTENT[::-1]
    server.etag, server.last_modified = '"version-2"' if with_etag else "", "Tue, 02 Jan 2024 00:00:00 GMT"
    with pytest.raises(SourceChanged):
        await read(source, 0, 10)


@pytest.mark.parametrize("behaviour", ["ok", "ignore-range"])
async def test_an_empty_file(server: FakeHttpServer, open_source: OpenSource, behaviour: str) -> None:
    server.content, server.behaviour = b"", behaviour
    source = await open_source(server.url())
    assert source.identity.size == 0
    assert await read(source, 0, 0) == b""


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("ignore-range", SourceError, "ignores range requests"),
        ("hidden-total-no-head", SourceError, "does not report the size .* and HEAD does not report it either"),
        ("status-404", SourceError, "no such file"),
        ("status-503", SourceUnreachable, "overloaded"),
        ("gzip", SourceError, "Content-Encoding"),
        ("wrong-start", SourceUnreachable, "got 1-512"),
        ("long-content-length", SourceUnreachable, "Content-Length 517"),
        ("garbage", SourceUnreachable, "127.0.0.1"),
    ],
)
async def test_opening_fails_with_a_clear_message(
    server: FakeHttpServer, open_source: OpenSource, behaviour: str, error: type[QedfsError], message: str
) -> None:
    server.behaviour = behaviour
    with pytest.raises(error, match=message) as caught:
        await open_source(server.url())
    assert type(caught.value) is error


async def test_nobody_listens(open_source: OpenSource) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(SourceUnreachable, match=r"cannot connect \(connection refused\)"):
        await open_source(f"http://127.0.0.1:{port}/")


async def test_a_name_that_does_not_resolve(open_source: OpenSource) -> None:
    with pytest.raises(SourceUnreachable, match="host name does not resolve"):
        await open_source("http://host.invalid/")


async def test_a_range_outside_is_the_callers_mistake(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    for pos, size in ((-1, 1), (len(CONTENT), 1), (len(CONTENT) - 1, 2)):
        with pytest.raises(ValueError, match="is not inside"):
            await read(source, pos, size)


async def test_other_kinds_of_location_are_refused(open_source: OpenSource) -> None:
    with pytest.raises(UsageError, match="not an http"):
        await open_source("nbd://127.0.0.1/")


@pytest.mark.parametrize("behaviour", [*TRANSIENT, *PERMANENT, *CHANGED, "redirect-302"])
async def test_no_secret_is_in_any_error(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource, behaviour: str
) -> None:
    url = server.url("/disk.raw?X-Signature=canary", userinfo="user:canary")
    other_server.behaviour = behaviour if behaviour != "redirect-302" else "status-404"
    server.redirect_to = other_server.url("/x?sig=canary", userinfo="canary:canary")
    texts = []
    source = await open_source(url, headers=["Authorization: Bearer canary"])
    for change in (behaviour, "redirect-302"):
        server.behaviour = change
        for action in (read(source, 0, 4000), open_source(url)):
            try:
                await action
            except QedfsError as exc:
                texts.append(_all_texts(exc))
    assert texts
    assert "canary" not in "".join(texts)
    assert "canary" not in repr(source) + repr(source.identity) + repr(vars(source))


def _all_texts(exc: BaseException | None) -> str:
    texts = []
    while exc is not None:
        texts.append(f"{exc!r} {exc}")
        exc = exc.__cause__ or exc.__context__
    return "\n".join(texts)


async def test_what_came_of_an_answer_that_was_given_up_counts(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    server.behaviour = "slow-body"
    before = source.received
    with trio.fail_after(HANG_SECONDS), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, source, 0, 65536)
            while source.received == before:  # noqa: ASYNC110 - bytes are no event
                await trio.sleep(0.01)
            scope.cancel()
    assert source.received > before


async def test_a_server_that_is_slower_than_the_deadline_is_not_dead(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    async def opener() -> HttpSource:
        return await open_source(server.url())

    remote = RetryingSource(parse_location(server.url()), opener, deadline_seconds=1)
    await remote.connect()
    server.behaviour = "slow-body"
    with pytest.raises(SourceUnreachable):
        await remote.read(0, memoryview(bytearray(65536)), urgent=True)
    assert not remote.is_dead
    server.behaviour = "silence"
    with pytest.raises(SourceUnreachable):
        await remote.read(0, memoryview(bytearray(65536)), urgent=True)
    assert remote.is_dead
