"""Access of commands to the images of overlay files without a mount. Of the file alone: `locked_file.py`.

Owns how they open an overlay to look at it, and where Ctrl-C may interrupt one that changes it. Must not ask the server
of a mount.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar, TypeVarTuple, Unpack

import trio

from qedfs.cli.locked_file import image_explained
from qedfs.cli.served_images import stem
from qedfs.errors import BadOverlay, UsageError
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay

SUFFIX = ".qed"
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def run_changing(command: Callable[[Unpack[Ts]], Awaitable[T]], *args: *Ts) -> T:
    """Run a command that changes an overlay, and return its result. Ctrl-C interrupts it only where it awaits.

    An overlay relies on that nothing comes between two awaits. Otherwise, an interrupted move of a cluster would give
    back the place that an entry refers to already, and the close that follows would commit this entry.
    """
    return trio.run(command, *args, restrict_keyboard_interrupt_to_checkpoints=True)


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
