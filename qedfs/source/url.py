"""Parses and redacts backing names: URL or path to a `Location` whose str and repr contain no credential.

Owns the forms that are accepted, and what is left out of a redacted text. Must not know which locations are allowed
(`policy.py`). No I/O. Parsing is strict and has no fall-back. A text in none of the known forms is an error, and is
never taken for a file name instead (QEMU's `json:` and `file:` forms are refused).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from qedfs.errors import UsageError
from qedfs.source.hostname import ascii_host

NBD_DEFAULT_PORT = 10809  # IANA, and the NBD URI specification
_HOST_PORT = re.compile(r"([^:/?#@\[\]]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}(?:/|$)", re.ASCII)
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """The location of a backing. `repr` and `str` are redacted; only the transport that connects reads `secret_url`."""

    kind: str  # "http", "nbd" or "file"
    redacted: str
    secret_url: str = dataclasses.field(repr=False)
    host: str | None = None  # in ASCII, see `hostname.py`
    port: int | None = None
    tls: bool = False
    export: str = ""  # NBD export name
    path: str | None = dataclasses.field(default=None, repr=False)  # of the local file or the NBD server's Unix socket
    user: str | None = dataclasses.field(default=None, repr=False)  # the identity of an NBD pre-shared key
    psk_file: str | None = None
    tls_folder: str | None = None  # contains ca-cert.pem, client-cert.pem and client-key.pem

    def __str__(self) -> str:
        return self.redacted

    @property
    def stores_login(self) -> bool:
        """Whether the name contains a user name or password. (The user of nbds only says which key to take.)"""
        parts = urlsplit(self.secret_url) if self.kind != "file" else urlsplit("")
        return parts.password is not None or (self.kind == "http" and parts.username is not None)

    @property
    def stores_query(self) -> bool:
        """Whether the name contains a query, which may be a signature or a token."""
        return self.kind == "http" and bool(urlsplit(self.secret_url).query)

    @property
    def tls_files(self) -> tuple[str, ...]:
        """Local files and folders that the name refers to, apart from the backing itself."""
        return tuple(filter(None, (self.psk_file, self.tls_folder)))


def parse_location(text: str, *, relative_to: str | None = None) -> Location:
    """Parse a backing name.

    Forms: `http://`, `https://`, `nbd://host[:port]/export`, `nbds://`, `nbd+unix:///export?socket=PATH` (and
    `nbds+unix`), QEMU's older `nbd:host:port[:exportname=NAME]` and `nbd:unix:PATH[:exportname=NAME]`, and a local
    path, absolute or relative to the folder `relative_to` (that of the overlay, as for QEMU). `./a:b` names a local
    file with a colon.

    Raises:
        UsageError: the text is none of these.
    """
    if not text or any(ord(c) < 0x20 or ord(c) == 0x7F for c in text):
        raise UsageError(f"backing {redact(text)!r} is not a URL or a path")
    found = _SCHEME.match(text)
    if found is None:
        path = os.path.normpath(os.path.join(relative_to or os.getcwd(), text))
        return Location("file", redact(path), path, path=path)
    scheme = found[1].lower()
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        # Not chained: the original message quotes the bad part, which may be a piece of a password.
        raise UsageError(f"backing {redact(text)!r}: the host or the port is not valid") from None
    try:
        if scheme in ("http", "https"):
            return _parse_http(text, parts)
        if scheme == "nbd" and not text[len("nbd:") :].startswith("//"):
            uri = _nbd_uri(text)
            return dataclasses.replace(_parse_nbd(uri, urlsplit(uri)), redacted=redact(text))
        if scheme in ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+tcp", "nbds+tcp"):
            return _parse_nbd(text, parts)
    except ValueError as exc:
        raise UsageError(f"backing {redact(text)!r}: {exc}") from exc
    raise UsageError(f"backing {redact(text)!r}: {_way_out(text, scheme)}")


def _way_out(text: str, scheme: str) -> str:
    """What to write instead of a URL with an unknown scheme."""
    rest = text[len(scheme) + 1 :]
    if scheme == "file":
        path = redact(text)[len("file:") :].removeprefix("//")
        return f"file: is not supported; give the path alone, like {path or '/disk.raw'}"
    if _PORT.match(rest):
        return f"a URL begins with its scheme, like http://{redact(text)}"
    return f"{scheme}: is not supported; use http, https, nbd, nbds or nbd+unix"


def redact(text: str) -> str:
    """The text without user name, password and the values of the query, which hold the secret of a signed URL.

    Messages often report mistyped URLs, so anything that looks like a login in the wrong position is removed, too. The
    path of a Unix socket stays: it is an address, not a secret.
    """
    found = _SCHEME.match(text)
    if found is None and not text.startswith("//"):
        return text
    scheme = found[0].lower() if found else ""
    try:
        parts = urlsplit(text)
        _ = parts.port  # an invalid port may be a password that contains a "/", "?" or "#"
    except ValueError:
        return f"{scheme}//..."
    login, _, host = parts.netloc.rpartition("@")
    unix = scheme.endswith("+unix:")
    path = _without_login(parts.path, sure=bool(login) or not (host or unix))
    pairs = [pair if unix and pair.startswith("socket=") else _without_value(pair) for pair in parts.query.split("&")]
    query = "?" + "&".join(pairs) if parts.query else ""
    slashes = "//" if text[len(scheme) :].startswith("//") else ""
    return f"{scheme}{slashes}{host}{path}{query}"


def without_login(url: str) -> str:
    """The URL without user name and password, where it names a place and not a login. Unchanged if it is no URL."""
    try:
        netloc = urlsplit(url).netloc
    except ValueError:
        return url
    return url.replace(netloc, netloc.rpartition("@")[2], 1) if "@" in netloc else url


def _without_login(path: str, *, sure: bool) -> str:
    before, at, after = path.rpartition("@")
    if not at or not (sure or ":" in before):
        return path
    return ("/" if path.startswith("/") else "") + "...@" + after


def _without_value(pair: str) -> str:
    name, _, value = pair.partition("=")
    # A parameter without a value may be a secret itself, perhaps in base64 with "=" at its end.
    return f"{name}=..." if value.strip("=") else "..."


def _parse_http(text: str, parts: SplitResult) -> Location:
    if not parts.hostname:
        raise ValueError("no host in the URL; write it like http://host/disk.raw")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    return Location("http", redact(text), text, host=ascii_host(parts.hostname), port=port, tls=tls)


def _nbd_uri(text: str) -> str:
    """The URI for QEMU's older syntax (qemu:block/nbd.c, nbd_parse_filename), where the export name is not encoded."""
    place, _, export = text.partition(":")[2].partition(":exportname=")
    if place.startswith("unix:"):
        return f"nbd+unix:///{quote(export)}?socket={quote(place.removeprefix('unix:'))}"
    found = _HOST_PORT.fullmatch(place)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise ValueError("give it as nbd://host:port/export, or as QEMU does: nbd:host:port:exportname=NAME")
    return f"nbd://{found[1]}:{found[2]}/{quote(export)}"


