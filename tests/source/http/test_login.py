"""Who gets a user name and a password out of ~/.netrc, and who does not."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from qedfs.errors import SourceError
from tests.fakes.http_server import FakeHttpServer
from tests.source.http.conftest import OpenSource, read


def sent(server: FakeHttpServer) -> set[str | None]:
    """The pairs of user name and password that came with the requests."""
    fields = [request.headers.get("authorization") for request in server.requests]
    return {field and base64.b64decode(field.removeprefix("Basic ")).decode() for field in fields}


@pytest.mark.parametrize(
    ("content", "userinfo", "expected"),
    [
        ("machine 127.0.0.1 login user password pass", "", "user:pass"),
        ("machine other login no password no\nmachine 127.0.0.1\nlogin user\npassword pass", "", "user:pass"),
        ("machine 127.0.0.1 login user password pass", "user", "user:pass"),
        ("machine 127.0.0.1 login user password pass", "another", "another:"),
        ("machine 127.0.0.1 login user password pass", "another:own", "another:own"),
        ("machine other login user password pass", "", None),
        ("default login user password pass", "", None),
        ("machine other login no password no\ndefault login user password pass", "", None),
    ],
)
async def test_the_entry_of_the_host_fills_what_the_url_leaves_open(
    server: FakeHttpServer, open_source: OpenSource, tmp_path: Path, content: str, userinfo: str, expected: str | None
) -> None:
    (tmp_path / ".netrc").write_text(content + "\n")
    source = await open_source(server.url(userinfo=userinfo))
    await read(source, 0, 10)
    assert sent(server) == {expected}


async def test_a_host_of_the_name_default_does_not_get_the_default(
    server: FakeHttpServer, open_source: OpenSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("default login user password pass\n")
    monkeypatch.setenv("http_proxy", server.url(""))
    await open_source("http://default/disk.raw")
    assert sent(server) == {None}


async def test_a_place_that_a_redirect_leads_to_gets_nothing(
    server: FakeHttpServer, open_source: OpenSource, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine localhost login user password pass\n")
    server.queue.append("redirect-302")
    server.redirect_to = f"http://localhost:{server.port}/there"
    await read(await open_source(server.url()), 0, 10)
    assert len(server.requests) == 3
    assert sent(server) == {None}


async def test_the_way_back_to_the_origin_has_its_login(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine localhost login user password pass\n")
    server.queue.append("redirect-302")
    server.redirect_to = other_server.url("/between")
    other_server.behaviour = "redirect-302"
    other_server.redirect_to = f"http://localhost:{server.port}/there"
    await read(await open_source(server.url(host="localhost")), 0, 10)
    assert (sent(server), sent(other_server)) == ({"user:pass"}, {None})


@pytest.mark.parametrize("content", ["machine 127.0.0.1 canary", "machine\nlogin canary canary", "\xe9"])
async def test_a_file_that_is_not_understood_is_an_error_without_its_text(
    server: FakeHttpServer, open_source: OpenSource, tmp_path: Path, content: str
) -> None:
    (tmp_path / ".netrc").write_bytes(content.encode("latin-1"))
    with pytest.raises(SourceError, match="netrc") as caught:
        await open_source(server.url())
    assert "canary" not in f"{caught.value} {caught.value.__cause__}"
    assert not server.requests


async def test_a_file_that_may_not_be_read_counts_as_none(
    server: FakeHttpServer, open_source: OpenSource, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").mkdir()
    await open_source(server.url())
    assert sent(server) == {None}
