"""`qedfs status`: what each image of a mount is doing."""

from __future__ import annotations

import click

from qedfs.cli.completion import mountpoints
from qedfs.cli.option_types import PLACE
from qedfs.cli.plain.status import status as show


@click.command(short_help="Show what a mount is doing.")
@click.argument("mountpoint", type=PLACE, required=False, shell_complete=mountpoints)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, a line of it each second.")
@click.option("--watch", is_flag=True, help="Keep showing it until the mount ends or Ctrl-C.")
def status(mountpoint: str | None, as_json: bool, watch: bool) -> None:
    """Show the images of the mount at MOUNTPOINT: state, how much is local, pace and remaining time.

    MOUNTPOINT may be omitted if this user has a single mount (qedfs list).

    --watch shows as many images as the terminal has lines for; complete ones are left out first.
    """
    show(mountpoint, as_json=as_json, watch=watch)