def _parse_nbd(text: str, parts: SplitResult) -> Location:
    export = unquote(parts.path.removeprefix("/"))
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    found = Location("nbd", redact(text), text, export=export, **_tls_of_nbd(parts, query))
    if parts.scheme.endswith("+unix"):
        socket_path = query.get("socket", "")
        if not socket_path.startswith("/"):
            raise ValueError("give the server's socket as an absolute path: nbd+unix:///export?socket=PATH")
        host = ascii_host(parts.hostname) if parts.hostname else None
        return dataclasses.replace(found, host=host, path=socket_path)
    if not parts.hostname:
        raise ValueError("no host in the URL; write it like nbd://host/export")
    return dataclasses.replace(found, host=ascii_host(parts.hostname), port=parts.port or NBD_DEFAULT_PORT)


def _tls_of_nbd(parts: SplitResult, query: Mapping[str, str]) -> dict[str, Any]:
    """The TLS fields of an NBD URI (the NBD URI specification, and `tls-certificates` as in libnbd).

    As the specification says, unknown parameters are ignored. But unknown TLS parameters are an error: a user who names
    a key, or what to verify, must not silently get something else.
    """
    tls = parts.scheme.startswith("nbds")
    named = {name: value for name, value in query.items() if name.startswith("tls-")}
    for name, value in named.items():
        if name not in ("tls-psk-file", "tls-certificates"):
            raise ValueError(f"{name}= is not supported; there are tls-psk-file= and tls-certificates=")
        if not tls:
            raise ValueError(f"{name}= is for nbds://, which uses TLS")
        if not value.startswith("/"):
            raise ValueError(f"give {name}= as an absolute path")
    if len(named) > 1:
        raise ValueError("give tls-psk-file= or tls-certificates=, not both")
    user = unquote(parts.username) if parts.username else None
    return {
        "tls": tls,
        "user": user,
        "psk_file": named.get("tls-psk-file"),
        "tls_folder": named.get("tls-certificates"),
    }
