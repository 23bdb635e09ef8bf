"""How one image gets sources of its own for its backing, under the rules of its mount.

Owns the interface; `mount/own_backing.py` implements it, because an image must not know the other images of its mount.
"""

from __future__ import annotations

from typing import Protocol

from qedfs.fetch.queue import FetchQueue
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource


class OwnBacking(Protocol):
    """The backing of one image."""

    @property
    def policy(self) -> Policy:
        """Which files the mount may open."""
        ...

    @property
    def shared(self) -> bool:
        """Whether another image of the mount has the same source."""
        ...

    async def linked(self) -> bool:
        """Whether another image of the mount has the same file as its source, also under another name of that file."""
        ...

    async def fetch(self) -> FetchQueue:
        """A new queue with a new source for the backing, not connected yet. Raises QedfsError, or OSError (EMFILE)."""
        ...

    def fetch_from(self, remote: RetryingSource) -> FetchQueue:
        """A new queue with this source."""
        ...

    async def release(self, remote: RetryingSource) -> None:
        """Close a source that the image does not use any more."""
        ...
