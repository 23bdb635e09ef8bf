"""What is impossible in the arguments of a mount, or will surprise, as far as it shows before anything is mounted.

Owns the refusals of combinations, of a SOURCE that is no overlay, and the remarks. Must not know how a mount is served.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING

from qedfs.cli.option_types import parse_source_errors
from qedfs.errors import BadOverlay, UsageError
from qedfs.format.header import MAGIC
from qedfs.image.source_errors import EIO
from qedfs.mount.mountpoint import known_at
from qedfs.mount.request_timeout import remark_on_limit, remark_on_watchdog

if TYPE_CHECKING:
    from qedfs.cli.mount_arguments import MountArguments

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|(?:https?|nbds?)(?:\+unix)?:", re.IGNORECASE)
HEAD_BYTES = 512
SUFFIX = ".qed"


def check_options(arguments: MountArguments) -> None:
    """Raise UsageError if two options contradict each other."""
    if arguments.until_streamed and arguments.stream == "off":
        raise UsageError("--until-streamed would wait for ever under --stream off; give one of them")
    if arguments.read_only and (arguments.until_streamed or arguments.copy_on_read):
        raise UsageError("--read-only keeps nothing; omit --until-streamed and --copy-on-read")
    if arguments.standby and arguments.read_only:
        raise UsageError("--standby is recorded in the overlay, which --read-only does not allow; omit one of them")
    if arguments.standby_writes != "refuse" and arguments.read_only:
        raise UsageError(
            f"--standby-writes {arguments.standby_writes}: with --read-only, no image takes writes, nor can it be"
            " activated; omit one of them"
        )
    if arguments.profile is not None and (arguments.read_only or arguments.copy_on_read is False):
        raise UsageError("--profile fetches clusters, and nothing would be kept; omit it")


def check_source(source: str, mountpoint: str) -> None:
    """Check that SOURCE, as the user has typed it, may be an overlay or a folder of them.

    Raises:
        UsageError: it is a URL, or SOURCE and MOUNTPOINT are swapped.
        BadOverlay: it is another image.
    """
    there = os.path.lexists(source)
    if not there and _URL.match(source):
        raise UsageError(_of_url(source, mountpoint))
    if os.path.isdir(source) and _is_free(mountpoint) and os.path.isfile(mountpoint):
        raise UsageError(
            f"{mountpoint}: is not a folder; name the overlay first, then the folder to mount on: "
            f"{_command('mount', mountpoint, source)}"
        )
    if there and os.path.isfile(source):
        _check_overlay(source, mountpoint)


def remarks(arguments: MountArguments, *, held: bool) -> list[str]:
    """What the user may not have expected of a mount that is possible. `held`: another server may take it over."""
    lines = []
    rules = [name for name in ("stream_between", "stream_delay") if getattr(arguments, name) is not None]
    if arguments.stream == "off" and rules:
        options = " and ".join("--" + name.replace("_", "-") for name in rules)
        lines.append(f"--stream off: nothing streams until qedfs stream start; {options} counts from then on")
    place = arguments.mountpoint
    if _is_free(place) and not _is_same(arguments.source, place) and _hides_files(place):
        lines.append(f"{place}: is not empty; what is in it is hidden until the mount ends")
    rule = EIO if arguments.on_source_error is None else parse_source_errors(arguments.on_source_error)
    longest = float(rule.bound_seconds or "inf") if rule.wait else arguments.source_timeout
    if arguments.standby_writes == "hold":
        longest = float("inf")
    if text := remark_on_limit(longest):
        lines.append(text)
    if held and (text := _remark_on_watchdog(os.environ.get("WATCHDOG_USEC", ""))):
        lines.append(text)
    return lines


def _remark_on_watchdog(microseconds: str) -> str:
    if not microseconds.isdecimal():
        return ""
    from qedfs.mount.holder import WATCHDOG_PART  # here, as most mounts have no watchdog

    return remark_on_watchdog(WATCHDOG_PART * int(microseconds) / 1e6)


def _of_url(url: str, mountpoint: str) -> str:
    from urllib.parse import urlsplit  # here, as only this mistake needs it

    from qedfs.source.url import redact

    shown = redact(url)
    name = os.path.basename(urlsplit(shown).path).partition(".")[0] or "disk"
    overlay = name + SUFFIX
    create = _command("create", overlay, "--backing", shown)
    return (
        f"{shown}: is a URL; first create an overlay over it: {create}; then: {_command('mount', overlay, mountpoint)}"
    )


def _check_overlay(path: str, mountpoint: str) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return  # the opening of the overlay will tell
    if head.startswith(MAGIC) or len(head) < HEAD_BYTES:
        return

    from qedfs.source.probe import RAW, probe  # here, as it loads the readers of other formats, and trio

    found = probe(head, b"")
    name = os.path.basename(path)
    if found is RAW and name.endswith(SUFFIX):
        return  # an overlay that has lost its head, most likely
    what = "is not an overlay" if found is RAW else f"is not an overlay but looks like {found.name}"
    overlay = name.partition(".")[0] + SUFFIX
    if overlay == name:
        overlay = f"new-{name}"
    create = _command("create", overlay, "--backing", path)
    mount = _command("mount", overlay, mountpoint, "--allow-backing", os.path.abspath(path))
    raise BadOverlay(f"{path}: {what}; to mount a disk image, create an overlay over it: {create}; then: {mount}")


def _is_free(mountpoint: str) -> bool:
    """Whether nothing is mounted there yet. If something is, the mount fails, and its server may answer no request."""
    return known_at(mountpoint) is None


def _is_same(source: str, mountpoint: str) -> bool:
    """Whether the folder of the overlays is to be mounted on, which is refused."""
    return os.path.realpath(source) == os.path.realpath(mountpoint)


def _hides_files(mountpoint: str) -> bool:
    """Whether the folder has files that a mount hides."""
    try:
        with os.scandir(mountpoint) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _command(*words: str) -> str:
    return shlex.join(["qedfs", *words])
