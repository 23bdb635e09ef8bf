"""What a mount has to say after its socket is closed: that the last flush of an overlay has failed.

Owns the file that holds it, in the mount's runtime folder. The server writes it while it ends, `qedfs umount` reads it
once the server has ended; a process learns the exit code of its own children only.
"""

from __future__ import annotations

import contextlib
import json

from qedfs.errors import QedfsError
from qedfs.runtime import mount_folder, private_folder

_NAME = "failure"


def leave(mountpoint: str, error: QedfsError) -> None:
    """Tell whoever waits for the end of the mount why it did not end well. Without a place for it, the log has it."""
    with contextlib.suppress(OSError):
        words = {"error": str(error), "exit_code": error.exit_code}
        (private_folder(mount_folder(mountpoint)) / _NAME).write_text(json.dumps(words))


def take(mountpoint: str) -> tuple[str, int] | None:
    """(message, exit code) of what went wrong at the end, once; None if nothing did."""
    path = mount_folder(mountpoint) / _NAME
    try:
        words = json.loads(path.read_bytes())
        path.unlink()
        return str(words["error"]), int(words["exit_code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
