"""Overlay files that a command looks into without a mount."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

from qedfs.errors import BadOverlay
from qedfs.overlay.overlay import Overlay, open_overlay
from qedfs.overlay.storage import FileStorage


@contextlib.asynccontextmanager
async def peeked(path: str) -> AsyncIterator[Overlay]:
    """An overlay opened to be looked at, without locks: it may be mounted, or open in QEMU, at the same time.

    The order in which tables are written makes what we see sound, if perhaps of a moment ago.
    """
    overlay = await open_overlay(path, writable=False, locked=False)
    try:
        yield overlay
    finally:
        overlay.storage.close()


@contextlib.contextmanager
def locked_file(path: str, *, writable: bool) -> Iterator[FileStorage]:
    """An overlay file that nobody else has open for writing. Errors of the block that know no path are given one."""
    storage = FileStorage.open(path, writable=writable)
    try:
        yield storage
    except BadOverlay as exc:
        text = str(exc)
        raise exc if text.startswith(path) else BadOverlay(f"{path}: {text}") from exc
    finally:
        storage.close()
