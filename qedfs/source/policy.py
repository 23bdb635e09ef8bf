"""The policy of the mounting user: which files, sockets and addresses an overlay may make this machine open.

The default is safe, yet useful on a private network. It allows http, https and nbd to any address except link-local,
multicast and unspecified ones, and those at which clouds serve credentials; it allows no local path and no Unix socket.
A redirect may not lead from a public address to a private or loopback one, nor from https to http. If the user allows
any prefix, nothing outside the allowed prefixes is opened. A service that mounts other people's overlays needs this.

Owns these rules and the words of a refusal. Must not know how a source is reached. Opens and connects nothing itself.
The callers pass the very address or file that they are about to use, so a name that resolves differently at a second
look-up cannot get around a check.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from urllib.parse import unquote, urlsplit

from qedfs.errors import Refused, UsageError
from qedfs.source.url import Location, parse_location, redact

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# IPv6 networks that embed an IPv4 address in the last 32 bits: NAT64 (RFC 6052), IPv4-translated (RFC 2765) and
# IPv4-compatible (RFC 4291, section 2.5.5.1; ::1 becomes 0.0.0.1, which is just as private).
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::ffff:0:0:0/96", "::/96")))

# For local-use NAT64 (RFC 8215). A site may choose the length of its prefix, and the IPv4 address follows the prefix.
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
_NAT64_OCTETS = ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12))  # /48, /56, /64 of RFC 6052, section 2.2
_NAT64_ZERO = 8

_ISATAP = (bytes.fromhex("00005efe"), bytes.fromhex("02005efe"))  # RFC 5214, section 6.1, below any /64

# The metadata services of clouds outside 169.254.0.0/16.
_METADATA = tuple(
    map(
        ipaddress.ip_network,
        (
            "fd00:ec2::/32",  # Amazon
            "fd20:ce::254",  # Google
            "168.63.129.16",  # Azure; formally a public address
            "100.100.100.200",  # Alibaba
            "192.0.0.192",  # Oracle
            "fd00:42::42",  # Scaleway
        ),
    )
)

_SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")  # global in Python's tables, because RFC 3879 deprecated the prefix

# In a decoded segment: control characters, backslashes, another percent-encoding, dot segments (also with parameters).
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\\]|%[0-9A-Fa-f]{2}|(?:^|/)\.\.?(?:[/;]|$)")


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """`prefixes`: the values of `--allow-backing`: URL prefixes, or absolute folders and files.

    A URL prefix covers whole segments of the path, or of the name of an NBD export. A prefix with a query allows only
    that one URL. No prefix covers a URL that servers may interpret differently (dot segments, backslashes, double
    encoding).
    """

    prefixes: tuple[str, ...] = ()

    def check_location(self, location: Location) -> None:
        """Raise Refused unless a backing may be at this location. Symbolic links in a local path are followed."""
        self._check_tls_files(location)
        if location.path is None:
            if self.prefixes and not any(_covers(prefix, location) for prefix in self.prefixes):
                raise Refused(f"backing {location} is outside every --allow-backing prefix")
            return
        if not self.prefixes:
            what = "the Unix socket" if location.kind == "nbd" else "the local file"
            path = redact(location.path)
            raise Refused(f"backing {location} names {what} {path}; --allow-backing {path} would allow it")
        self.check_path(os.path.realpath(location.path), location)

    def _check_tls_files(self, location: Location) -> None:
        """Raise Refused unless the key files that the backing name refers to are allowed, as for any local file."""
        for path in location.tls_files:
            if not any(_holds(prefix, os.path.realpath(path)) for prefix in self.prefixes):
                raise Refused(
                    f"backing {location} names the local file {path}; --allow-backing {path} would allow it,"
                    " or name the key in --credentials"
                )

    def check_path(self, path: str, location: Location) -> None:
        """Raise Refused unless the file at `path`, which contains no links, may be the backing at `location`.

        Call this with the resolved path of a file that the caller already holds. The file at the path that the backing
        names may have been replaced since the first check.
        """
        if not any(_holds(prefix, path) for prefix in self.prefixes):
            raise Refused(f"backing {location} is outside every --allow-backing prefix")

    def check_address(self, address: str, location: Location, *, redirected_from: str | None = None) -> None:
        """Raise Refused unless a connection to this numeric address may be made for `location`.

        `redirected_from` is the numeric address of the server that redirected here. If it is a name, the address of
        that server is unknown, and it counts as public.
        """
        readings = _readings(address)
        if any(map(_is_special, readings)):
            raise Refused(f"backing {location} leads to {address}, a link-local or special address")
        if redirected_from is not None and not _is_inner_server(redirected_from) and any(map(_is_inner, readings)):
            raise Refused(f"backing {location} was redirected from {redirected_from} to the private address {address}")

    def check_redirect(self, source: Location, target: Location) -> None:
        """Raise Refused unless `source` may redirect to `target`."""
        if target.kind != "http":
            raise Refused(f"backing {source} redirects to {target}, which is not http")
        if source.tls and not target.tls:
            raise Refused(f"backing {source} redirects from https to {target}")
        self.check_location(target)


def _readings(address: str) -> list[_Address]:
    """The addresses that a packet to this address may reach, with IPv4 addresses extracted from IPv6.

    Usually that is one. Where it depends on how a translator is configured, all candidates are returned: one forbidden
    candidate is enough to refuse the address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return [ip]
    last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if any(ip in network for network in _EMBEDDING):
        return [last]
    if ip in _LOCAL_NAT64:
        return _nat64_readings(ip.packed) or [last]
    if ip.packed[8:12] in _ISATAP:
        return [ip, last]
    if ip.teredo is not None:
        return list(ip.teredo)  # server and client
    return [ip.ipv4_mapped or ip.sixtofour or ip]


