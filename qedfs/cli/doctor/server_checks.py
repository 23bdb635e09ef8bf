"""What the server of a backing can do, found out with the same source that a mount reads from.

Owns the questions, their order, and how much is downloaded. Must not know any protocol: each source validates its
server's answers itself, so an answer that arrives here is right.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator, Mapping

import trio

from qedfs.cli.doctor.finding import Finding, fail, failed, ok, warn
from qedfs.errors import QedfsError, TimedOut
from qedfs.source.base import Identity, Source
from qedfs.source.credentials import Credentials
from qedfs.source.http.judge import SMALL_FILE_BYTES
from qedfs.source.http.target import choose_proxy, shown_proxy
from qedfs.source.libcurl import libcurl
from qedfs.source.look import look
from qedfs.source.nbd import NbdSource
from qedfs.source.nbd.protocol import UNLIMITED_BLOCK_SIZE, Export, Negotiated
from qedfs.source.open import remote_source
from qedfs.source.policy import Policy
from qedfs.source.url import Location
from qedfs.units import format_size

CONNECT_SECONDS = 10.0  # how long to try, as `create` does
SMALL_BYTES = 512  # of a read whose time is mostly the round trip
ROUND_TRIPS = 5
PART_BYTES = 1 << 20  # of a read whose time is mostly the transfer
TRANSFERS = 4  # at a time
MOST_BYTES = 32 << 20  # downloaded to measure the rate
MOST_SECONDS = 3.0
LEAST_RATE_BYTES = 1 << 20  # of less, the rate would be that of the round trip

Report = Callable[[Finding], None]


@dataclasses.dataclass(slots=True)
class Facts:
    """What is known of the backing, for programs. Sizes in bytes; None for what is not known.

    `url` and `redirected_to` contain no secrets. `size` is that of the file, `disk_size` that of the disk in it.
    """

    url: str
    redirected_to: str | None = None
    size: int | None = None
    digest: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    format: str | None = None
    compression: str | None = None
    disk_size: int | None = None
    round_trip_seconds: float | None = None
    bytes_per_second: float | None = None


async def examine(location: Location, credentials: Credentials, seconds: float, report: Report) -> Facts:
    """Ask the server, for at most `seconds`, and report each finding. Raises nothing that the server causes."""
    facts = Facts(str(location))
    failures: list[QedfsError] = []
    with trio.move_on_after(seconds) as scope:
        await _examine(location, credentials, facts, report, failures)
    if scope.cancelled_caught:
        found = f"not all is known after {seconds:g} s"
        late = fail("server", found, "give it more time (--timeout)", exit_code=TimedOut.exit_code)
        # More time helps a slow server, not one whose last answer was a failure.
        report(failed("server", failures[0]) if failures else late)
    return facts


async def _examine(
    location: Location, credentials: Credentials, facts: Facts, report: Report, failures: list[QedfsError]
) -> None:
    """Report what is found. Add to `failures` why the last attempt to connect has failed, if it has."""
    local = tuple(filter(None, (location.path, *location.tls_files)))
    # A policy that allows a local file forbids everything that it does not name, so name the URL too.
    policy = Policy((*local, location.secret_url) if local else ())
    async with trio.open_nursery() as nursery:
        remote = remote_source(
            location, policy, nursery, deadline_seconds=CONNECT_SECONDS, raw=True, credentials=credentials
        )
        try:
            began = trio.current_time()
            identity = await remote.connect()
            report(_server(location, identity, trio.current_time() - began))
            # The source itself, without retries: they would hide what is wrong.
            source = remote.connected
            if source is not None:
                for finding in _at_once(location, source, facts):
                    report(finding)
                await _format(location, credentials, facts, report)
                await measure(source, facts, report)
        except QedfsError as exc:
            report(failed("server", exc))
        finally:
            if remote.error is not None:
                failures.append(remote.error)
            with trio.CancelScope(shield=True):
                await remote.aclose()
            nursery.cancel_scope.cancel()


def _server(location: Location, identity: Identity, seconds: float) -> Finding:
    led = f", redirects to {identity.name}" if _redirected(location, identity) else ""
    return ok("server", f"{location} answers within {seconds * 1000:.0f} ms{led}")


def _redirected(location: Location, identity: Identity) -> bool:
    return location.kind == "http" and identity.name not in ("", str(location))


def _at_once(location: Location, source: Source, facts: Facts) -> Iterator[Finding]:
    """What is known as soon as there is a connection."""
    identity = source.identity
    facts.redirected_to = identity.name if _redirected(location, identity) else None
    facts.size, facts.digest = identity.size, identity.digest
    facts.etag, facts.last_modified = identity.etag, identity.last_modified
    if location.kind == "http":
        yield ok("proxy", proxy(location, os.environ))
        yield ok("ranges", ranges(identity.size))
    if location.path is None:
        yield ok("TLS", tls(location))
    if isinstance(source, NbdSource):
        yield from nbd(location.export, source.negotiated)
    yield version(location.kind, identity)


def proxy(location: Location, environ: Mapping[str, str]) -> str:
    """The proxy that the environment names for this server, without its password."""
    return shown_proxy(choose_proxy(location, environ)) or "none"


def tls(location: Location) -> str:
    """How the connection is secured. The source would not have connected to a server that it cannot verify."""
    if not location.tls:
        return "none: whoever is between here and the server can read and change the data"
    if location.kind == "http":
        return f"the server's certificate is valid ({libcurl().tls})"
    return "the server has the pre-shared key" if location.psk_file else "the server's certificate is valid"


def ranges(size: int) -> str:
    """What the first answer has shown. The source would not have accepted one that is encoded, or too large."""
    if size > SMALL_FILE_BYTES:
        return "the server sends the range that was asked for, without content encoding"
    return f"not known: a file of up to {format_size(SMALL_FILE_BYTES)} may also come as a whole"


def version(kind: str, identity: Identity) -> Finding:
    """How another version of the file would be noticed (contrib/docs/guide.md, "Which version of the image")."""
    check = "version"
    if identity.digest is not None:
        return ok(check, f"digest {identity.digest}: another version is always noticed")
    if identity.strong_etag is not None:
        return ok(check, f"ETag {identity.strong_etag}: another version is noticed if the server changes the tag")
    if kind == "file":
        return ok(check, "size and times of the file")
    if identity.last_modified is not None:
        return ok(check, f"Last-Modified {identity.last_modified}: another version is noticed if the date differs")
    told = "the size alone" if identity.etag is None else f"only the weak tag {identity.etag}"
    name = "qemu-nbd -D NAME, or " if kind == "nbd" and identity.etag is None else ""
    return warn(
        check,
        f"the server tells {told}: another version is noticed by its blocks, at the next connection",
        f"name the version ({name}mount --identity NAME)",
    )


def nbd(export: str, told: Negotiated) -> Iterator[Finding]:
    """What an NBD server has announced."""
    names = [(flag.name or "").lower().replace("_", "-") for flag in told.flags if flag is not Export.HAS_FLAGS]
    flags = ", ".join(filter(None, names))
    described = f", {told.description!r}" if told.description else ""
    yield ok("NBD export", f"{export!r}{described}, {told.size} bytes; flags: {flags or 'none'}")
    yield ok("NBD block sizes", _block_sizes(told.block_sizes))
    if told.context is not None:
        yield ok("NBD holes", "structured replies and block status: zeros are not transferred")
    else:
        lacks = "block status (base:allocation)" if told.structured else "structured replies"
        yield warn("NBD holes", f"no {lacks}: zeros are transferred", "a newer server may have it")


def _block_sizes(told: tuple[int, int, int] | None) -> str:
    if told is None:
        return "not told"
    minimum, preferred, most = told
    return f"minimum {minimum}, preferred {preferred}, maximum {'none' if most == UNLIMITED_BLOCK_SIZE else most}"


async def _format(location: Location, credentials: Credentials, facts: Facts, report: Report) -> None:
    try:
        found = await look(location, deadline_seconds=CONNECT_SECONDS, credentials=credentials)
    except QedfsError as exc:
        report(failed("format", exc))
        return
    facts.format, facts.compression, facts.disk_size = found.format, found.compression, found.size
    report(ok("format", str(found)))


async def measure(source: Source, facts: Facts, report: Report) -> None:
    """Reads at several places, round trip and rate."""
    size = source.identity.size
    if not size:
        return
    small = memoryview(bytearray(min(SMALL_BYTES, size)))
    times = []
    for number in range(ROUND_TRIPS + 1):
        began = trio.current_time()
        # At different places: a cache on the way should not answer all of them.
        await source.read((size - len(small)) * number // ROUND_TRIPS, small, urgent=True)
        times.append(trio.current_time() - began)
    report(ok("reads", f"{len(times)} of {len(small)} bytes at different places have succeeded"))
    # The first one may have had to connect.
    facts.round_trip_seconds = statistics.median(times[1:])
    report(ok("round trip", f"{facts.round_trip_seconds * 1000:.1f} ms"))
    received, seconds = await _download(source, size)
    if received < LEAST_RATE_BYTES:
        return
    facts.bytes_per_second = received / seconds
    measured = f"{format_size(received)} with {TRANSFERS} requests at a time"
    report(ok("rate", f"{format_size(facts.bytes_per_second)}/s ({measured})"))


async def _download(source: Source, size: int) -> tuple[int, float]:
    """Download at most MOST_BYTES, for at most MOST_SECONDS. Returns bytes and seconds."""
    parts = iter(range(0, min(size, MOST_BYTES), PART_BYTES))

    async def transfer() -> None:
        buffer = memoryview(bytearray(PART_BYTES))
        for pos in parts:
            await source.read(pos, buffer[: min(PART_BYTES, size - pos)])

    began, received = trio.current_time(), source.received
    with trio.move_on_after(MOST_SECONDS):
        async with trio.open_nursery() as nursery:
            for _ in range(TRANSFERS):
                nursery.start_soon(transfer)
    return source.received - received, max(trio.current_time() - began, 1e-6)
