"""The host that a URL names is the one that is asked: as curl 7.88 with libidn2 and browsers do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from qedfs.errors import Refused, UsageError
from qedfs.source.hostname import ascii_host
from qedfs.source.http import HttpSource
from qedfs.source.http.login import with_login
from qedfs.source.http.target import choose_proxy, first_target, next_target
from qedfs.source.nbd.gathering import Gathering
from qedfs.source.nbd.transport import connect
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer

# Asked of curl 7.88.1 through a proxy that wrote down the request line, unless a comment says otherwise.
NAMES = {
    "straße.example": "xn--strae-oqa.example",
    "stra%C3%9Fe.example": "xn--strae-oqa.example",
    "STRASSE.example": "strasse.example",
    "faß.de": "xn--fa-hia.de",
    "βόλος.com": "xn--nxasmm1c.com",  # RFC 5895 and browsers; IDNA 2003 has no final sigma
    "MÜNCHEN.example": "xn--mnchen-3ya.example",
    "mu\u0308nchen.example": "xn--mnchen-3ya.example",
    "نامه\u200cای.com": "xn--mgba3gch31f060k.com",  # UTS 46, table 3
    "☕.example": "xn--53h.example",
    "I♥NY.example": "xn--iny-zx5a.example",
    "１６９。２５４.169.254": "169.254.169.254",
    "exa_mple.é": "exa_mple.xn--9ca",
    "bücher.example.": "xn--bcher-kva.example.",
    "xn--strae-oqa.example": "xn--strae-oqa.example",
    "ab--c.example": "ab--c.example",
    "fe80::1%eth0": "fe80::1%eth0",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert ascii_host(name) == NAMES[name]


@pytest.mark.parametrize(
    "name",
    [
        *("ab--ü.example", "-ü.example", "a\u200db.example", "☕\u200d.example", "ü" * 70 + ".example", "ü." * 600),
        *("☕" * 70 + ".example", "a%2Fb", "a%00b", "a%FFb", "a b", "a\u2100b", "\u0301a.example", "%", "a%40b"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https", "nbd"])
def test_what_is_no_name_is_refused_before_anybody_is_asked(name: str, scheme: str) -> None:
    with pytest.raises(UsageError, match=r"not a host name|the host or the port is not valid"):
        parse_location(f"{scheme}://{name}/disk.raw")


async def test_the_owner_of_the_name_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through a proxy, which sees the name: `straße` in what the user types, and in a redirect."""
    with FakeHttpServer(b"x" * 1000) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url(""))
        proxy.queue.append("redirect-302")
        proxy.redirect_to = "http://faß.example/there".encode().decode("latin-1")
        async with trio.open_nursery() as nursery:
            source = await HttpSource.open(parse_location("http://straße.example/disk.raw"), Policy(), nursery)
            await source.read(0, memoryview(bytearray(9)))
            await source.aclose()
    asked = [(request.path, request.headers["host"]) for request in proxy.requests]
    assert asked[0] == ("http://xn--strae-oqa.example/disk.raw", "xn--strae-oqa.example")
    assert asked[1] == ("http://xn--fa-hia.example/there", "xn--fa-hia.example")


async def test_nbd_asks_for_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look_up(host: str, *_: object, flags: int = 0, **__: object) -> list[object]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror
        asked.append(host)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    location = parse_location("nbds://straße.example/disk")
    with pytest.raises(OSError, match="has no address"):
        await connect(location, Policy(), Gathering(), seconds=60)
    assert asked == [location.host] == ["xn--strae-oqa.example"]


def test_one_name_for_all_who_compare() -> None:
    location = parse_location("http://straße.example/a/disk.raw")
    Policy(("http://xn--strae-oqa.example/a",)).check_location(location)
    Policy(("http://stra%C3%9Fe.example/a",)).check_location(location)
    with pytest.raises(Refused):
        Policy(("http://strasse.example/a",)).check_location(location)
    environ = {"http_proxy": "http://proxy:3128"}
    assert choose_proxy(location, {**environ, "no_proxy": "straße.example"}) == ""
    assert choose_proxy(location, {**environ, "no_proxy": "strasse.example"}) == "http://proxy:3128"
    origin = first_target(location, ("X-Token: secret",), {})
    assert next_target(origin, origin, "http://xn--strae-oqa.example/b", None, {}).headers == ("X-Token: secret",)
    assert next_target(origin, origin, "http://strasse.example/b", None, {}).headers == ()


@pytest.mark.parametrize(
    ("machine", "user"), [("straße.example", "u"), ("xn--strae-oqa.example", "u"), ("strasse.example", None)]
)
async def test_netrc(tmp_path: Path, machine: str, user: str | None) -> None:
    netrc = tmp_path / ".netrc"  # HOME is there
    netrc.write_text(f"machine {machine} login u password p\n")
    netrc.chmod(0o600)
    target = await with_login(first_target(parse_location("http://straße.example/disk.raw"), (), {}))
    assert target.user == user
