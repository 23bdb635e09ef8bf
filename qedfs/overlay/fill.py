"""Fetches the missing clusters that a write covers in part, all at once, because a write has one deadline.

Must not know where the bytes come from.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from qedfs.errors import QedfsError
from qedfs.overlay.storage import Buffer

# Returns the whole content of a missing cluster. Bytes past the image's end are ignored.
Fill = Callable[[int], Awaitable[Buffer]]


async def filled(clusters: Sequence[int], fill: Fill) -> dict[int, Buffer]:
    """The content of the clusters, fetched concurrently. Raises the first QedfsError of `fill`, not in a group."""
    if len(clusters) == 1:
        return {clusters[0]: await fill(clusters[0])}
    contents: dict[int, Buffer] = {}
    failures: list[QedfsError] = []
    async with trio.open_nursery() as nursery:

        async def fetch(cluster: int) -> None:
            try:
                contents[cluster] = await fill(cluster)
            except QedfsError as exc:
                failures.append(exc)
                nursery.cancel_scope.cancel()

        for cluster in clusters:
            nursery.start_soon(fetch, cluster)
    if failures:
        raise failures[0]
    return contents
