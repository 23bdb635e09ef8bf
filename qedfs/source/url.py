"""The text that names a backing -> a parsed location whose str and repr show no credential.

Pure: no I/O. Parsing is strict and has no fall-through: a text that is not one of the known forms is an error, never
"then it must be a file name" (QEMU's `json:` and `file:` forms are refused by name).
"""

from __future__ import annotations

import dataclasses
import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

from qedfs.errors import UsageError

NBD_DEFAULT_PORT = 10809  # IANA, and the NBD URI specification
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """Where a backing is. `repr` and `str` are redacted; only the transport that connects reads `secret_url`."""

    kind: str  # "http", "nbd" or "file"
    redacted: str
    secret_url: str = dataclasses.field(repr=False)
    host: str | None = None
    port: int | None = None
    tls: bool = False
    export: str = ""  # NBD export name
    path: str | None = None  # of the local file, or of the NBD server's Unix socket

    def __str__(self) -> str:
        return self.redacted


def parse_location(text: str, *, relative_to: str | None = None) -> Location:
    """Parse a backing name.

    Forms: `http://`, `https://`, `nbd://host[:port]/export`, `nbds://`, `nbd+unix:///export?socket=PATH` (and
    `nbds+unix`), and a local path, absolute or relative to the folder `relative_to` (that of the overlay, as for
    QEMU). `./a:b` names a local file with a colon.

    Raises:
        UsageError: the text is none of these.
    """
    if not text or any(ord(c) < 0x20 or ord(c) == 0x7F for c in text):
        raise UsageError(f"backing {text!r} is not a URL or a path")
    found = _SCHEME.match(text)
    if found is None or "/" in text[: found.end() - 1]:
        path = os.path.normpath(os.path.join(relative_to or os.getcwd(), text))
        return Location("file", path, path, path=path)
    scheme = found[1].lower()
    try:
        if scheme in ("http", "https"):
            return _parse_http(text, scheme)
        if scheme in ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+tcp", "nbds+tcp"):
            return _parse_nbd(text, scheme)
    except ValueError as exc:
        raise UsageError(f"backing {redact(text)!r}: {exc}") from exc
    raise UsageError(f"backing {redact(text)!r}: {scheme}: is not supported; use http, https, nbd, nbds or nbd+unix")


def redact(text: str) -> str:
    """The text without user name, password and query values (signed URLs carry their secret in the query).

    The path of a Unix socket stays: it is where the thing is, not how one gets in.
    """
    try:
        parts = urlsplit(text)
    except ValueError:
        return text.split("://", 1)[0] + "://..."
    host = parts.netloc.rpartition("@")[2]
    pairs = [pair if pair.startswith("socket=") else re.sub(r"=.*", "=...", pair) for pair in parts.query.split("&")]
    query = "?" + "&".join(pairs) if parts.query else ""
    return f"{parts.scheme}://{host}{parts.path}{query}" if parts.scheme else text


def _parse_http(text: str, scheme: str) -> Location:
    parts = urlsplit(text)
    if not parts.hostname:
        raise ValueError("no host in the URL")
    port = parts.port or (443 if scheme == "https" else 80)
    return Location("http", redact(text), text, host=parts.hostname, port=port, tls=scheme == "https")


def _parse_nbd(text: str, scheme: str) -> Location:
    parts = urlsplit(text)
    export = unquote(parts.path.removeprefix("/"))
    tls = scheme.startswith("nbds")
    if scheme.endswith("+unix"):
        socket_path = dict(parse_qsl(parts.query)).get("socket", "")
        if not socket_path.startswith("/"):
            raise ValueError("give the server's socket as an absolute path: nbd+unix:///export?socket=PATH")
        return Location("nbd", redact(text), text, host=parts.hostname, tls=tls, export=export, path=socket_path)
    if not parts.hostname:
        raise ValueError("no host in the URL")
    port = parts.port or NBD_DEFAULT_PORT
    return Location("nbd", redact(text), text, host=parts.hostname, port=port, tls=tls, export=export)
