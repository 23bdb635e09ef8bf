"""What a user is told when the server, or a proxy, refuses the first request: what, where, and the way out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from qedfs.errors import Reason, SourceError, SourceUnreachable
from tests.fakes.http_behaviours import BEHAVIOURS, Exchange
from tests.fakes.http_server import FakeHttpServer
from tests.harness.process import free_port
from tests.source.http.conftest import OpenSource

SECRET = "gEhEiM5"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an empty ~/.netrc, and no proxy."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".netrc").touch(0o600)
    return tmp_path


async def refused(open_source: OpenSource, url: str, **options: list[str]) -> str:
    with pytest.raises(SourceError) as caught:
        await open_source(url, **options)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("home")
async def test_a_login_is_asked_for(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.behaviour = "status-401"
    line = await refused(open_source, server.url())
    assert line.startswith(f"{server.url()} asks for a user name and a password (401); put them into ~/.netrc")


async def test_a_login_is_not_accepted(server: FakeHttpServer, open_source: OpenSource, home: Path) -> None:
    server.behaviour = "status-401"
    wrong = f"{server.url()} does not accept the user name and password (401); check them in"
    assert (await refused(open_source, server.url(userinfo=f"user:{SECRET}"))).startswith(wrong)
    headers = [f"Authorization: Bearer {SECRET}"]
    assert "does not accept the header fields of --credentials" in await refused(
        open_source, server.url(), headers=headers
    )
    (home / ".netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    assert (await refused(open_source, server.url())).startswith(wrong)


@pytest.mark.usefixtures("home")
async def test_the_url_of_a_folder(server: FakeHttpServer, open_source: OpenSource) -> None:
    for status in (403, 404):
        server.behaviour = f"status-{status}"
        line = await refused(open_source, server.url("/images/?token=x"))
        assert f"({status}); a URL that ends in / names a folder: give that of a file in it" in line
        assert "folder" not in await refused(open_source, server.url("/disk.raw"))


async def test_a_proxy_that_is_not_there(
    server: FakeHttpServer, open_source: OpenSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"127.0.0.1:{free_port()}"
    for proxy, name in ((f"http://user:{SECRET}@{place}", f"http://{place}"), (f"user:{SECRET}@{place}", place)):
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(SourceUnreachable) as caught:
            await open_source(server.url())
        assert caught.value.reason is Reason.CONNECT
        expected = (
            f"{server.url()}: cannot connect to the proxy {name} (connection refused); see the variables http_proxy"
        )
        assert str(caught.value).startswith(expected)
        assert SECRET not in str(caught.value)
    assert server.requests == []


async def test_a_proxy_without_an_address(
    server: FakeHttpServer, open_source: OpenSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://nowhere.invalid:3128")
    assert "the name of the proxy http://nowhere.invalid:3128 does not resolve" in await refused(
        open_source, server.url()
    )


async def test_a_proxy_that_asks_who_it_is(
    server: FakeHttpServer, open_source: OpenSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = partial(Exchange.send, status="407 Proxy Authentication Required", headers={})
    monkeypatch.setitem(BEHAVIOURS, "asks-for-proxy-login", refusal)
    server.behaviour = "asks-for-proxy-login"
    monkeypatch.setenv("http_proxy", server.url("", userinfo=f"user:{SECRET}"))
    line = await refused(open_source, "http://server.example/disk.raw")
    proxy = f"the proxy {server.url('')} asks for a user name and a password (407)"
    assert line.startswith(f"http://server.example/disk.raw: {proxy}")


@pytest.mark.usefixtures("home")
async def test_a_folder_of_a_server_without_ranges(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.behaviour, server.extra = "ignore-range", {"Content-Type": "text/HTML; charset=utf-8"}
    line = await refused(open_source, server.url())
    assert "ignores range requests and answers with a web page (text/html)" in line
    server.extra = {"Content-Type": "application/octet-stream"}
    assert "put the file on a server that supports ranges (nginx, " in await refused(open_source, server.url())
