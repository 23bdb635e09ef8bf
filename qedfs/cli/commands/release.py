"""`qedfs release`: a complete image leaves a mount, and its overlay is free."""

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
from qedfs.cli.ui.output import print_json
from qedfs.control.qmp.client import Client
from qedfs.errors import NotMounted, QedfsError, TimedOut, UsageError

POLL_SECONDS = 0.2
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
    can open that itself (driver qed). Until then it is served as before. Without --wait, the command returns at once,
    and the order stays; also after --timeout. Another server of the same mount carries it out as well.

    An image that is not complete is refused: only the mount shows all of it. So is the only image of a mount of a
    single overlay, which qedfs umount gives back. The next mount of the folder serves it again, and so does --undo: a
    server that has the overlay open itself is an error then (exit code 8).
    """
    if undo and wait:
        raise UsageError("--undo serves the image, so that there is nothing to --wait for")
    if not wait and timeout is not None:
        raise UsageError("--timeout is the longest time to --wait; add that, too")
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    with connect(mountpoint) as client:
        found, done = _found(client, image, mountpoint)
        if not done or undo:
            if found is not None and not undo:
                check_served(found)
            name = image if found is None else found["name"]
            done = client.execute("x-qedfs-release", device=stem(name), undo=undo or None)["released"]
    if wait and not done:
        _wait(mountpoint, image, deadline)
        done = True
    opens = 0 if found is None or done else found["opens"]
    if as_json:
        shown = stem(image) + ".raw"
        print_json({"mountpoint": os.path.abspath(mountpoint), "image": shown, "released": done, "opens": opens})
    elif not quiet:
        click.echo(_result(stem(image) + ".raw", opens, done=done, undo=undo))


def _found(client: Client, image: str, mountpoint: str) -> tuple[Image | None, bool]:
    """The status of the image, None if it is not there; and whether it was released."""
    status: dict[str, Any] = client.execute("x-qedfs-status")
    if stem(image) + ".raw" in status["released"]:
        return None, True
    return named(status["images"], image, mountpoint)[0], False


def _wait(mountpoint: str, image: str, deadline: float) -> None:
    """Return when the image was released. Raises QedfsError if the order has ended otherwise."""
    lost = math.inf  # when we give up on a mount whose server does not answer
    while True:
        try:
            with connect(mountpoint, deadline=deadline) as client:
                lost = math.inf
                while True:
                    found, done = _found(client, image, mountpoint)
                    if done or found is None:
                        return
                    if not found["releasing"]:
                        why = trouble(found) or "the order was taken back, or the log of the mount says why"
                        raise QedfsError(f"{found['name']}: is not released: {why}")
                    if time.monotonic() >= deadline:
                        users = f"{found['opens']} have it open" if found["opens"] else "a job is at work"
                        raise TimedOut(f"{found['name']}: is not released yet, as {users}; the order stays")
                    time.sleep(POLL_SECONDS)
        except NotMounted:
            # Another server may take the mount over, and it has the order.
            lost = min(lost, time.monotonic() + TAKEOVER_SECONDS)
            if mounted_type(mountpoint) is None or time.monotonic() > lost:
                raise
            time.sleep(POLL_SECONDS)


def _result(name: str, opens: int, *, done: bool, undo: bool) -> str:
    if undo:
        return f"{name}: is served"
    if done:
        return f"{name}: is released; its overlay is free"
    return f"{name}: is released as soon as nobody has it open; {opens} have now"
