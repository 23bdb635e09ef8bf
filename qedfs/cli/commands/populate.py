"""`qedfs populate`: fills what an image lacks from another copy of its source.

Owns the options, the wait for the end, and that an interrupted command cancels the work. The server opens the copy and
takes from it what is missing (`jobs/populate.py`). Must not open the copy.
"""

from __future__ import annotations

import os
import time
from typing import Any

import click

from qedfs.cli.backing_argument import location_of
from qedfs.cli.completion import files, images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import PLACE
from qedfs.cli.served_images import Image, check_served, connect, fetch
from qedfs.cli.takeovers import is_between_servers
from qedfs.cli.ui.output import print_json, remark
from qedfs.control.qmp.client import Client, Gone, error_of
from qedfs.errors import QedfsError
from qedfs.units import format_size

POLL_SECONDS = 0.2
REMARK_SECONDS = 10.0


@click.command(cls=GivenOnce, short_help="Fill an image from another copy of its source.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("image", shell_complete=images)
@click.option(
    "--from",
    "place",
    required=True,
    metavar="FILE|URL",
    shell_complete=files,
    help="The copy: a disk with the same content.",
)
@click.option(
    "--backing-format",
    type=click.Choice(["raw", "qcow2", "qed"]),
    help="Format of the copy. Default: found out. With raw, its content is not looked at.",
)
@click.option("--force", is_flag=True, help="Do not compare blocks that were fetched with those of the copy.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress and no result, only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def populate(
    mountpoint: str,
    image: str,
    place: str,
    backing_format: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fill all that IMAGE lacks from another copy of its source, such as a backup, because the source is gone.

    Only what is still missing is taken from the copy, never what was written or discarded. Before that, its size is
    compared, and blocks that were fetched from the source. Meanwhile, reads that the source does not answer are
    answered from the copy. At the end the image is complete and needs no source. Ctrl-C ends it, and what was populated
    stays.

    The process of the mount opens the copy, so its user must be able to read FILE.
    """
    location = location_of(place, os.getcwd(), option="--from")
    # What the user typed, as it may hold a login; but a path must not depend on the folder of the server.
    copy = os.path.abspath(place) if location.kind == "file" else place
    began = time.monotonic()
    with connect(mountpoint) as client:
        found = fetch(client, image, mountpoint)[0]
        check_served(found)
        options = {} if backing_format is None else {"format": backing_format}
        done: dict[str, Any] | None = None
        if found["state"] != "complete":
            client.execute("x-qedfs-populate", device=found["name"], force=force, **{"from": copy}, **options)
            try:
                found = _watch(client, found["name"], mountpoint, began, quiet=quiet or as_json)
            except Gone as exc:
                if not is_between_servers(mountpoint):
                    raise
                raise QedfsError(
                    f"{found['name']}: another server has taken the mount over, and does not go on with this; what was"
                    " populated stays, and the same command does the rest"
                ) from exc
            except BaseException:
                client.execute("x-qedfs-populate-cancel", device=found["name"])
                raise
            done = found["populate"]
    source, taken = (str(location), 0) if done is None else (done["from"], done["done"])
    if as_json:
        shown = {"mountpoint": os.path.abspath(mountpoint), "image": found["name"], "from": source}
        print_json({**shown, "populated": taken, "complete": found["populated"] == found["total"]})
    elif not quiet and done is None:
        click.echo(f"{found['name']}: was complete before; nothing is taken from {source}")
    elif not quiet:
        click.echo(f"{found['name']}: {format_size(taken)} from {source}; it is complete")


def _watch(client: Client, name: str, mountpoint: str, began: float, *, quiet: bool) -> Image:
    """Wait until it has ended. Returns the image. Raises the error with which it has failed."""
    said = began
    while True:
        image = fetch(client, name, mountpoint)[0]
        state = image["populate"]
        if state is None or state["state"] == "complete":
            return image
        if state["state"] == "failed":
            raise error_of(state["exit_code"], state["error"])
        if state["state"] == "cancelled":
            raise QedfsError(f"{name}: was cancelled by another command; {format_size(state['done'])} stay")
        if not quiet and time.monotonic() - said >= REMARK_SECONDS:
            said = time.monotonic()
            remark(f"{name}: {format_size(image['populated'] or 0)} of {format_size(image['total'] or 0)} local")
        time.sleep(POLL_SECONDS)
