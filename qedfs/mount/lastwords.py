"""What a mount has to say after its socket is closed: that it could not make everything durable.

Owns the file that holds it, in the mount's runtime folder. The server writes it while it ends, `qedfs umount` reads it
once the server has ended; a process learns the exit code of its own children only.
"""

from __future__ import annotations

import contextlib
import json
import os

from qedfs.errors import QedfsError
from qedfs.runtime import LAST_WORDS_NAME, Place, mount_folder, mount_places

MOST_BYTES = 1 << 16


def leave(mountpoint: str, error: QedfsError) -> None:
    """Tell whoever waits for the end of the mount why it did not end well. Without a place for it, the log has it."""
    with contextlib.suppress(OSError, QedfsError):
        words = {"error": str(error), "exit_code": error.exit_code}
        (mount_folder(mountpoint) / LAST_WORDS_NAME).write_text(json.dumps(words))


def take(mountpoint: str) -> tuple[str, int] | None:
    """(message, exit code) of what went wrong at the end, once; None if nothing did."""
    for place in mount_places(mountpoint):
        try:
            words = json.loads(_taken(place))
            return str(words["error"]), int(words["exit_code"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _taken(place: Place) -> bytes:
    """The content of the file in this folder, which is another user's if root asks; the file is removed."""
    with place.opened() as folder:
        fd = os.open(LAST_WORDS_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with open(fd, "rb") as file:
            words = file.read(MOST_BYTES)
        os.unlink(LAST_WORDS_NAME, dir_fd=folder)
    return words
