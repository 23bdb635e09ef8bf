"""The kernel's limit on how long a request of a FUSE mount may remain unanswered (Linux 6.15).

Owns how the limit is read, and the margin below it. Must not know what waits: whoever sets a deadline asks here. If a
single answer is later than the limit, the kernel aborts the connection of the whole mount, with all its images. So the
limit bounds every wait for a source or an activation, whatever the user has asked for.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("/proc/sys/fs/fuse")
LEAST_LIMIT_SECONDS = 15  # FUSE_TIMEOUT_TIMER_FREQ in fs/fuse: the kernel raises a shorter limit to this
TAKEOVER_SECONDS = 10.0  # for another server to start and to take the mount over: the longest seen is 7 s
MARGIN_SECONDS = 5.0  # for the answer itself, on a machine that is busy


def kernel_limit(folder: Path = FOLDER) -> int | None:
    """Seconds after which the kernel aborts the connection of a mount; None if it never does.

    A server may ask for a limit of its own when it mounts; we do not. Then the default counts, up to the maximum.
    """
    limits = [limit for name in ("default_request_timeout", "max_request_timeout") if (limit := _read(folder / name))]
    return max(LEAST_LIMIT_SECONDS, min(limits)) if limits else None


def most_wait_seconds(folder: Path = FOLDER) -> float:
    """How long a request may wait at most, for a source or an activation; infinite without a limit of the kernel."""
    limit = kernel_limit(folder)
    return float("inf") if limit is None else limit - MARGIN_SECONDS


def remark_on_limit(longest_seconds: float, folder: Path = FOLDER) -> str:
    """What to tell a user who wants requests to wait up to `longest_seconds`; "" if they can."""
    limit = kernel_limit(folder)
    if limit is None or longest_seconds <= limit - MARGIN_SECONDS:
        return ""
    return (
        f"the kernel ends a mount that does not answer a request within {limit} s (fs.fuse.max_request_timeout,"
        " fs.fuse.default_request_timeout); so reads wait for a source, and writes for an activation, for"
        f" {limit - MARGIN_SECONDS:g} s at most"
    )


def remark_on_watchdog(silence_seconds: float, folder: Path = FOLDER) -> str:
    """What to tell a user whose server is replaced once it has hung for so long; "" if that is early enough."""
    limit = kernel_limit(folder)
    if limit is None or silence_seconds <= limit - TAKEOVER_SECONDS:
        return ""
    return (
        f"the kernel ends a mount that does not answer a request within {limit} s (fs.fuse.max_request_timeout,"
        f" fs.fuse.default_request_timeout), but a server that hangs is replaced after {silence_seconds:g} s:"
        " set WatchdogSec= of the unit lower, or the limit higher"
    )


def _read(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0  # an older kernel, or a sandbox that hides it
