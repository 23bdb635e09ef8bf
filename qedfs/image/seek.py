"""Where data and holes of an image are, for lseek(2): from the map, without fetching anything.

Owns what counts as a hole: zero clusters, and missing ones that are known to read as zeros. Those are all of an image
without a backing, those past the end of the source, and those where the source has told of a hole. All others may be
data. The last cluster may end past the image's end; there, the end of the image counts as a hole. Must not fetch, nor
know FUSE.
"""

from __future__ import annotations

from qedfs.image.image import Image


async def seek(image: Image, pos: int, *, hole: bool) -> int | None:
    """The first byte at or after `pos` that is in a hole (or not in one). None at or past the end, as for ENXIO.

    Raises BadOverlay if a table is not inside the file.
    """
    if not 0 <= pos < image.size:
        return None
    overlay = image.overlay
    cluster = pos // overlay.cluster_size
    while cluster < overlay.geometry.clusters:
        # Again after each await: the stream may have found more holes, or the end.
        stop, zeros = _missing_from(image, cluster)
        cluster = await overlay.seek(cluster, stop, hole=hole, missing_is_hole=zeros)
        if cluster < stop:
            return max(pos, cluster * overlay.cluster_size)
    return image.size if hole else None


def _missing_from(image: Image, cluster: int) -> tuple[int, bool]:
    """Whether missing clusters from this one on are known to read as zeros, and up to which cluster that is so."""
    overlay = image.overlay
    clusters, entries = overlay.geometry.clusters, overlay.geometry.entries
    if image.complete or image.source is None:
        return clusters, True
    identity = None if image.version is None else image.version.identity  # in standby, nothing is known of the source
    end = clusters if identity is None else min(clusters, -(-identity.size // overlay.cluster_size))
    if cluster >= end:
        return clusters, True
    table = cluster // entries
    hole_end = image.source_holes.end_of(table)
    if hole_end is not None:
        return min(hole_end * entries, clusters), True
    return min(image.source_holes.next_from(table, -(-end // entries)) * entries, end), False