def _nat64_readings(packed: bytes) -> list[_Address]:
    """The candidates for prefixes shorter than /96, where the bytes after the IPv4 address must be zero."""
    return [
        ipaddress.IPv4Address(bytes(packed[octet] for octet in octets))
        for octets in _NAT64_OCTETS
        if packed[_NAT64_ZERO] == 0 and any(packed[6:]) and not any(packed[octets[-1] + 1 :])
    ]


def _is_special(ip: _Address) -> bool:
    return ip.is_link_local or ip.is_multicast or ip.is_unspecified or any(ip in network for network in _METADATA)


def _is_inner(ip: _Address) -> bool:
    return not ip.is_global or ip in _SITE_LOCAL


def _is_inner_server(server: str) -> bool:
    try:
        return all(map(_is_inner, _readings(server)))
    except ValueError:
        return False


def _holds(prefix: str, path: str) -> bool:
    folder = os.path.realpath(prefix)
    return prefix.startswith("/") and (path == folder or path.startswith(folder.rstrip("/") + "/"))


def _covers(prefix: str, location: Location) -> bool:
    try:
        return below(parse_location(prefix), location)
    except UsageError:
        return False


def below(allowed: Location, location: Location) -> bool:
    """Whether the prefix `allowed` covers a location, by the rules of `Policy`."""
    if _server(allowed) != _server(location):
        return False
    query = urlsplit(allowed.secret_url).query if allowed.kind == "http" else ""
    covered, asked = _segments(allowed), _segments(location)
    if covered is None or asked is None:
        return False
    if query:
        return asked == covered and urlsplit(location.secret_url).query == query
    # "http://host/images" covers /images and /images/x, not /images-secret; so does "http://host/images/".
    while covered and not covered[-1]:
        covered.pop()
    return asked[: len(covered)] == covered


def _server(location: Location) -> tuple[str, bool, str | None, int | None, str | None]:
    return location.kind, location.tls, location.host, location.port, location.path


def _segments(location: Location) -> list[str] | None:
    """The segments of the path or export name; None if servers may interpret it differently.

    An encoded slash does not separate segments. A server that decodes it looks deeper below the same covering prefix.
    """
    if location.kind == "nbd":
        segments = location.export.split("/")  # in the form in which it is sent
    else:
        path = urlsplit(location.secret_url).path or "/"
        try:
            segments = [unquote(segment, errors="strict") for segment in path.split("/")]
        except UnicodeDecodeError:
            return None
    return None if any(map(_AMBIGUOUS.search, segments)) else segments
