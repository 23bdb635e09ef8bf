"""The text of a backing -> a source, under the policy of the mounting user. The one place that knows all kinds."""

from __future__ import annotations

import trio

from qedfs.errors import Reason, SourceError, SourceUnreachable
from qedfs.source.base import Source
from qedfs.source.circuit_breaker import ReaderSlots
from qedfs.source.credentials import NO_CREDENTIALS, Credentials
from qedfs.source.http import HttpSource
from qedfs.source.local import LocalSource
from qedfs.source.nbd import NbdSource
from qedfs.source.path import in_thread
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.policy import Policy
from qedfs.source.probe import HEAD_BYTES, QCOW2, RAW, TAIL_BYTES, Found, probe
from qedfs.source.qcow2 import Qcow2Source
from qedfs.source.retrying import DEADLINE_SECONDS, RetryingSource
from qedfs.source.samples import Samples
from qedfs.source.url import Location

LOCAL_PATH_SECONDS = 5.0


def remote_source(
    location: Location,
    policy: Policy,
    nursery: trio.Nursery,
    *,
    deadline_seconds: float = DEADLINE_SECONDS,
    raw: bool = True,
    expected: str | None = None,
    pinning: Pinning = USUAL,
    places: ReaderSlots | None = None,
    credentials: Credentials = NO_CREDENTIALS,
) -> RetryingSource:
    """A source for `location` that connects when it is first needed.

    `nursery` runs the tasks of the connections; it must outlive the source. `raw`: the backing is known to be raw,
    whatever its bytes look like. Otherwise they decide: a qcow2 image is read as one, other known formats and packed
    files are refused, and the rest is raw. `expected`: the format that the user has named ("raw" or "qcow2"); with
    `raw` unset, a backing in another one is a SourceError when it connects. `pinning`: what counts as another version.
    `places`: see `RetryingSource`. `credentials`: what is shown to which place.

    The place is judged by the policy before it is opened (`allowed`); what a path or a name then led to, file, socket
    or address, is judged again before it is used.
    """

    samples = Samples()
    shown = credentials.entry_for(location)

    async def connect() -> Source:
        source = await open_source()
        remote.file = source
        if raw:
            return source
        try:
            return await _in_its_format(source, location, expected)
        except BaseException:
            await source.aclose()
            raise

    async def open_source() -> Source:
        await allowed(location, policy)
        if location.kind == "http":
            return await HttpSource.open(
                location,
                policy,
                nursery,
                headers=shown.headers,
                tls=shown.tls,
                deadline_seconds=deadline_seconds,
                pinning=pinning,
                samples=samples,
            )
        if location.kind == "nbd":
            return await NbdSource.open(location, policy, nursery, tls=shown.tls, pinning=pinning, samples=samples)
        return await LocalSource.open(location, policy, pinning=pinning, samples=samples)

    remote = RetryingSource(
        location, connect, deadline_seconds=deadline_seconds, places=places, pinning=pinning, samples=samples
    )
    return remote


async def allowed(location: Location, policy: Policy) -> None:
    """Raise Refused if the policy does not allow this place. Links on the way to a local path are followed.

    That may wait for a dead file server, or for ourselves: hence not on the event loop.
    """
    path = next(filter(None, (location.path, *location.tls_files)), None)
    if path is None:
        policy.check_location(location)
        return
    with trio.move_on_after(LOCAL_PATH_SECONDS):
        await in_thread(path, lambda: policy.check_location(location))
        return
    raise SourceUnreachable(
        f"backing {location}: the way to it cannot be looked at within {LOCAL_PATH_SECONDS:g} s", reason=Reason.TIMEOUT
    )


async def _in_its_format(source: Source, location: Location, expected: str | None) -> Source:
    """The disk that the backing's first bytes say it holds.

    QED knows one bit (NO_PROBE, "the backing is raw") and no names, so without it there is nothing to go by but the
    bytes. That is the classic hole of probing: a guest that can write to its raw disk puts a qcow2 header there, and
    the next reader opens the file that the header names. It is closed here twice. `create_overlay` and QEMU set the
    bit for every backing that is called raw, and then nobody looks. And a qcow2 image's own backing and data files are
    never followed, so a forged header leads to nothing but other bytes of the very file that the forger wrote.
    """
    found = await _probed(source)
    if expected is not None and found.name != expected:
        advice = "; ".join(filter(None, (found.way_out, "see --backing-format")))
        raise SourceError(
            f"backing {location} is not a {expected} image; its {found.at} bytes say {found.name} ({advice})"
        )
    if found is QCOW2:
        return await Qcow2Source.open(source, str(location))
    if found is not RAW:
        raise SourceError(
            f"backing {location} looks like a {found.name} image and the overlay does not say that it is raw; "
            f"{found.way_out}; if it is raw, say so: qemu-img rebase -u -F raw -b BACKING OVERLAY"
        )
    return source


async def _probed(source: Source) -> Found:
    size = source.identity.size
    if not size:
        return RAW
    head, tail = bytearray(min(HEAD_BYTES, size)), bytearray(min(TAIL_BYTES, size))
    await source.read(0, memoryview(head))
    found = probe(bytes(head), b"")
    if found is not RAW:
        return found
    await source.read(size - len(tail), memoryview(tail))
    return probe(bytes(head), bytes(tail))
