"""What is known of the bytes of an image's source: blocks that were read from it, in this session and earlier ones.

Owns where that knowledge is kept, and the comparison of another address of the source with it. Blocks that a guest has
written are not among them, as samples are taken of what a source has sent. Must not know who asks.
"""

from __future__ import annotations

from qedfs.errors import SourceChanged, SourceError
from qedfs.format.record import Pin, digest
from qedfs.image.image import Image
from qedfs.image.pin import pin_for
from qedfs.source.base import HasFile
from qedfs.source.retrying import RetryingSource
from qedfs.source.samples import Samples


def known_blocks(image: Image) -> Samples:
    """Samples of the file on the source's server."""
    source, pin, backing = image.source, image.overlay.record.pin, image.overlay.backing
    samples = Samples() if source is None else source.samples.copy()
    if pin is not None and pin.backing == digest(backing or ""):
        samples.take_over(pin.samples)
    return samples


def is_raw(image: Image) -> bool:
    """Whether the source is known to be a raw disk, so that these blocks are blocks of the disk."""
    if not image.overlay.probes_backing:
        return True
    connected = None if image.source is None else image.source.connected
    return connected is not None and not isinstance(connected, HasFile)


async def keeps_nothing(image: Image) -> bool:
    """Whether the overlay has no cluster yet, so that any version is the right one."""
    await image.overlay.count_missing()
    return image.overlay.missing == image.overlay.geometry.clusters


def _known_size(image: Image) -> int | None:
    """The size in bytes of the backing, which may not be connected; None if nothing is pinned."""
    if image.version is not None:
        return image.version.size
    pin = image.overlay.record.pin
    return pin.size if pin is not None and pin.backing == digest(image.overlay.backing or "") else None


async def compared(image: Image, place: str, remote: RetryingSource, *, force: bool) -> Pin:
    """The pin of the new source, which is the same disk. Raises SourceChanged or SourceError if nobody knows."""
    shown = await remote.connect()
    size = _known_size(image)
    if size is not None and shown.size != size:
        raise SourceChanged(f"{remote.location} has {shown.size} bytes, the backing of {image.name} has {size}")
    told = None if image.source is None else image.source.identity
    published = image.overlay.record.pin.published if image.overlay.record.pin is not None else ""
    whole = (told.digest if told is not None else None) or published
    if whole and shown.digest and whole.partition(":")[0] == shown.digest.partition(":")[0]:
        if whole != shown.digest:
            raise SourceChanged(f"{remote.location} is not the disk of {image.name}: digest was {whole}")
        force = True
    samples = known_blocks(image)
    different = await remote.difference(samples) if samples else None
    if different:
        raise SourceChanged(f"{remote.location} is not the disk that {image.name} was started from ({different})")
    if not samples and not force and not await keeps_nothing(image):
        raise SourceError(
            f"no block of the backing of {image.name} is known that {remote.location} could be compared with; --force"
            " if it is the right disk"
        )
    return pin_for(place, remote, remote.identity or shown, samples)
