"""The interface of another copy of an image's source, which answers while the source does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Rescue(Protocol):
    """A copy that was compared with the source's version."""

    async def read(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each view with the bytes at its position, and with zeros past the end. Raises a QedfsError."""
        ...
