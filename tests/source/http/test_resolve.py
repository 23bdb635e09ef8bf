"""How HttpSource follows redirects: whom it trusts, what it sends along, and what it does when a place expires."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import Refused, SourceChanged, SourceError
from qedfs.source.credentials import TlsFiles
from qedfs.source.http import HttpSource
from qedfs.source.http.resolve import MAX_REDIRECTS
from qedfs.source.policy import Policy
from qedfs.source.url import Location, parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.tls import Certificate
from tests.source.http.conftest import CONTENT, OpenSource, read


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirects_are_resolved_once(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource, code: int
) -> None:
    server.behaviour, server.redirect_to = f"redirect-{code}", other_server.url("/there?sig=canary")
    source = await open_source(server.url())
    for _ in range(3):
        assert await read(source, 9, 10) == CONTENT[9:19]
    assert len(server.requests) == 1
    assert source.identity.name == other_server.url("/there?sig=...")


async def test_credentials_are_not_sent_to_another_origin(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource
) -> None:
    server.queue.append("redirect-302")
    server.behaviour, server.redirect_to = "redirect-307", other_server.url("/there")
    source = await open_source(server.url(userinfo="user:canary"), headers=["Authorization: canary", "X-Token: canary"])
    await read(source, 0, 10)
    assert "canary" in str(server.requests)
    assert "canary" not in str(other_server.requests)
    assert "authorization" not in other_server.requests[0].headers


async def test_a_cookie_of_a_redirect_is_sent_where_it_leads(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource
) -> None:
    """As for browsers and curl: the port does not count (RFC 6265, section 8.5)."""
    server.behaviour, server.redirect_to = "cookie-gate", other_server.url("/there")
    other_server.behaviour = "cookie-wanted"
    source = await open_source(server.url())
    for urgent in (True, False):
        assert await read(source, 9, 10, urgent=urgent) == CONTENT[9:19]
    assert [request.headers.get("cookie") for request in other_server.requests] == ["pass=canary"] * 3
    assert "canary" not in repr(source._place)


async def test_a_gate_that_sends_back_to_itself(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.behaviour, server.redirect_to = "cookie-gate", "/disk.raw"
    source = await open_source(server.url())
    assert await read(source, 9, 10) == CONTENT[9:19]
    # What the gate does not know any more, it gives anew.
    server.cookie = "pass=another"
    assert await read(source, 9, 10) == CONTENT[9:19]


async def test_a_gate_after_an_origin_that_is_shown_a_certificate(
    server: FakeHttpServer, other_server: FakeHttpServer, nursery: trio.Nursery, credentials: Certificate
) -> None:
    server.behaviour, server.redirect_to = "redirect-302", other_server.url()
    other_server.behaviour, other_server.redirect_to = "cookie-gate", "/disk.raw"
    tls = TlsFiles(certificate=str(credentials.client_cert), key=str(credentials.client_key))
    source = await HttpSource.open(parse_location(server.url()), Policy(), nursery, tls=tls)
    assert await read(source, 9, 10) == CONTENT[9:19]


async def test_a_cookie_goes_to_no_other_host(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource
) -> None:
    server.behaviour = "cookie-gate"
    server.redirect_to = other_server.url("/there", host="localhost")
    await read(await open_source(server.url()), 0, 10)
    assert [request.headers.get("cookie") for request in other_server.requests] == [None] * 2


@pytest.mark.parametrize("path", ["/disk.raw", "/disk.raw#again"])
async def test_a_loop_of_redirects(server: FakeHttpServer, open_source: OpenSource, path: str) -> None:
    server.behaviour, server.redirect_to = "redirect-302", path
    with pytest.raises(SourceError, match="redirects in a loop"):
        await open_source(server.url())
    assert len(server.requests) == 1


async def test_too_many_redirects(server: FakeHttpServer, open_source: OpenSource) -> None:
    server.behaviour = "redirect-on"
    with pytest.raises(SourceError, match="more than 5 times"):
        await open_source(server.url())
    assert len(server.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://0xa9fea9fe/",
        "http://[::ffff:169.254.169.254]/",
        "http://0.0.0.0/",
        "nbd://127.0.0.1/x",
        "file:///etc/passwd",
        "/../../x",
    ],
)
async def test_redirects_to_forbidden_places(server: FakeHttpServer, open_source: OpenSource, target: str) -> None:
    server.behaviour, server.redirect_to = "redirect-302", target
    policy = Policy((server.url("/disk.raw"),)) if target.startswith("/") else Policy()
    with pytest.raises((Refused, SourceError), match=r"backing|redirects") as caught:
        await open_source(server.url(), policy=policy)
    assert target == "file:///etc/passwd" or type(caught.value) is Refused
    assert len(server.requests) == 1


async def test_a_refused_address_is_never_connected_to(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(_self: Policy, address: str, location: Location, *, redirected_from: str | None = None) -> None:
        asked.append(address)
        raise Refused(f"backing {location} leads to {address}")

    monkeypatch.setattr(Policy, "check_address", refuse)
    with pytest.raises(Refused, match="leads to"):
        await open_source(server.url(host="localhost"))
    assert "127.0.0.1" in asked
    assert server.connections == 0


async def test_a_redirect_from_a_public_server_is_checked_at_connect(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    check = Policy.check_address

    def note(self: Policy, address: str, location: Location, *, redirected_from: str | None = None) -> None:
        asked.append((str(location).rpartition("/")[2], address, redirected_from))
        # As if the first server had a public address.
        check(self, address, location, redirected_from="8.8.8.8" if redirected_from else None)

    monkeypatch.setattr(Policy, "check_address", note)
    server.queue.append("redirect-302")
    server.redirect_to = f"http://localhost:{server.port}/inner"
    with pytest.raises(Refused, match="private address"):
        await open_source(server.url())
    assert ("inner", "127.0.0.1", "127.0.0.1") in asked


async def test_a_redirect_relayed_by_a_proxy_does_not_lead_past_it(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`server` is the proxy, and answers for a public one; `no_proxy` has the next hop go straight to loopback."""
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    server.behaviour = "redirect-302"
    for target in (other_server.url("/admin"), other_server.url("/admin", host="localhost")):
        server.redirect_to = target
        with pytest.raises(Refused, match=r"from public\.example to the private address"):
            await open_source("http://public.example/disk.raw")
    assert other_server.connections == 0


