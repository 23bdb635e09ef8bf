"""Opens the source for a backing name, under the policy of the mounting user. The only module that makes sources.

Owns the choice of the class for each kind of location, and of the reader for the backing's format. `url.py`,
`policy.py` and `credentials.py` also distinguish kinds of locations. Must not know how a source fetches bytes.
"""

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
from qedfs.source.probe import HEAD_BYTES, QCOW2, QED, RAW, TAIL_BYTES, Found, probe
from qedfs.source.qcow2 import Qcow2Source
from qedfs.source.qed import QedSource
from qedfs.source.retrying import DEADLINE_SECONDS, RetryingSource
from qedfs.source.samples import Samples
from qedfs.source.url import Location

LOCAL_PATH_SECONDS = 5.0
SAY_RAW = "qemu-img rebase -u -F raw -b BACKING OVERLAY"


def remote_source(  # noqa: PLR0913 - what a user may say about a backing
    location: Location,
    policy: Policy,
    nursery: trio.Nursery,
    *,
    deadline_seconds: float = DEADLINE_SECONDS,
    raw: bool = True,
    expected: str | None = None,
    say_raw: str = SAY_RAW,
    pinning: Pinning = USUAL,
    slots: ReaderSlots | None = None,
    credentials: Credentials = NO_CREDENTIALS,
    told: set[str] | None = None,
) -> RetryingSource:
    """A source for `location` that connects when it is first needed.

    `nursery` runs the tasks of the connections; it must outlive the source. `deadline_seconds`: how long a read may
    take, retries included. `slots`: see `RetryingSource`. `raw`: treat the backing as raw, whatever its bytes look
    like. Otherwise it is probed: qcow2 and QED images are read as such, other known formats and compressed files are
    refused, and everything else is raw. `expected`: the format that the user has named ("raw", "qcow2" or "qed"); if
    the probe finds another one, connecting raises SourceError. `say_raw`: how the user can say that the backing is
    raw, for the message of a refusal. `pinning`: what counts as another version. `credentials`: which credentials go
    to which server. `told`: the warnings about the image that were logged, which are not repeated; sources that take
    turns at one place share it.

    The policy is consulted twice: first for the location (`allowed`), then for the file, socket or address to which its
    path or host name has been resolved, before that is used.
    """

    samples, told = Samples(), set() if told is None else told
    shown = credentials.entry_for(location)

    async def connect() -> Source:
        source = await open_source()
        if raw:
            return source
        try:
            return await _in_its_format(source, location, expected, say_raw, told)
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

    return RetryingSource(
        location, connect, deadline_seconds=deadline_seconds, slots=slots, pinning=pinning, samples=samples
    )


async def allowed(location: Location, policy: Policy) -> None:
    """Raise Refused if the policy does not allow this location. Symbolic links in a local path are followed.

    Following them may block on a dead file server, or on a mount of our own, so it is done in a thread. Raises
    SourceUnreachable if that takes longer than LOCAL_PATH_SECONDS.
    """
    path = next(filter(None, (location.path, *location.tls_files)), None)
    if path is None:
        policy.check_location(location)
        return
    with trio.move_on_after(LOCAL_PATH_SECONDS):
        await in_thread(path, lambda: policy.check_location(location))
        return
    raise SourceUnreachable(
        f"backing {location}: looking up its path takes longer than {LOCAL_PATH_SECONDS:g} s", reason=Reason.TIMEOUT
    )


async def _in_its_format(
    source: Source, location: Location, expected: str | None, say_raw: str, told: set[str]
) -> Source:
    """Probe the format of the backing, and wrap the source in a reader for that format.

    QED does not store the name of a format, only the bit NO_PROBE, "the backing is raw". Without the bit, the format
    has to be probed, which is a classic security hole: a guest that can write to its raw disk puts a qcow2 header
    there, and the next reader opens the file that the header names. Two measures close it. `create_overlay` and QEMU
    set the bit for every backing that is declared raw, and then nothing is probed. And the backing and data files of a
    qcow2 or QED image are never opened, so a forged header gives access to nothing but the file that the guest wrote
    itself.
    """
    found = await _probed(source)
    if expected is not None and found.name != expected:
        like = "a raw disk" if found is RAW else found.name
        advice = found.way_out or f"say --backing-format {found.name}"
        raise SourceError(f"{_place(source, location)} is not a {expected} image: it looks like {like}; {advice}")
    if found is QCOW2:
        return await Qcow2Source.open(source, str(location))
    if found is QED:
        return await QedSource.open(source, str(location), told)
    if found is not RAW:
        raise SourceError(
            f"{_place(source, location)} looks like {found.name} (its {found.at} bytes), not like a disk;"
            f" {found.way_out}. If it is a raw disk all the same, say so: {say_raw}"
        )
    return source


def _place(source: Source, location: Location) -> str:
    """How messages name the backing: as the user does, and by the URL that it was redirected to."""
    final = source.identity.name if location.kind == "http" else ""
    return f"backing {location}" + (f" (redirected to {final})" if final not in ("", str(location)) else "")


async def _probed(source: Source) -> Found:
    size = source.identity.size
    if not size:
        return RAW
    media_type = source.media_type if isinstance(source, HttpSource) else ""
    head = source.opening if isinstance(source, HttpSource) else b""
    if len(head) < min(HEAD_BYTES, size):
        head = await _bytes_at(source, 0, min(HEAD_BYTES, size))
    found = probe(head, b"", size=size, media_type=media_type)
    if found is not RAW:
        return found
    tail_size = min(TAIL_BYTES, size)
    tail = await _bytes_at(source, size - tail_size, tail_size)
    return probe(head, tail, size=size, media_type=media_type)


async def _bytes_at(source: Source, pos: int, size: int) -> bytes:
    buffer = bytearray(size)
    await source.read(pos, memoryview(buffer))
    return bytes(buffer)
