"""`qedfs activate`: ends the standby of images.

Owns the options, and that without IMAGE only those images are activated that are served. The server activates an image
(`mount/cut_over.py`). Must not contact a source.
"""

from __future__ import annotations

import click

from qedfs.cli.completion import images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import PLACE
from qedfs.cli.served_images import check_served, fetch, stem
from qedfs.cli.takeovers import lasting_client
from qedfs.errors import UsageError


@click.command(cls=GivenOnce, short_help="End the standby: keep what is read from now on.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("image", required=False, shell_complete=images)
@click.option("--dry-run", is_flag=True, help="Only find out whether it would succeed now. Nothing is changed.")
@click.option(
    "--undo",
    is_flag=True,
    help="Put it back in standby, and drop what it has got since: for a machine that goes on at its source.",
)
def activate(mountpoint: str, image: str | None, dry_run: bool, undo: bool) -> None:
    """Activate IMAGE, or all images, of the mount at MOUNTPOINT: nobody changes the source any more.

    The image gets a new connection to its source, whose size is compared. What was read before is forgotten, also by
    the kernel. When the command returns, reads show the source as it is now, writes are taken, what is fetched is kept,
    and the stream runs. An active image stays as it is.

    Takes less than two seconds, whatever the source and the overlay's disk do. If it fails, the image is still in
    standby: exit code 4 if the source is not there or does not deliver, 5 if it has another size, 1 if the activation
    cannot be recorded.

    With --undo, which fails if a guest has written to the image since, or if the image is complete. If nobody knows
    whether an activation has succeeded, --undo leads to standby in any case. If the overlay's disk has not recorded
    that within 30 seconds, the exit code is 7; it goes on, and the next --undo waits for it.
    """
    if dry_run and undo:
        raise UsageError("--dry-run tries an activation; omit it or --undo")
    with lasting_client(mountpoint) as client:
        chosen = fetch(client, image, mountpoint)
        for found in chosen if image is not None else [found for found in chosen if found["served"]]:
            check_served(found)
            if dry_run:
                client.execute("x-qedfs-ready", device=found["name"])
            else:
                client.execute("blockdev-set-active", **{"node-name": stem(found["name"]), "active": not undo})
