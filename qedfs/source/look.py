"""A look at a backing before there is an overlay: is there a disk, in which format, and how large is it.

Owns the connection for the look, and what is learnt by it. Must not know what it is for. The user has typed the
location, so it may be a local path, and its format may be found out. A format that has been recorded is never checked
in this way, see `open.py`.
"""

from __future__ import annotations

import dataclasses

import trio

from qedfs.errors import QedfsError, SourceError
from qedfs.source.credentials import NO_CREDENTIALS, Credentials
from qedfs.source.open import remote_source
from qedfs.source.policy import Policy
from qedfs.source.qcow2 import Qcow2Source
from qedfs.source.qcow2.format import DEFLATE, ZSTD
from qedfs.source.qed import QedSource
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import Location
from qedfs.units import format_size

_COMPRESSIONS = {DEFLATE: "zlib", ZSTD: "zstd"}  # as QEMU calls them


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """What is at a location. Sizes in bytes: `size` of the disk, `stored_size` of the file that contains it.

    `format`: "raw", "qcow2" or "qed". `compression`: "zlib" or "zstd" if the format has compressed clusters; a qcow2
    image names its type of compression even if none of its clusters is compressed.
    """

    format: str
    size: int
    stored_size: int
    compression: str | None = None

    def __str__(self) -> str:
        """ "qcow2, zlib, 325 MiB, disk of 3.00 GiB", or "raw, 3.00 GiB"."""
        if self.format == "raw":
            return f"raw, {format_size(self.size)}"
        parts = (self.format, self.compression, format_size(self.stored_size), f"disk of {format_size(self.size)}")
        return ", ".join(filter(None, parts))


async def look(
    location: Location,
    *,
    backing_format: str | None = None,
    deadline_seconds: float,
    credentials: Credentials = NO_CREDENTIALS,
) -> Look:
    """Connect, find out the format unless the user has said "raw", and disconnect.

    Costs two small requests of a raw image. `backing_format`: what the user says; with "raw" no content is looked at.
    `deadline_seconds`: how long to try.

    Raises:
        SourceUnreachable: no usable answer in time.
        SourceError: there is no such file, it is empty, it is not in the format that the user names, or it is not a
            disk in a format that can be served. The message says what it looks like instead.
        Refused: the location, or a redirect, leads to a forbidden address.
    """
    local = tuple(filter(None, (location.path, *location.tls_files)))
    # A policy that allows a local file forbids everything that it does not name, so name the URL too.
    policy = Policy((*local, location.secret_url) if local else ())
    found: Look | QedfsError
    async with trio.open_nursery() as nursery:
        remote = remote_source(
            location,
            policy,
            nursery,
            deadline_seconds=deadline_seconds,
            raw=backing_format == "raw",  # if the user says raw, the first bytes do not matter
            expected=backing_format,
            say_raw="--backing-format raw",
            credentials=credentials,
        )
        try:
            found = await _seen(remote, location)
        except QedfsError as exc:
            found = exc  # raised outside of the nursery, which would wrap it in a group
        finally:
            with trio.CancelScope(shield=True):
                await remote.aclose()
            nursery.cancel_scope.cancel()
    if isinstance(found, QedfsError):
        raise found
    return found


async def _seen(remote: RetryingSource, location: Location) -> Look:
    size = (await remote.connect()).size
    source = remote.connected
    if isinstance(source, Qcow2Source):
        found = Look("qcow2", size, source.file.identity.size, _COMPRESSIONS[source.compression])
    elif isinstance(source, QedSource):
        found = Look("qed", size, source.file.identity.size)
    elif not size:
        raise SourceError(f"backing {location} is empty: it has 0 bytes; check what the server has there")
    else:
        found = Look("raw", size, size)
    if not size:
        raise SourceError(f"backing {location} is a {found.format} image of an empty disk: the disk has 0 bytes")
    return found
