"""Access of commands to overlay files without a mount."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator

import trio

from qedfs.cli.mount_table import FILESYSTEM
from qedfs.cli.served_images import stem
from qedfs.errors import BadOverlay, UsageError
from qedfs.host.procfs import filesystem_type
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.storage import FileStorage

SUFFIX = ".qed"


@contextlib.asynccontextmanager
async def peeked(path: str) -> AsyncIterator[Overlay]:
    """An overlay opened read-only without locks. It may be mounted, or open in QEMU, at the same time.

    Tables are written in an order that keeps this view consistent, though it may be slightly old. The journal of a
    killed mount is read as well; the journal of a running mount is not.
    """
    with image_explained(path):
        overlay = await open_overlay(path, writable=False, locked=False)
    try:
        yield overlay
    finally:
        overlay.close_now()


@contextlib.contextmanager
def locked_file(path: str, *, writable: bool) -> Iterator[FileStorage]:
    """An overlay file, locked against other writers. Adds the path to a BadOverlay of the block that lacks it."""
    with image_explained(path), _closing(FileStorage.open(path, writable=writable), path) as storage:
        yield storage


@contextlib.contextmanager
def image_explained(path: str) -> Iterator[None]:
    """Translate the BadOverlay of a `path` that is an image in a mount: the user has taken it for its overlay."""
    try:
        yield
    except BadOverlay as exc:
        if filesystem_type(path) != FILESYSTEM:
            raise
        if os.path.isdir(path):
            raise BadOverlay(f"{path}: is a mount, not an overlay; qedfs list shows which overlays it serves") from exc
        raise BadOverlay(
            f"{path}: is the image in a mount, not its overlay; name the overlay: qedfs list shows where it is"
        ) from exc


def stands_alone(path: str) -> bool:
    """Whether an overlay file needs no source. Other programs may have it open.

    Raises:
        BadOverlay: it has lost data, or is not an overlay.
        UsageError: as `FileStorage.open`.
    """
    return trio.run(_stands_alone, path)


async def _stands_alone(path: str) -> bool:
    async with peeked(path) as overlay:
        if overlay.backing is None:
            await overlay.count_missing()
            if overlay.damage is not None:
                raise BadOverlay(f"{path}: {overlay.damage}")
        return overlay.backing is None


def overlays_at(place: str, image: str | None) -> list[str]:
    """The overlays that a mount of this overlay or folder serves, or only that of `image`.

    Raises:
        UsageError: the folder has no such overlay.
    """
    if not os.path.isdir(place):
        return [place]
    names = sorted(name for name in os.listdir(place) if name.endswith(SUFFIX))
    found = [os.path.join(place, name) for name in names if image is None or stem(name) == stem(image)]
    if not found:
        raise UsageError(f"{place}: has no overlay" + ("" if image is None else f" for an image {image}"))
    return found


@contextlib.contextmanager
def _closing(storage: FileStorage, path: str) -> Iterator[FileStorage]:
    try:
        yield storage
    except BadOverlay as exc:
        text = str(exc)
        raise exc if text.startswith(path) else BadOverlay(f"{path}: {text}") from exc
    finally:
        storage.close()
