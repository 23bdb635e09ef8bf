"""What a guest does with an overlay under test: reads, and writes that need nothing of a source."""

from __future__ import annotations

from qedfs.format.tables import ZERO
from qedfs.overlay.overlay import Overlay


async def no_fill(cluster: int) -> bytes:
    raise AssertionError(f"cluster {cluster} was asked for")


async def read(overlay: Overlay, pos: int, size: int) -> bytes:
    """Data runs as they are, everything else as zeros."""
    content = bytearray()
    for run in await overlay.map(pos, size):
        part = bytearray(run.size)
        if run.offset > ZERO:
            await overlay.read_data(run.offset, memoryview(part))
        content += part
    return bytes(content)
