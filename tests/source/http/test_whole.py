"""Servers whose ranges are odd: the whole file in place of a part, once or always; no total; codings that are none."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.source.http import HttpSource, client, resolve
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.process import Child, free_port, listening
from tests.harness.require import require
from tests.harness.servers import nginx
from tests.source.http.conftest import CONTENT, OpenSource, read

SMALL = CONTENT[: 370 << 10]  # a seed ISO
PIECES = [(0, len(SMALL)), (0, 1), (0, 65536), (65536, 65536), (len(SMALL) - 1, 1), (1, len(SMALL) - 1)]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (client, resolve):
        monkeypatch.setattr(module, "IGNORED_SECONDS", 0.01)


@contextlib.contextmanager
def busybox(folder: Path) -> Iterator[str]:
    port = free_port()
    argv: list[str | Path] = [require("busybox"), "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", folder]
    child = Child(argv, folder.parent / "busybox.log")
    try:
        child.wait_until(lambda: listening(("127.0.0.1", port)), "a listening socket")
        yield f"http://127.0.0.1:{port}"
    finally:
        child.kill()


@contextlib.contextmanager
def python(folder: Path) -> Iterator[str]:
    """`python -m http.server`, which knows no ranges."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def nginx_without_ranges(folder: Path) -> Iterator[str]:
    with nginx(folder, location="max_ranges 0;") as running:
        yield running.url


@pytest.mark.parametrize("serving", [busybox, python, nginx_without_ranges])
async def test_a_seed_iso_on_a_real_server(
    tmp_path: Path,
    open_source: OpenSource,
    serving: Callable[[Path], contextlib.AbstractContextManager[str]],
) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "seed.iso").write_bytes(SMALL)
    (folder / "one").write_bytes(b"1")
    (folder / "two").write_bytes(b"12")
    (folder / "empty").write_bytes(b"")
    with serving(folder) as url:
        source = await open_source(f"{url}/seed.iso")
        for pos, size in PIECES:
            for urgent in (False, True):
                assert await read(source, pos, size, urgent=urgent) == SMALL[pos : pos + size]
        for name, content in (("one", b"1"), ("two", b"12"), ("empty", b"")):
            source = await open_source(f"{url}/{name}")
            assert source.identity.size == len(content)
            assert await read(source, 0, len(content)) == content
            assert await read(source, 0, 1 if content else 0) == content[:1]
        await source.aclose()


async def test_a_large_image_on_busybox(tmp_path: Path, open_source: OpenSource) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "disk.raw").write_bytes(CONTENT)
    with busybox(folder) as url:
        source = await open_source(f"{url}/disk.raw")
        for pos, size in ((0, 1), (0, 2), (0, len(CONTENT)), (len(CONTENT) - 1, 1), (1000, 65536)):
            assert await read(source, pos, size) == CONTENT[pos : pos + size]
        await source.aclose()


@pytest.mark.parametrize("behaviour", ["ignore-range", "ignore-range-chunked"])
async def test_a_small_file_is_cut_out(server: FakeHttpServer, open_source: OpenSource, behaviour: str) -> None:
    server.content = SMALL
    source = await open_source(server.url())
    server.behaviour = behaviour
    for pos, size in PIECES:
        assert await read(source, pos, size) == SMALL[pos : pos + size]
    assert len({request.connection for request in server.requests}) == 2  # it is read to its end and goes on


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("ignore-range-short", SourceUnreachable),
        ("ignore-range-resized", SourceUnreachable),
        ("ignore-range-other-version", SourceChanged),
    ],
)
async def test_a_small_file_must_be_the_right_one(
    server: FakeHttpServer, open_source: OpenSource, behaviour: str, error: type[SourceError]
) -> None:
    server.content = SMALL
    source = await open_source(server.url())
    server.behaviour = behaviour
    for pos, size in PIECES:
        with pytest.raises(error) as caught:
            await read(source, pos, size)
        assert type(caught.value) is error
    server.behaviour = "ok"
    assert await read(source, 0, 100) == SMALL[:100]


async def test_the_whole_of_a_large_file_is_right_where_all_of_it_was_asked_for(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    source = await open_source(server.url())
    server.behaviour = "ignore-range"
    assert await read(source, 0, len(CONTENT)) == CONTENT
    with pytest.raises(SourceError, match="ignores range requests"):
        await read(source, 0, len(CONTENT) - 1)


async def test_a_cache_that_is_just_being_filled(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.queue.append("ignore-range")
    source = await open_source(server.url())
    for pos in (0, 1000):
        server.queue.append("ignore-range")
        assert await read(source, pos, 65536) == CONTENT[pos : pos + 65536]
    assert [request.headers["range"] for request in server.requests] == [
        *["bytes=0-511"] * 2,
        *["bytes=0-65535"] * 2,
        *["bytes=1000-66535"] * 2,
    ]


async def test_a_cache_that_takes_long_to_be_filled(server: FakeHttpServer, open_source: OpenSource) -> None:
    async def opener() -> HttpSource:
        return await open_source(server.url())

    remote = RetryingSource(parse_location(server.url()), opener)
    await remote.connect()
    server.queue.extend(["ignore-range"] * 3)
    buffer = bytearray(65536)
    await remote.read(1000, memoryview(buffer), urgent=True)
    assert buffer == CONTENT[1000:66536]
    assert not server.queue


async def test_a_server_that_never_has_ranges_is_asked_twice(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.behaviour = "ignore-range"
    with pytest.raises(SourceError, match="ignores range requests") as caught:
        await open_source(server.url())
    assert not isinstance(caught.value, SourceUnreachable)
    assert len(server.requests) == 2


async def test_a_total_that_only_head_tells(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.behaviour = "hidden-total"
    source = await open_source(server.url())
    assert source.identity.size == len(CONTENT)
    for pos, size in ((0, 1), (1000, 65536), (len(CONTENT) - 7, 7)):
        assert await read(source, pos, size) == CONTENT[pos : pos + size]
    assert [request.method for request in server.requests] == ["GET", "HEAD", "GET", "GET", "GET"]
    server.etag = '"other"'
    with pytest.raises(SourceChanged):
        await read(source, 0, 100)


async def test_a_total_that_nothing_tells(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.behaviour = "hidden-total-no-head"
    with pytest.raises(SourceError, match="does not report the size of the file"):
        await open_source(server.url())
    server.behaviour, server.etag, server.last_modified = "hidden-total", "", ""
    with pytest.raises(SourceError, match="nor any validator of its version"):
        await open_source(server.url())


@pytest.mark.parametrize("coding", ["aws-chunked", "aws-chunked,", "none", "identity", "Identity, aws-chunked"])
async def test_codings_that_change_no_byte(server: FakeHttpServer, open_source: OpenSource, coding: str) -> None:
    server.extra = {"Content-Encoding": coding}
    source = await open_source(server.url())
    assert await read(source, 1000, 65536) == CONTENT[1000:66536]
