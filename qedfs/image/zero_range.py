"""What fallocate(2) does with a range of an image that has to read as zeros: TRIM, punched holes, zero ranges.

Owns the split into whole clusters, which become zero clusters, and parts of clusters, to which zeros are written. Must
not know fallocate's modes.
"""

from __future__ import annotations

from qedfs.image.image import Image
from qedfs.overlay.split import zero_bytes


async def make_zeros(image: Image, pos: int, size: int) -> None:
    """Make the part of a range that lies inside the image read as zeros. What was missing is not fetched any more.

    Raises what `Image.write` raises. Some of the range may read as zeros then.
    """
    if image.gate is not None:
        await image.gate.passed()
    cluster_size, clusters = image.overlay.cluster_size, image.overlay.geometry.clusters
    end = min(pos + size, image.size)
    first = -(-pos // cluster_size)
    stop = clusters if end == image.size else end // cluster_size  # the last cluster ends with the image
    if first > stop:  # inside one cluster
        await _write_zeros(image, pos, end)
        return
    await _write_zeros(image, pos, min(first * cluster_size, end))
    await _discard(image, first, stop)
    await _write_zeros(image, stop * cluster_size, end)


async def _discard(image: Image, first: int, stop: int) -> None:
    """Discard these clusters, and count those that would have been fetched apart from known holes of the source."""
    cluster_size, entries = image.overlay.cluster_size, image.overlay.geometry.entries
    while first < stop:
        table = first // entries
        hole_end = image.source_holes.end_of(table)
        end = image.source_holes.next_from(table, -(-stop // entries)) if hole_end is None else hole_end
        end = min(end * entries, stop)
        size = cluster_size * await image.overlay.discard(first, end - first)
        if hole_end is None:
            image.counters.discarded += size
        else:
            image.discarded_holes += size
        first = end


async def _write_zeros(image: Image, pos: int, end: int) -> None:
    """Write zeros inside one cluster, unless it reads as zeros."""
    cluster_size = image.overlay.cluster_size
    if pos < end and not await image.overlay.reads_as_zeros(pos // cluster_size):
        await image.write(pos, memoryview(zero_bytes(cluster_size))[: end - pos])
