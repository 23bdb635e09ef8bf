"""What the scripted HTTP server can do with a request: one named function per way of being right or wrong.

Each row of a table of hostile answers is one name in `BEHAVIOURS`. Owns what goes over the wire after a request was
read; sockets, threads and the choice of the behaviour are `http_server.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import re
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fakes.http_server import FakeHttpServer

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client sent. Header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    connection: int  # which connection it came on, counted from 1


@dataclasses.dataclass
class Exchange:
    """One request, the connection that it came on, and the server: all that a behaviour needs."""

    server: FakeHttpServer
    request: Request
    sock: socket.socket
    keep_alive: bool = True

    def range(self) -> tuple[int, int] | None:
        """First and last byte asked for, clipped to the content; None if there is no such range."""
        found = _RANGE.fullmatch(self.request.headers.get("range", ""))
        size = len(self.server.content)
        if found is None or int(found[1]) >= size:
            return None
        return int(found[1]), min(int(found[2]), size - 1)

    def send(self, status: str, headers: dict[str, str], body: bytes = b"") -> None:
        """Send an answer whose Content-Length is right unless `headers` holds another one ("" leaves it out)."""
        own = {"Date": email.utils.formatdate(usegmt=True), "Content-Length": str(len(body)), **self.server.extra}
        fields = {**own, **headers}
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items() if value), "", ""]
        self.sock.sendall("\r\n".join(lines).encode("latin-1") + (b"" if self.request.method == "HEAD" else body))

    def asked(self) -> tuple[int, int, dict[str, str]]:
        """First and last byte to answer with, whatever was asked for, and the header fields that go with them."""
        first, last = self.range() or (0, 0)
        told = {"Content-Range": f"bytes {first}-{last}/{len(self.server.content)}", **self.validators()}
        return first, last, told

    def validators(self) -> dict[str, str]:
        return {"ETag": self.server.etag, "Last-Modified": self.server.last_modified}

    def close(self) -> None:
        self.keep_alive = False

    def pause(self, seconds: float) -> bool:
        """Wait; True if the server goes on, False if it is being closed."""
        return not self.server.closing.wait(seconds)


Behaviour = Callable[[Exchange], None]
BEHAVIOURS: dict[str, Behaviour] = {}


def _named(name: str) -> Callable[[Behaviour], Behaviour]:
    def add(function: Behaviour) -> Behaviour:
        BEHAVIOURS[name] = function
        return function

    return add


# ---- right answers ----


@_named("ok")
def _ok(exchange: Exchange) -> None:
    server, headers = exchange.server, exchange.request.headers
    if not _conditions_hold(server, headers):
        return exchange.send("412 Precondition Failed", exchange.validators())
    if "range" not in headers:
        return exchange.send("200 OK", {**exchange.validators(), "Accept-Ranges": "bytes"}, server.content)
    _send_range(exchange)
    return None


def _conditions_hold(server: FakeHttpServer, headers: dict[str, str]) -> bool:
    if "if-match" in headers:
        return headers["if-match"] == server.etag and not server.etag.startswith("W/")
    since = headers.get("if-unmodified-since")
    if since is None or not server.last_modified:
        return True
    parse = email.utils.parsedate_to_datetime
    return parse(server.last_modified) <= parse(since)


def _send_range(exchange: Exchange, *, shift: int = 0, status: str = "206 Partial Content", **overrides: str) -> None:
    """Send what was asked for; `shift` moves the range, `overrides` (with _ for -) replace header fields."""
    wanted, size = exchange.range(), len(exchange.server.content)
    if wanted is None:
        return exchange.send("416 Range Not Satisfiable", {"Content-Range": f"bytes */{size}"})
    first, last = wanted[0] + shift, wanted[1] + shift
    fields = {**exchange.validators(), "Content-Range": f"bytes {first}-{last}/{size}"}
    fields.update({name.replace("_", "-"): value for name, value in overrides.items()})
    exchange.send(status, fields, exchange.server.content[first : last + 1])
    return None


@_named("chunked")
def _chunked(exchange: Exchange) -> None:
    _send_chunked(exchange, extra=b"", end=b"0\r\nX-Trailer: yes\r\n\r\n")


@_named("interim")
def _interim(exchange: Exchange) -> None:
    exchange.sock.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    _ok(exchange)


@_named("close-after")
def _close_after(exchange: Exchange) -> None:
    """A right answer that promises a persistent connection, which is then closed without a word."""
    _ok(exchange)
    exchange.close()


# ---- 206, but not what was asked for ----


@_named("wrong-start")
def _wrong_start(exchange: Exchange) -> None:
    _send_range(exchange, shift=1)


@_named("wrong-end")
def _wrong_end(exchange: Exchange) -> None:
    first, last = exchange.range() or (0, 0)
    size = len(exchange.server.content)
    body = exchange.server.content[first:last]
    exchange.send("206 Partial Content", {"Content-Range": f"bytes {first}-{last - 1}/{size}"}, body)


@_named("wrong-total")
def _wrong_total(exchange: Exchange) -> None:
    first, last = exchange.range() or (0, 0)
    _send_range(exchange, Content_Range=f"bytes {first}-{last}/{len(exchange.server.content) + 1}")


@_named("unknown-total")
def _unknown_total(exchange: Exchange) -> None:
    first, last = exchange.range() or (0, 0)
    _send_range(exchange, Content_Range=f"bytes {first}-{last}/*")


@_named("no-content-range")
def _no_content_range(exchange: Exchange) -> None:
    _send_range(exchange, Content_Range="")


@_named("garbled-content-range")
def _garbled_content_range(exchange: Exchange) -> None:
    _send_range(exchange, Content_Range="bytes zero-one/many")


@_named("multipart")
def _multipart(exchange: Exchange) -> None:
    _send_range(exchange, Content_Type="multipart/byteranges; boundary=x")


@_named("gzip")
def _gzip(exchange: Exchange) -> None:
    _send_range(exchange, Content_Encoding="gzip")


@_named("brotli")
def _brotli(exchange: Exchange) -> None:
    _send_range(exchange, Content_Encoding="br")


# ---- no range at all ----


@_named("ignore-range")
def _ignore_range(exchange: Exchange) -> None:
    exchange.send("200 OK", exchange.validators(), exchange.server.content)


@_named("ignore-range-other-version")
def _ignore_range_other_version(exchange: Exchange) -> None:
    exchange.send("200 OK", {**exchange.validators(), "ETag": '"other"'}, exchange.server.content)


@_named("ignore-whole-range")
def _ignore_whole_range(exchange: Exchange) -> None:
    """200 where the range is the whole file, as some servers answer; otherwise right."""
    if exchange.range() == (0, len(exchange.server.content) - 1):
        return _ignore_range(exchange)
    return _ok(exchange)


@_named("ignore-range-chunked")
def _ignore_range_chunked(exchange: Exchange) -> None:
    body = exchange.server.content
    exchange.send("200 OK", {**exchange.validators(), "Transfer-Encoding": "chunked", "Content-Length": ""})
    exchange.sock.sendall(f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")


@_named("ignore-range-short")
def _ignore_range_short(exchange: Exchange) -> None:
    """The whole file, cut at its end."""
    size = len(exchange.server.content)
    exchange.send("200 OK", {**exchange.validators(), "Content-Length": str(size)}, exchange.server.content[:-1])
    exchange.close()


@_named("ignore-range-resized")
def _ignore_range_resized(exchange: Exchange) -> None:
    exchange.send("200 OK", exchange.validators(), exchange.server.content + b"x")


@_named("busybox")
def _busybox(exchange: Exchange) -> None:
    """Like busybox httpd, which takes the end 0 of a range for a missing end."""
    if exchange.request.headers.get("range") == "bytes=0-0":
        size = len(exchange.server.content)
        fields = {**exchange.validators(), "Content-Range": f"bytes 0-{size - 1}/{size}"}
        return exchange.send("206 Partial Content", fields, exchange.server.content)
    return _ok(exchange)


@_named("aws-chunked")
def _aws_chunked(exchange: Exchange) -> None:
    _send_range(exchange, Content_Encoding="aws-chunked")


@_named("hidden-total")
def _hidden_total(exchange: Exchange) -> None:
    """Only HEAD reports the total size."""
    if exchange.request.method == "HEAD":
        return exchange.send("200 OK", exchange.validators(), exchange.server.content)
    return _unknown_total(exchange)


@_named("hidden-total-no-head")
def _hidden_total_no_head(exchange: Exchange) -> None:
    if exchange.request.method == "HEAD":
        return exchange.send("403 Forbidden", {})
    return _unknown_total(exchange)


# ---- bodies of the wrong length ----


@_named("short-body")
def _short_body(exchange: Exchange) -> None:
    first, last, fields = exchange.asked()
    fields["Content-Length"] = str(last - first + 1)
    exchange.send("206 Partial Content", fields, exchange.server.content[first : (first + last) // 2])
    exchange.close()


@_named("short-content-length")
def _short_content_length(exchange: Exchange) -> None:
    """Content-Range as asked, Content-Length and body shorter: consistent with itself, wrong for the request."""
    first, last, fields = exchange.asked()
    exchange.send("206 Partial Content", fields, exchange.server.content[first:last])


@_named("long-content-length")
def _long_content_length(exchange: Exchange) -> None:
    first, last, fields = exchange.asked()
    exchange.send("206 Partial Content", fields, exchange.server.content[first : last + 1] + b"extra")


@_named("short-chunked")
def _short_chunked(exchange: Exchange) -> None:
    _send_chunked(exchange, extra=b"", end=b"", cut=True)
    exchange.close()


@_named("short-chunked-clean")
def _short_chunked_clean(exchange: Exchange) -> None:
    _send_chunked(exchange, extra=b"", end=b"0\r\n\r\n", cut=True)


@_named("long-chunked")
def _long_chunked(exchange: Exchange) -> None:
    _send_chunked(exchange, extra=b"extra", end=b"0\r\n\r\n")


@_named("extra-bytes")
def _extra_bytes(exchange: Exchange) -> None:
    """A right answer, followed by bytes that were not requested."""
    _send_range(exchange)
    with contextlib.suppress(OSError):
        exchange.sock.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nevil")


@_named("until-close")
def _until_close(exchange: Exchange) -> None:
    """No length: the body ends with the connection, here before its time."""
    first, last, fields = exchange.asked()
    fields |= {"Content-Length": "", "Connection": "close"}
    exchange.send("206 Partial Content", fields, exchange.server.content[first:last])
    exchange.close()


def _send_chunked(exchange: Exchange, *, extra: bytes, end: bytes, cut: bool = False) -> None:
    first, last, fields = exchange.asked()
    fields |= {**exchange.validators(), "Transfer-Encoding": "chunked", "Content-Length": ""}
    body = exchange.server.content[first : last if cut else last + 1] + extra
    exchange.send("206 Partial Content", fields)
    exchange.sock.sendall(f"{len(body):x}\r\n".encode() + body + b"\r\n" + end)


# ---- another version ----


@_named("other-etag")
def _other_etag(exchange: Exchange) -> None:
    _send_range(exchange, ETag='"other"')


@_named("other-date")
def _other_date(exchange: Exchange) -> None:
    _send_range(exchange, ETag="", Last_Modified="Thu, 01 Jan 1998 00:00:00 GMT")


@_named("weak-etag")
def _weak_etag(exchange: Exchange) -> None:
    _send_range(exchange, ETag='W/"1"')


@_named("unmet")
def _unmet(exchange: Exchange) -> None:
    """No condition is ever met."""
    if {"if-match", "if-unmodified-since"} & exchange.request.headers.keys():
        return exchange.send("412 Precondition Failed", exchange.validators())
    return _ok(exchange)


@_named("never-the-same")
def _never_the_same(exchange: Exchange) -> None:
    _send_range(exchange, ETag=f'W/"{len(exchange.server.requests)}"', Last_Modified="")


@_named("no-validator")
def _no_validator(exchange: Exchange) -> None:
    _send_range(exchange, ETag="", Last_Modified="")


# ---- refusals ----


def _redirect(exchange: Exchange, *, code: int) -> None:
    exchange.send(f"{code} Scripted", {"Location": exchange.server.redirect_to})


@_named("cookie-gate")
def _cookie_gate(exchange: Exchange) -> None:
    """Requests without the cookie get one, and a redirect to `redirect_to`. Requests with it get the bytes."""
    if exchange.server.cookie in exchange.request.headers.get("cookie", ""):
        return _ok(exchange)
    fields = {"Location": exchange.server.redirect_to, "Set-Cookie": exchange.server.cookie + "; Path=/; HttpOnly"}
    exchange.send("302 Found", fields)
    return None


@_named("cookie-wanted")
def _cookie_wanted(exchange: Exchange) -> None:
    if exchange.server.cookie in exchange.request.headers.get("cookie", ""):
        return _ok(exchange)
    exchange.send("403 Forbidden", {})
    return None


@_named("token-wanted")
def _token_wanted(exchange: Exchange) -> None:
    if exchange.request.headers.get("private-token") == exchange.server.cookie:
        return _ok(exchange)
    exchange.send("404 Not Found", {})  # as GitLab says it
    return None


def _add_statuses() -> None:
    for code in (204, 304, 400, 401, 403, 404, 408, 410, 412, 416, 425, 429, 500, 501, 502, 503, 504, 507):
        BEHAVIOURS[f"status-{code}"] = partial(Exchange.send, status=f"{code} Scripted", headers={})
    for name, wait in (("seconds", "7"), ("hour", "3600"), ("garbled", "soon")):
        BEHAVIOURS[f"retry-after-{name}"] = partial(Exchange.send, status="503 Scripted", headers={"Retry-After": wait})
    for code in (301, 302, 303, 307, 308):
        BEHAVIOURS[f"redirect-{code}"] = partial(_redirect, code=code)


_add_statuses()


@_named("redirect-nowhere")
def _redirect_nowhere(exchange: Exchange) -> None:
    exchange.send("302 Found", {})


@_named("redirect-on")
def _redirect_on(exchange: Exchange) -> None:
    """An endless chain of redirects, each to another URL."""
    exchange.send("302 Found", {"Location": exchange.request.path + "x"})


# ---- broken connections and slow ones ----


@_named("silence")
def _silence(exchange: Exchange) -> None:
    exchange.pause(3600)
    exchange.close()


@_named("close-at-once")
def _close_at_once(exchange: Exchange) -> None:
    exchange.close()


@_named("slow-header")
def _slow_header(exchange: Exchange) -> None:
    _drip(exchange, b"HTTP/1.1 206 Partial Content\r\n" + b"X-Slow: yes\r\n" * 1000)


@_named("slow-body")
def _slow_body(exchange: Exchange) -> None:
    first, last, fields = exchange.asked()
    exchange.send("206 Partial Content", {**fields, "Content-Length": str(last - first + 1)})
    _drip(exchange, exchange.server.content[first : last + 1])


def _drip(exchange: Exchange, data: bytes) -> None:
    for at in range(len(data)):
        if not exchange.pause(0.05):
            break
        exchange.sock.sendall(data[at : at + 1])
    exchange.close()


@_named("reset")
def _reset(exchange: Exchange) -> None:
    """Part of the body, then RST instead of an orderly end."""
    first, last, fields = exchange.asked()
    exchange.send("206 Partial Content", {**fields, "Content-Length": str(last - first + 1)})
    exchange.sock.sendall(exchange.server.content[first : (first + last) // 2])
    exchange.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.close()


@_named("half-close")
def _half_close(exchange: Exchange) -> None:
    _short_body(exchange)
    exchange.sock.shutdown(socket.SHUT_WR)
    exchange.pause(1)


@_named("garbage")
def _garbage(exchange: Exchange) -> None:
    exchange.sock.sendall(b"\x15\x03\x03\x00\x02\x02\x28" + bytes(range(256)) * 8)
    exchange.close()


@_named("garbled-header")
def _garbled_header(exchange: Exchange) -> None:
    exchange.sock.sendall(b"HTTP/1.1 206 Partial Content\r\nno colon here\r\nContent-Length: 1\r\n\r\nx")
    exchange.close()


@_named("huge-header")
def _huge_header(exchange: Exchange) -> None:
    first, last, fields = exchange.asked()
    fields |= {f"X-Filler-{n}": "x" * 1000 for n in range(100)}
    exchange.send("206 Partial Content", {**exchange.validators(), **fields}, exchange.server.content[first : last + 1])


@_named("endless-header")
def _endless_header(exchange: Exchange) -> None:
    exchange.sock.sendall(b"HTTP/1.1 206 Partial Content\r\n")
    with contextlib.suppress(OSError):
        while exchange.pause(0):
            exchange.sock.sendall(b"X-Filler: yes\r\n" * 100)
    exchange.close()
