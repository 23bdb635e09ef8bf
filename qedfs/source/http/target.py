"""The target of a request: the URL for libcurl, credentials, extra header lines and proxy.

Pure, except that it reads the environment for the proxy. Owns the rule that the user's credentials (user name,
password, header lines and certificates) are sent only to the origin that the user named. Must not know about
connections or answers. No field that may contain a secret appears in `repr`.

Python's parser splits the URL, as it does for the policy, and libcurl gets a URL reassembled from the checked parts. If
two parsers understood an odd URL differently, it could get past the policy.
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
from qedfs.source.url import Location, parse_location, redact

_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")  # a name or IPv4 address, or an IPv6 address
_URL_SAFE = "/%:@!$&'()*+,;=~?[]"  # RFC 3986; existing percent-encodings are kept
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
    redirected_from: str | None = None  # address of the server that redirected here; its name if a proxy was used

    @property
    def place(self) -> str:
        """Identifies the server for `Identity.place`: a digest of scheme, host and port."""
        return hashlib.sha256(repr(_origin(self.location)).encode()).hexdigest()[:16]

    @property
    def proxy_name(self) -> str:
        """The proxy without its user name and password; "" if there is none."""
        return shown_proxy(self.proxy)

    def check_address(self, address: str, policy: Policy) -> None:
        """Raise Refused unless a connection may go to this numeric address.

        The user has chosen the proxy, so its address is not checked, and the address that it connects to is unknown
        here. `check_literal` still refuses a forbidden address in the URL.
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
    """The target that the user named. `headers` ("Name: value" lines) and `tls` are for its origin only.

    Raises:
        UsageError: a header line or the host name is invalid.
    """
    for number, line in enumerate(headers, 1):
        if _HEADER_LINE.fullmatch(line) is None:
            # The line is not quoted, because it may contain a token.
            raise UsageError(f"backing {location}: extra header {number} is not of the form 'Name: value'")
    return dataclasses.replace(_target(location, tuple(headers), environ, redirected_from=None), tls=tls)


def next_target(
    origin: Target, current: Target, reference: str, address: str | None, environ: Mapping[str, str] = os.environ
) -> Target:
    """The target of a redirect by `current` with `Location: reference`.

    The credentials, header lines and certificates for `origin`, the target that the user named, are sent along only if
    scheme, host and port are the same (RFC 9110, section 15.4; CVE-2018-20060 and CVE-2018-25091 show why). `address`
    is the numeric address of the server that answered, or of the proxy in front of it.

    Raises:
        SourceError: the reference is not a URL that can be followed.
    """
    try:
        # Header bytes were decoded as Latin-1; percent-encode the original bytes.
        reference = _NON_ASCII.sub(lambda found: f"%{ord(found[0]):02X}", reference)
        text = urljoin(current.location.secret_url, reference).partition("#")[0]
        location = parse_location(text)
        same = _origin(location) == _origin(origin.location)
        target = _target(location, origin.headers if same else (), environ, redirected_from=_server(current, address))
    except (ValueError, UsageError):
        # Not chained: urllib's message may quote a login, and tracebacks are logged.
        raise SourceError(f"{current.location} redirects to something that is not a usable URL") from None
    if not same:
        return target
    target = dataclasses.replace(target, tls=origin.tls)
    return (
        target if target.user is not None else dataclasses.replace(target, user=origin.user, password=origin.password)
    )


def shown_proxy(proxy: str) -> str:
    """A proxy, as `choose_proxy` returns it, without its user name and password. It may have no scheme."""
    return redact(proxy if "://" in proxy else f"//{proxy}").removeprefix("//")


def choose_proxy(location: Location, environ: Mapping[str, str]) -> str:
    """The proxy that curl's environment variables name for this location, or "".

    As in curl(1): `http_proxy` (only in lower case, because a CGI client can set the upper-case variable),
    `https_proxy`, `all_proxy`, `no_proxy`. This is decided here and not inside libcurl, because the address of a
    connection is checked only if it goes directly to the server.
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
    """The server that answered a request to `target`: its address if known, otherwise its name, which counts as public.

    The address of a proxy is useless here: it is usually private, while the answer may come from anywhere.
    """
    if peer is None or target.proxy:
        return _literal(target.location) or _checked_host(target.location)
    return peer


def _origin(location: Location) -> tuple[bool, str | None, int | None]:
    return location.tls, location.host, location.port


def _literal(location: Location) -> str | None:
    """The address if the host is one, in any notation that libcurl, a proxy or a resolver may accept; else None.

    This uses the host as it is sent: full-width digits and other full stops have been converted to ASCII.
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
