"""Access of commands to the file of an overlay, without its image.

Owns the message for a path that is not an overlay but an image of a mount. Must not know how an image is read, nor
import what does: that is most of the start of a command.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from qedfs.errors import BadOverlay
from qedfs.host.procfs import filesystem_type
from qedfs.overlay.storage import FileStorage


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
        from qedfs.cli.mount_table import FILESYSTEM  # here, as this is rare

        if filesystem_type(path) != FILESYSTEM:
            raise
        if os.path.isdir(path):
            raise BadOverlay(f"{path}: is a mount, not an overlay; qedfs list shows which overlays it serves") from exc
        raise BadOverlay(
            f"{path}: is the image in a mount, not its overlay; name the overlay: qedfs list shows where it is"
        ) from exc


@contextlib.contextmanager
def _closing(storage: FileStorage, path: str) -> Iterator[FileStorage]:
    try:
        yield storage
    except BadOverlay as exc:
        text = str(exc)
        raise exc if text.startswith(path) else BadOverlay(f"{path}: {text}") from exc
    finally:
        storage.close()
