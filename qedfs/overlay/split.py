"""Splits requests and fetched buffers at cluster borders.

Owns this arithmetic. Must not know entries: the callers have looked up the places in the file. Pure: views of bytes in,
views of bytes out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from qedfs.overlay.storage import Buffer


def pieces(pos: int, view: memoryview, cluster_size: int) -> Iterator[tuple[int, int, memoryview]]:
    """Split a request at `pos` of the image at cluster borders into (cluster, start in the cluster, bytes)."""
    done = 0
    while done < len(view):
        start = (pos + done) % cluster_size
        length = min(cluster_size - start, len(view) - done)
        yield (pos + done) // cluster_size, start, view[done : done + length]
        done += length


def adopted_views(buffer: bytearray, size: int, starts: Sequence[int], cluster_size: int) -> Iterator[Buffer]:
    """The clusters that start at these positions of `buffer`, in order, as few views.

    Only the first `size` bytes of the buffer count. A last cluster that is cut off there is padded with zeros.
    """
    view = memoryview(buffer)
    first = end = -1
    for start in starts:
        if start != end:
            if end >= 0:
                yield view[first : min(end, size)]
            first = start
        end = start + cluster_size
    yield view[first : min(end, size)]
    if end > size:
        yield bytes(end - size)


def laid_out(
    places: Sequence[int], buffer: bytearray, size: int, starts: Sequence[int], cluster_size: int
) -> Iterator[tuple[int, list[Buffer]]]:
    """The writes, as (offset, buffers), that store the clusters at `starts` of `buffer` at `places` in the file.

    Clusters that are adjacent in the file are one write. `size`: as for `adopted_views`.
    """
    first = 0
    for stop in range(1, len(places) + 1):
        if stop == len(places) or places[stop] != places[stop - 1] + cluster_size:
            yield places[first], list(adopted_views(buffer, size, starts[first:stop], cluster_size))
            first = stop


@functools.cache
def zero_bytes(size: int) -> bytes:
    """`size` zeros, made once for each cluster size in use."""
    return bytes(size)


def partial_clusters(pos: int, size: int, cluster_size: int, image_size: int) -> list[int]:
    """The clusters that a request covers in part, at most two. The last cluster of the image ends with it."""
    end = pos + size
    partial = []
    if pos % cluster_size:
        partial.append(pos // cluster_size)
    if end % cluster_size and end != image_size and end // cluster_size not in partial:
        partial.append(end // cluster_size)
    return partial
