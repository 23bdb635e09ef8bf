"""Opens another copy of an image's source, which the user of the mount names in a command.

Owns the checks of the named file or server. Must not know what the copy is used for. Only the user of the mount and
root reach the control socket, so naming a file or a server here allows it, as on the command line of `create`. What a
redirect or a host name leads to is checked as for any backing.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import trio

from qedfs.errors import SourceUnreachable, UsageError
from qedfs.source.credentials import Credentials
from qedfs.source.open import remote_source
from qedfs.source.path import in_thread
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import Location, parse_location

PATH_SECONDS = 5.0  # for a look at a local path, which may be on a dead file server


async def rescue_source(
    place: str,
    nursery: trio.Nursery,
    *,
    device: str,
    backing_format: str | None,
    credentials: Credentials,
    deadline_seconds: float,
) -> RetryingSource:
    """A source for a file (its absolute path) or a URL that connects when it is first read.

    `device`: the number of our own mount, as in /proc/self/mountinfo. `backing_format`: "raw", "qcow2", "qed" or None.

    Raises:
        UsageError: it is no absolute path and no URL, or a file in this very mount, which would wait for itself.
        SourceUnreachable: the file's file system does not answer.
    """
    location = parse_location(place, relative_to="/")
    if location.kind == "file" and not os.path.isabs(location.path or ""):
        raise UsageError(f"{location}: give an absolute path")
    local = tuple(filter(None, (location.path, *location.tls_files)))
    if location.kind == "file":
        await check_elsewhere(location, device)
    return remote_source(
        location,
        # A policy that allows a local file forbids everything that it does not name, so name the URL too.
        Policy((*local, location.secret_url) if local else ()),
        nursery,
        deadline_seconds=deadline_seconds,
        raw=backing_format == "raw",
        expected=backing_format,
        say_raw="--backing-format raw",
        credentials=credentials,
    )


async def check_elsewhere(location: Location, device: str) -> None:
    """Raise UsageError for a file in the mount with this `device`: its reads would wait for themselves.

    Raises SourceUnreachable if its file system does not answer.
    """
    path = location.path or ""
    with trio.move_on_after(PATH_SECONDS):
        try:
            found = await in_thread(path, _device_of(path))
        except OSError:
            return  # the source says what is wrong
        if device and found == device:
            raise UsageError(f"{path}: is in this mount; name the file that it comes from")
        return
    raise SourceUnreachable(f"{path}: its file system does not answer")


def _device_of(path: str) -> Callable[[], str]:
    def look() -> str:
        # Of the folder: a stat of an image in our own mount would wait for us.
        number = os.stat(os.path.dirname(os.path.realpath(path))).st_dev
        return f"{os.major(number)}:{os.minor(number)}"

    return look
