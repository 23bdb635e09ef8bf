"""What a write in part needs of missing clusters: asked for together, since a write has one deadline.

Must not know where the bytes come from.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from qedfs.errors import QedfsError
from qedfs.overlay.storage import Buffer

# Asked for the whole content of a missing cluster; bytes behind the image's end are ignored.
Fill = Callable[[int], Awaitable[Buffer]]


async def filled(clusters: Sequence[int], fill: Fill) -> dict[int, Buffer]:
    """The content of the clusters, all asked for at once; the first QedfsError of `fill` is raised as it is."""
    if len(clusters) == 1:
        return {clusters[0]: await fill(clusters[0])}
    contents: dict[int, Buffer] = {}
    failures: list[QedfsError] = []
    async with trio.open_nursery() as nursery:

        async def ask(cluster: int) -> None:
            try:
                contents[cluster] = await fill(cluster)
            except QedfsError as exc:
                failures.append(exc)
                nursery.cancel_scope.cancel()

        for cluster in clusters:
            nursery.start_soon(ask, cluster)
    if failures:
        raise failures[0]
    return contents