async def test_an_expired_redirect_is_resolved_anew_once_for_all_readers(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource
) -> None:
    server.behaviour, server.redirect_to = "redirect-302", other_server.url("/old")
    source = await open_source(server.url())
    other_server.behaviour = "status-403"
    with FakeHttpServer(CONTENT) as third:
        server.redirect_to = third.url("/new")
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(read, source, 0, 10)
        assert await read(source, 9, 10) == CONTENT[9:19]
        assert len(server.requests) == 2
    assert source.identity.name == other_server.url("/old")


async def test_an_expired_redirect_that_leads_to_another_version(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource
) -> None:
    server.behaviour, server.redirect_to = "redirect-302", other_server.url("/old")
    source = await open_source(server.url())
    other_server.queue.append("status-410")
    other_server.etag = '"version-2"'
    with pytest.raises(SourceChanged, match="ETag was"):
        await read(source, 0, 10)


async def test_a_place_that_stays_forbidden_is_asked_for_once_more_only(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource
) -> None:
    server.behaviour, server.redirect_to = "redirect-302", other_server.url("/x")
    source = await open_source(server.url())
    other_server.queue.extend(["status-403", "ok", "status-403"])
    with pytest.raises(SourceError, match=r"redirected to .*/x\) forbids access"):
        await read(source, 0, 10)
    assert (len(server.requests), len(other_server.requests)) == (2, 4)


async def test_a_place_that_begins_to_redirect_is_followed(
    server: FakeHttpServer, other_server: FakeHttpServer, open_source: OpenSource
) -> None:
    source = await open_source(server.url())
    server.behaviour, server.redirect_to = "redirect-301", other_server.url("/moved")
    assert await read(source, 9, 10) == CONTENT[9:19]
