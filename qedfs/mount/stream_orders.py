"""What users have ordered of streams since the mount: limits, starts and cancels, for a server that takes over.

Owns these values of the holder (`held.py`). A pause is in the overlay's record and needs nothing here. Must not know
how an order is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from qedfs.mount.held import HolderLink
from qedfs.mount.served import Served


def note(link: HolderLink, served: Served) -> None:
    """Tell the next server of the orders for one image."""
    stream = served.job
    # A stream that has failed is tried again, as after a new mount. Only a user's cancel is an order.
    image = served.image
    if link and stream is not None and image is not None and not image.complete and not image.in_standby:
        enabled = stream.enabled or stream.error is not None
        link.set(f"stream/{served.inode}", json.dumps([stream.rate_limiter.limit, enabled]))


async def restore(values: Mapping[str, str], served: Served) -> None:
    """Give the stream of an image, which does not run yet, the orders that it had. Raises QedfsError.

    In standby it stays off: what was told dates from before the image went back there.
    """
    stream = served.job
    if stream is None or (told := values.get(f"stream/{served.inode}")) is None:
        return
    limit, enabled = json.loads(told)
    stream.set_limit(limit)
    if stream.enabled and not enabled:
        stream.cancel()
    elif enabled and not stream.enabled and served.image is not None and not served.image.in_standby:
        paused = stream.paused
        stream.start()
        if paused:  # a start ends a pause
            await stream.pause()
