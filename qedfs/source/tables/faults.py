"""What is wrong with an image, as a format's module finds it, and as the error that names the image.

Owns the translation. Must not know formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qedfs.errors import SourceError


class Fault(Exception):
    """The image cannot be served. The message says why, without the name of the image."""


@contextmanager
def faults(name: str) -> Iterator[None]:
    """Turn a fault of the image into a SourceError that names the image."""
    try:
        yield
    except Fault as exc:
        raise SourceError(f"backing {name} {exc}") from exc
