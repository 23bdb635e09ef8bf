"""What an overlay may make this machine open or connect to: decided by the user who mounts, not by the overlay.

The default is safe without being in the way on a private network: http, https and nbd to any address but
link-local ones and others where clouds serve credentials; no local path and no Unix socket. A redirect may not lead
from a public address to a private or loopback one, nor from https to http. As soon as one prefix is allowed, nothing
outside the prefixes is opened (what a service that mounts other people's overlays wants).

Opens and connects nothing: the callers do, and ask here with the address or the file that they are about to use, so
that a name which leads elsewhere the second time gains nothing.
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

# Networks of IPv6 that stand for an IPv4 address in their last 32 bits: through NAT64 (RFC 6052), translated (RFC
# 2765) or "IPv4-compatible" (RFC 4291, section 2.5.5.1; ::1 becomes 0.0.0.1, which is as private).
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::ffff:0:0:0/96", "::/96")))

# For NAT64 of a site's own (RFC 8215), which may put the IPv4 address where any of its prefixes ends.
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
_NAT64_OCTETS = ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12))  # /48, /56, /64 of RFC 6052, section 2.2
_NAT64_ZERO = 8

_ISATAP = (bytes.fromhex("00005efe"), bytes.fromhex("02005efe"))  # RFC 5214, section 6.1, below any /64

# Where a cloud tells a machine who it is, other than 169.254.0.0/16.
_METADATA = tuple(
    map(
        ipaddress.ip_network,
        (
            "fd00:ec2::/32",  # Amazon
            "fd20:ce::254",  # Google
            "168.63.129.16",  # Azure, and public by its number
            "100.100.100.200",  # Alibaba
            "192.0.0.192",  # Oracle
            "fd00:42::42",  # Scaleway
        ),
    )
)

_SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")  # global by Python's tables, since RFC 3879 gave the prefix up

# In a decoded segment: a control character or a backslash, what decodes once more, a dot segment, also with parameters.
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\\]|%[0-9A-Fa-f]{2}|(?:^|/)\.\.?(?:[/;]|$)")


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """`prefixes`: the values of `--allow-backing`: URL prefixes, or absolute folders and files.

    A URL prefix ends where a segment of the path, or of an NBD export's name, ends. One with a query allows that very
    URL. A URL that servers read in different ways (dot segments, backslashes, double encoding) is under no prefix.
    """

    prefixes: tuple[str, ...] = ()

    def check_location(self, location: Location) -> None:
        """Raise Refused unless a backing may be at this place at all. Links on the way to a local path are followed."""
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
        """Keys that a backing's name leads to are local files like any other."""
        for path in location.tls_files:
            if not any(_holds(prefix, os.path.realpath(path)) for prefix in self.prefixes):
                raise Refused(
                    f"backing {location} names the local file {path}; --allow-backing {path} would allow it,"
                    " or name the key in --credentials"
                )

    def check_path(self, path: str, location: Location) -> None:
        """Raise Refused unless what is at `path`, which holds no links, may be the backing at `location`.

        Who opens or connects asks this about what was found: the name may lead elsewhere than a moment before.
        """
        if not any(_holds(prefix, path) for prefix in self.prefixes):
            raise Refused(f"backing {location} is outside every --allow-backing prefix")

    def check_address(self, address: str, location: Location, *, redirected_from: str | None = None) -> None:
        """Raise Refused unless a connection to this numeric address may be made for `location`.

        `redirected_from` is the numeric address of the server that redirected here. A name there stands for a server
        whose address is not known, and counts as public.
        """
        readings = _readings(address)
        if any(map(_is_special, readings)):
            raise Refused(f"backing {location} leads to {address}, a link-local or special address")
        if redirected_from is not None and not _is_inner_server(redirected_from) and any(map(_is_inner, readings)):
            raise Refused(f"backing {location} was redirected from {redirected_from} to the private address {address}")

    def check_redirect(self, source: Location, target: Location) -> None:
        """Raise Refused unless an HTTP answer of `source` may send us on to `target`."""
        if target.kind != "http":
            raise Refused(f"backing {source} redirects to {target}, which is not http")
        if source.tls and not target.tls:
            raise Refused(f"backing {source} redirects from https to {target}")
        self.check_location(target)


def _readings(address: str) -> list[_Address]:
    """What a packet to this address may reach: most often one address, with IPv6 around it taken off.

    Where it depends on who translates, all of them: one that is not allowed is enough to refuse it.
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
    """By the prefixes that are shorter than /96; what follows the IPv4 address there is zero."""
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
    """Whether a location is at the prefix `allowed` or below it, as `Policy` says."""
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
    """The segments of the path or export that is asked for; None if servers disagree about what it means.

    An encoded slash does not divide: a server that takes it for one gets no further than into the segment.
    """
    if location.kind == "nbd":
        segments = location.export.split("/")  # as it is sent
    else:
        path = urlsplit(location.secret_url).path or "/"
        try:
            segments = [unquote(segment, errors="strict") for segment in path.split("/")]
        except UnicodeDecodeError:
            return None
    return None if any(map(_AMBIGUOUS.search, segments)) else segments
