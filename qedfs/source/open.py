"""The text of a backing -> a source, under the policy of the mounting user. The one place that knows all kinds."""

from __future__ import annotations

import trio

from qedfs.errors import SourceError
from qedfs.source.base import Source
from qedfs.source.http import HttpSource
from qedfs.source.local import LocalSource
from qedfs.source.nbd import NbdSource
from qedfs.source.policy import Policy
from qedfs.source.remote import DEADLINE_SECONDS, Remote
from qedfs.source.url import Location

# First bytes of image formats that must not be taken for a raw disk (QEMU's probe would take them for what they are).
_MAGICS = {b"QFI\xfb": "qcow2", b"QED\0": "QED", b"KDMV": "VMDK", b"vhdxfile": "VHDX", b"conectix": "VHD"}


def remote_source(
    location: Location,
    policy: Policy,
    nursery: trio.Nursery,
    *,
    deadline_seconds: float = DEADLINE_SECONDS,
    raw: bool = True,
) -> Remote:
    """A source for `location` that connects when it is first needed.

    `nursery` runs the tasks of the connections; it must outlive the source. `raw`: the backing is known to be raw,
    whatever its first bytes look like; else one that looks like another format is refused.

    Raises:
        Refused: the policy does not allow this place at all. (Addresses are judged when they are connected to.)
    """
    policy.check_location(location)

    async def connect() -> Source:
        source = await open_source()
        if not raw:
            try:
                await _refuse_other_formats(source, location)
            except BaseException:
                await source.aclose()
                raise
        return source

    async def open_source() -> Source:
        if location.kind == "http":
            return await HttpSource.open(location, policy, nursery)
        if location.kind == "nbd":
            return await NbdSource.open(location, policy, nursery)
        return await LocalSource.open(location)

    return Remote(location, connect, deadline_seconds=deadline_seconds)


async def _refuse_other_formats(source: Source, location: Location) -> None:
    head = bytearray(min(8, source.identity.size))
    if head:
        await source.read(0, memoryview(head))
    for magic, name in _MAGICS.items():
        if head.startswith(magic):
            raise SourceError(
                f"backing {location} looks like a {name} image and the overlay does not say that it is raw; "
                "if it is raw, say so: qemu-img rebase -u -F raw -b BACKING OVERLAY"
            )
