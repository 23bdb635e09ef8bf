"""What is nginx's own way, and what lies between a server and us: TLS and proxies."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import pytest
import trio

from qedfs.errors import Refused, SourceError, SourceUnreachable
from qedfs.source import ca_files
from tests.fakes.http_server import FakeHttpServer
from tests.harness.servers import nginx
from tests.harness.tls import Certificate
from tests.source.backings import server_context
from tests.source.http.conftest import CONTENT, OpenSource, read

# ---- nginx's own ways ----


async def test_nginx_closing_connections_between_requests(tmp_path: Path, open_source: OpenSource) -> None:
    (tmp_path / "disk.raw").write_bytes(CONTENT)
    with nginx(tmp_path, location="keepalive_requests 2;") as running:
        source = await open_source(f"{running.url}/disk.raw")
        for pos in range(20):
            assert await read(source, pos, 10) == CONTENT[pos : pos + 10]


async def test_nginx_that_comes_back(tmp_path: Path, open_source: OpenSource) -> None:
    (tmp_path / "disk.raw").write_bytes(CONTENT)
    with nginx(tmp_path) as running:
        source = await open_source(f"{running.url}/disk.raw")
        running.kill()
        with pytest.raises(SourceUnreachable, match="connection refused"):
            await read(source, 0, 10)
        running.restart()
        assert await read(source, 0, 10) == CONTENT[:10]


async def test_nginx_without_ranges(tmp_path: Path, open_source: OpenSource) -> None:
    (tmp_path / "disk.raw").write_bytes(CONTENT)
    with nginx(tmp_path, location="max_ranges 0;") as running, pytest.raises(SourceError, match="ignores range"):
        await open_source(f"{running.url}/disk.raw")


# ---- TLS ----


async def test_an_unknown_authority_is_not_trusted(
    tmp_path: Path, credentials: Certificate, open_source: OpenSource
) -> None:
    with FakeHttpServer(CONTENT, tls=server_context(credentials)) as server:
        with pytest.raises(SourceError, match="certificate is not trusted") as caught:
            await open_source(server.url())
        assert type(caught.value) is SourceError
        assert server.requests == []


async def test_a_certificate_for_another_name_is_not_trusted(
    credentials: Certificate, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURL_CA_BUNDLE", str(credentials.ca))
    with FakeHttpServer(CONTENT, tls=server_context(credentials)) as server:
        await open_source(server.url(host="localhost"))
    with FakeHttpServer(CONTENT, tls=server_context(credentials), host="127.0.0.2") as server:
        with pytest.raises(SourceError, match="for another name"):
            await open_source(server.url())
        assert server.requests == []


async def test_a_missing_ca_file_is_an_error_and_not_other_trust(
    credentials: Certificate, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
    with FakeHttpServer(CONTENT, tls=server_context(credentials)) as server, pytest.raises(SourceError) as caught:
        await open_source(server.url())
    assert "CA certificates cannot be read" in str(caught.value)


def test_a_ca_file_is_found_on_this_system() -> None:
    assert os.path.exists(ca_files.find_ca_file({}) or "")


async def test_https_never_goes_on_to_http(
    credentials: Certificate, server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(credentials.ca))
    with FakeHttpServer(CONTENT, tls=server_context(credentials), behaviour="redirect-302") as secure:
        secure.redirect_to = server.url()
        with pytest.raises(Refused, match="from https to"):
            await open_source(secure.url())
        assert server.requests == []
        # The other way is an upgrade.
        server.behaviour, server.redirect_to = "redirect-301", secure.url()
        secure.behaviour = "ok"
        source = await open_source(server.url())
        assert await read(source, 5, 10) == CONTENT[5:15]


async def test_a_plain_server_is_no_https_server(tmp_path: Path, open_source: OpenSource) -> None:
    with nginx(tmp_path) as running, pytest.raises(SourceUnreachable, match="TLS handshake failed"):
        await open_source(running.url.replace("http:", "https:"))


# ---- proxies ----


async def test_a_proxy_from_the_environment_gets_the_request(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url(""))
    source = await open_source("http://images.invalid/disk.raw")
    assert await read(source, 5, 10) == CONTENT[5:15]
    assert [request.path for request in server.requests] == ["http://images.invalid/disk.raw"] * 2


async def test_a_tunnel_through_a_proxy_is_not_taken_for_the_answer(
    credentials: Certificate, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(credentials.ca))
    with FakeHttpServer(CONTENT, tls=server_context(credentials)) as server:
        serve = functools.partial(trio.serve_tcp, Tunnel(server.port).serve, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        source = await open_source(server.url(host="localhost"))
        assert await read(source, 5, 10) == CONTENT[5:15]


class Tunnel:
    """The least of a CONNECT proxy (RFC 9110, section 9.3.6): every tunnel ends at `port` of this machine."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def serve(self, client: trio.SocketStream) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await client.receive_some(1)
        assert head.startswith(b"CONNECT localhost:")
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as server:
            await client.send_all(b"HTTP/1.1 200 Connection established\r\nVia: tunnel\r\n\r\n")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, client, server)
                await self._copy(server, client)
                nursery.cancel_scope.cancel()

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async for data in source:
                await sink.send_all(data)
