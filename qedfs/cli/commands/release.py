"""`qedfs release`: a complete image leaves a mount, and its overlay is free.

Owns the wait, what is said of it, and when it is in vain. The server carries the order out (`mount/release.py`). Must
not open the overlay.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

import click

from qedfs.cli.completion import images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.mount_table import mounted_type
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.served_images import Image, check_served, connect, named, stem, trouble
from qedfs.cli.takeovers import lasting_client
from qedfs.cli.ui.output import print_json, remark
from qedfs.control.qmp.client import Client
from qedfs.errors import NotMounted, QedfsError, TimedOut, UsageError
from qedfs.mount.mountpoint import is_dead

POLL_SECONDS = 0.2
AT_WORK = ("running", "waiting", "paused")  # states of a job
TAKEOVER_SECONDS = 15.0  # for the next server of the mount to answer, if this one is replaced while we wait


@click.command(cls=GivenOnce, short_help="Let a complete image leave the mount.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("image", shell_complete=images)
@click.option("--wait", is_flag=True, help="Return when its overlay is free.")
@click.option("--timeout", type=DURATION, metavar="TIME", help="Give up waiting after this time, with exit code 7.")
@click.option("--undo", is_flag=True, help="Serve it on, or again.")
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def release(
    mountpoint: str, image: str, wait: bool, timeout: float | None, undo: bool, quiet: bool, as_json: bool
) -> None:
    """Let IMAGE, which is complete, leave the mount at MOUNTPOINT, and serve the others on.

    As soon as nobody has it open, it is not there any more, everything is on the disk, and its overlay is free: QEMU
    can open that itself (driver qed). Until then it is served as before. A job of the image, such as a defrag, comes to
    its end first; one that is paused is cancelled, and what it has done stays. Without --wait, the command returns at
    once, and the order stays; also after --timeout. Another server of the same mount carries it out as well.

    An image that is not complete is refused: only the mount shows all of it. So is the only image of a mount of a
    single overlay, which qedfs umount gives back. The next mount of the folder serves it again, and so does --undo: a
    server that has the overlay open itself is an error then (exit code 8).
    """
    if undo and wait:
        raise UsageError("--undo serves the image, so that there is nothing to --wait for")
    if not wait and timeout is not None:
        raise UsageError("--timeout is the longest time to --wait; add that, too")
    if wait:
        told = _Told(quiet or as_json)
        _wait(mountpoint, image, math.inf if timeout is None else time.monotonic() + timeout, told)
        found, done = None, True
    else:
        with lasting_client(mountpoint) as client:
            found, done = _found(client, image, mountpoint)
            if undo:
                done = _order(client, image, undo=True)
            elif found is not None:
                check_served(found)
                done = _order(client, image)
    opens = 0 if found is None or done else found["opens"]
    waits = "" if found is None or done or undo else _waits_for(found)
    if as_json:
        shown = stem(image) + ".raw"
        print_json({"mountpoint": os.path.abspath(mountpoint), "image": shown, "released": done, "opens": opens})
    elif not quiet:
        click.echo(_result(stem(image) + ".raw", waits, done=done, undo=undo))


def _found(client: Client, image: str, mountpoint: str) -> tuple[Image | None, bool]:
    """The status of the image, None if it is not there; and whether it was released."""
    status: dict[str, Any] = client.execute("x-qedfs-status")
    if stem(image) + ".raw" in status["released"]:
        return None, True
    return named(status["images"], image, mountpoint)[0], False


def _order(client: Client, image: str, *, undo: bool = False) -> bool:
    """Give the order, or take it back. Returns whether the image was released by now."""
    return bool(client.execute("x-qedfs-release", device=stem(image), undo=undo or None)["released"])


class _Told:
    """Tells the user what a wait is for, whenever that changes."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self.last = ""

    def waits(self, found: Image) -> None:
        """The image is not released yet."""
        text = _waits_for(found)
        if text != self.last and not self._quiet:
            remark(f"{found['name']}: is not released yet: {text}")
        self.last = text


def _waits_for(found: Image) -> str:
    """What keeps an image that is to be released."""
    job = found.get("job")
    if found["opens"]:
        return f"{found['opens']} have it open"
    if job is not None and job["state"] in AT_WORK:
        return f"its {job['type']} is {job['state']}"
    return "it is being closed"


def _wait(mountpoint: str, image: str, deadline: float, told: _Told) -> None:
    """Give the order, and return when the image was released. Raises QedfsError if it will not be."""
    ordered = False
    lost = math.inf  # when we give up on a mount whose server does not answer
    while True:
        try:
            with connect(mountpoint, deadline=deadline) as client:
                lost = math.inf
                while not _is_released(client, image, mountpoint, ordered=ordered, told=told):
                    ordered = True
                    if time.monotonic() >= deadline:
                        raise TimedOut(f"{stem(image)}.raw: is not released yet: {told.last}; the order stays")
                    time.sleep(POLL_SECONDS)
                return
        except NotMounted:
            # Another server may take the mount over, and it has the order.
            lost = min(lost, time.monotonic() + TAKEOVER_SECONDS)
            if mounted_type(mountpoint) is None or is_dead(mountpoint) or time.monotonic() > lost:
                raise
            time.sleep(POLL_SECONDS)


def _is_released(client: Client, image: str, mountpoint: str, *, ordered: bool, told: _Told) -> bool:
    """Whether the image was released. If it was not `ordered`, that is done. Raises QedfsError if the order is over."""
    found, done = _found(client, image, mountpoint)
    if done or found is None:
        return True
    if not ordered:
        check_served(found)
        done = _order(client, image)
    elif not found["releasing"]:
        why = trouble(found) or "the order was taken back, or the log of the mount says why"
        raise QedfsError(f"{found['name']}: is not released: {why}")
    if not done:
        told.waits(found)
    return done


def _result(name: str, waits: str, *, done: bool, undo: bool) -> str:
    if undo:
        return f"{name}: is served"
    if done:
        return f"{name}: is released; its overlay is free"
    return f"{name}: is released as soon as nobody uses it: {waits}"
