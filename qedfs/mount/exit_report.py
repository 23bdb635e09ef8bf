"""What a mount has to say after its socket is closed: that it could not make everything durable.

Owns the file that holds it, in the mount's runtime folder. It is there while the server lives, and goes at a good end;
`qedfs umount` reads it once the server has ended. (A process learns the exit code of its own children only.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence

from qedfs.errors import QedfsError
from qedfs.host.runtime import EXIT_REPORT_NAME, RuntimeFolder, mount_folder, mount_places

MOST_BYTES = 1 << 16
# That is where a session journal is read, and where entries that were not published are.
_MENDED = "mount them with qedfs once more before anything else opens them"


@dataclasses.dataclass(frozen=True, slots=True)
class ExitReport:
    """What went wrong at the end of a mount."""

    error: str
    exit_code: int
    killed: bool = False  # the server had no time for words of its own


def begin(mountpoint: str) -> None:
    """The mount serves. These words hold until others take their place: a server that is killed has no time for any."""
    text = f"{mountpoint}: its server has ended before it had closed the overlays; {_MENDED}"
    _write(mountpoint, ExitReport(text, QedfsError.exit_code, killed=True))


def leave(mountpoint: str, error: QedfsError) -> None:
    """Tell whoever waits for the end of the mount why it did not end well."""
    _write(mountpoint, ExitReport(str(error), error.exit_code))


def _write(mountpoint: str, words: ExitReport) -> None:
    """Without a place for it, the log has it."""
    with contextlib.suppress(OSError, QedfsError):
        (mount_folder(mountpoint) / EXIT_REPORT_NAME).write_text(json.dumps(dataclasses.asdict(words)))


def take(mountpoint: str, places: Sequence[RuntimeFolder] = ()) -> ExitReport | None:
    """What went wrong at the end, once; None if nothing did.

    `places`: those where the mount can have left it, from when it still stood; without them, where it can have by now.
    """
    for place in places or mount_places(mountpoint):
        try:
            words = json.loads(_taken(place))
            return ExitReport(str(words["error"]), int(words["exit_code"]), bool(words.get("killed")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return None


def _taken(place: RuntimeFolder) -> bytes:
    """The content of the file in this folder, which is another user's if root asks; the file is removed."""
    with place.opened() as folder:
        fd = os.open(EXIT_REPORT_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with open(fd, "rb") as file:
            words = file.read(MOST_BYTES)
        os.unlink(EXIT_REPORT_NAME, dir_fd=folder)
    return words
