"""The exit report: the error that a mount ended with, left in a file for `qedfs umount`.

Owns that file, which is in the mount's runtime folder. Must not know what makes a mount fail.

A process learns the exit code of its own children only, and the control socket is closed before the overlays are. So
the server leaves its error in the file, and `qedfs umount` reads it once the server has ended. While the server lives,
the file already says that the server was killed, because a killed server can no longer write that.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

from qedfs.errors import QedfsError
from qedfs.host.runtime import EXIT_REPORT_NAME, RuntimeFolder, mount_folder, mount_places

MOST_BYTES = 1 << 16
# That mount reads the session journal, which has the uncommitted entries.
_MENDED = "mount them with qedfs once more before anything else opens them"


class ExitReport(NamedTuple):
    """What went wrong at the end of a mount."""

    error: str
    exit_code: int
    killed: bool = False  # the server has ended before it could write a report of its own


def assume_killed(mountpoint: str) -> None:
    """Report that the server was killed, until `write` or `discard` replaces that."""
    text = f"{mountpoint}: its server has ended before it had closed the overlays; {_MENDED}"
    _write(mountpoint, ExitReport(text, QedfsError.exit_code, killed=True))


def write(mountpoint: str, error: QedfsError) -> None:
    """Report the error that the mount ended with."""
    _write(mountpoint, ExitReport(str(error), error.exit_code))


def _write(mountpoint: str, report: ExitReport) -> None:
    """Write the report. Errors are ignored, because the log has it, too."""
    with contextlib.suppress(OSError, QedfsError):
        (mount_folder(mountpoint) / EXIT_REPORT_NAME).write_text(json.dumps(report._asdict()))


def discard(mountpoint: str) -> None:
    """Remove the report, if there is one."""
    read_once(mountpoint)


def read_once(mountpoint: str, places: Sequence[RuntimeFolder] = ()) -> ExitReport | None:
    """Read the report and remove it; None if the mount ended without an error, or the report was read before.

    `places`: the runtime folders that the mount may have used, determined while it was mounted. Default: determine them
    now.
    """
    for place in places or mount_places(mountpoint):
        try:
            values = json.loads(_content(place))
            return ExitReport(str(values["error"]), int(values["exit_code"]), bool(values.get("killed")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return None


def _content(place: RuntimeFolder) -> bytes:
    """The content of the file in this folder, which is another user's if root asks; the file is removed."""
    with place.opened() as folder:
        fd = os.open(EXIT_REPORT_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with open(fd, "rb") as file:
            content = file.read(MOST_BYTES)
        os.unlink(EXIT_REPORT_NAME, dir_fd=folder)
    return content
