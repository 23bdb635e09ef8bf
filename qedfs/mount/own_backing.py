"""Gives one image of the mount sources of its own for its backing.

Implements `image/own_backing.py`. Has no logic: `source_pool.py` makes the sources, `open_images.py` knows what other
images use.
"""

from __future__ import annotations

from qedfs.fetch.queue import FetchQueue
from qedfs.image.image import Image
from qedfs.mount.open_images import OpenImages
from qedfs.mount.source_pool import SourcePool
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource


class ImageBacking:
    """An `OwnBacking`."""

    def __init__(self, image: Image, sources: SourcePool, images: OpenImages) -> None:
        self._image = image
        self._sources = sources
        self._images = images

    @property
    def policy(self) -> Policy:
        """See `OwnBacking`."""
        return self._sources.policy

    @property
    def shared(self) -> bool:
        """See `OwnBacking`."""
        return self._images.share(self._image)

    async def linked(self) -> bool:
        """See `OwnBacking`."""
        return await self._images.link(self._image)

    async def fetch(self) -> FetchQueue:
        """See `OwnBacking`."""
        return await self._sources.own_fetch_for(self._image.overlay, overlays=len(self._images))

    def fetch_from(self, remote: RetryingSource) -> FetchQueue:
        """See `OwnBacking`."""
        return self._sources.fetch_from(remote, self._image.overlay)

    async def release(self, remote: RetryingSource) -> None:
        """See `OwnBacking`."""
        await self._sources.release(remote)
