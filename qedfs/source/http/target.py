"""One place that a request goes to: the URL as libcurl gets it, credentials, extra header lines, proxy.

Pure, except that the first target asks the environment for a proxy. Owns what may be sent where: user name, password
and the caller's header lines go to the origin that the user named and to no other. Must not know connections or
answers. Every field that can hold a secret is kept out of `repr`.

The URL is split by Python's parser, which the policy used too, and libcurl gets it put together again from checked
pieces. Two parsers that read one odd URL differently would let it past the policy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from urllib.parse import quote, unquote, urljoin, urlsplit

from qedfs.errors import SourceError, UsageError
from qedfs.source.credentials import NO_TLS_FILES, TlsFiles
from qedfs.source.hostname import ascii_host
from qedfs.source.policy import Policy
from qedfs.source.url import Location, parse_location

_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")  # a name or IPv4 address, or an IPv6 address
_URL_SAFE = "/%:@!$&'()*+,;=~?[]"  # RFC 3986; what is percent-encoded already stays so
_NON_ASCII = re.compile("[\x80-\xff]")
_HEADER_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")  # RFC 9110, section 5.5


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where one request goes. `url` has no user name and no fragment; `proxy` is "" for a direct connection."""

    location: Location
    url: str = dataclasses.field(repr=False)
    user: str | None = dataclasses.field(repr=False)
    password: str | None = dataclasses.field(repr=False)
    headers: tuple[str, ...] = dataclasses.field(repr=False)
    proxy: str = dataclasses.field(repr=False)
    tls: TlsFiles = NO_TLS_FILES
    redirected_from: str | None = None  # numeric address of the server that sent us here; its name behind a proxy

    @property
    def place(self) -> str:
        """Stands for the server, as `Identity.place`: its scheme, host and port."""
        return hashlib.sha256(repr(_origin(self.location)).encode()).hexdigest()[:16]

    def check_address(self, address: str, policy: Policy) -> None:
        """Raise Refused unless a connection may go to this numeric address.

        A proxy is the user's own choice, so its address is not checked, and what it connects to is not known here;
        `check_literal` still refuses an address written into the URL.
        """
        if not self.proxy:
            policy.check_address(address, self.location, redirected_from=self.redirected_from)

    def check_literal(self, policy: Policy) -> None:
        """Raise Refused if the host is written as a numeric address (in any spelling) that is not allowed."""
        address = _literal(self.location)
        if address is not None:
            policy.check_address(address, self.location, redirected_from=self.redirected_from)


def first_target(
    location: Location,
    headers: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    *,
    tls: TlsFiles = NO_TLS_FILES,
) -> Target:
    """The target that the user named. `headers` are "Name: value" lines for its origin, and `tls` is for it alone too.

    Raises:
        UsageError: a header line that is none, or a host name that is none.
    """
    for number, line in enumerate(headers, 1):
        if _HEADER_LINE.fullmatch(line) is None:
            # Not quoted: it may hold a token.
            raise UsageError(f"backing {location}: extra header {number} is not of the form 'Name: value'")
    return dataclasses.replace(_target(location, tuple(headers), environ, redirected_from=None), tls=tls)


def next_target(
    origin: Target, current: Target, reference: str, address: str | None, environ: Mapping[str, str] = os.environ
) -> Target:
    """Where an answer of `current` with `Location: reference` sends us.

    What `origin`, the place that the user named, gets (credentials, header lines, certificates) comes along only if the
    new place is of the same origin: scheme, host and port (RFC 9110, section 15.4; CVE-2018-20060 and CVE-2018-25091
    are what happens otherwise). `address` is the numeric address of the server that answered, or of the proxy that
    spoke for it.

    Raises:
        SourceError: the reference is not a URL that can be followed.
    """
    try:
        # Header bytes arrive as Latin-1; they go back as the bytes that they were.
        reference = _NON_ASCII.sub(lambda found: f"%{ord(found[0]):02X}", reference)
        text = urljoin(current.location.secret_url, reference).partition("#")[0]
        location = parse_location(text)
        same = _origin(location) == _origin(origin.location)
        target = _target(location, origin.headers if same else (), environ, redirected_from=_server(current, address))
    except (ValueError, UsageError):
        # Not chained: urllib's text may quote a login, and tracebacks are logged.
        raise SourceError(f"{current.location} redirects to something that is not a usable URL") from None
    if not same:
        return target
    target = dataclasses.replace(target, tls=origin.tls)
    return (
        target if target.user is not None else dataclasses.replace(target, user=origin.user, password=origin.password)
    )


def choose_proxy(location: Location, environ: Mapping[str, str]) -> str:
    """The proxy that curl's environment variables name for this place, or "".

    As in curl(1): `http_proxy` (lower case only: the other spelling can be set by a CGI client), `https_proxy`,
    `all_proxy`, `no_proxy`. Decided here and not inside libcurl, because whether a connection goes to the server
    itself decides whether its address is the one to check.
    """
    names = ("https_proxy", "HTTPS_PROXY") if location.tls else ("http_proxy",)
    proxy = next((environ[name] for name in (*names, "all_proxy", "ALL_PROXY") if environ.get(name)), "")
    no_proxy = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if not proxy or any(_matches(location.host or "", entry) for entry in re.split(r"[,\s]+", no_proxy) if entry):
        return ""
    return proxy


def _target(
    location: Location, headers: tuple[str, ...], environ: Mapping[str, str], *, redirected_from: str | None
) -> Target:
    parts = urlsplit(location.secret_url)
    host = _checked_host(location)
    bracketed = f"[{host}]" if ":" in host else host
    path = quote(parts.path or "/", safe=_URL_SAFE.replace("?", ""))
    query = "?" + quote(parts.query, safe=_URL_SAFE) if parts.query else ""
    return Target(
        location=location,
        url=f"{parts.scheme.lower()}://{bracketed}:{location.port}{path}{query}",
        user=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        headers=headers,
        proxy=choose_proxy(location, environ),
        redirected_from=redirected_from,
    )


def _checked_host(location: Location) -> str:
    host = location.host or ""
    if _HOST.fullmatch(host) is None:
        raise UsageError(f"backing {location}: not a host name")
    return host


def _server(target: Target, peer: str | None) -> str:
    """Who answered a request to `target`: its address if that is known, else its name, which counts as public.

    A proxy's own address says nothing: it is most often a private one, and what it relays comes from anywhere.
    """
    if peer is None or target.proxy:
        return _literal(target.location) or _checked_host(target.location)
    return peer


def _origin(location: Location) -> tuple[bool, str | None, int | None]:
    return location.tls, location.host, location.port


def _literal(location: Location) -> str | None:
    """The address that the host is written as, in any spelling that libcurl, a proxy or a resolver may take for one.

    Looked at is what is sent: full-width digits and other full stops have become plain ones.
    """
    host = _checked_host(location).rstrip(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # 0xa9fea9fe, 2852039166, 0251.0376.0251.0376
    except OSError:
        return None


def _matches(host: str, entry: str) -> bool:
    """Whether an entry of `no_proxy` covers the host: `*`, a domain with its subdomains, an address, a network."""
    if entry == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        stem = _comparable(entry).strip(".")
        return host == stem or host.endswith("." + stem)


def _comparable(entry: str) -> str:
    try:
        return ascii_host(entry.lower())
    except ValueError:
        return entry.lower()
