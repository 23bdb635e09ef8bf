"""`qedfs defrag`: lays the data of a mounted overlay out in the order of its image."""

from __future__ import annotations

import click

from qedfs.cli.completion import images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.image_job import JobOrder
from qedfs.cli.option_types import PLACE, RATE


@click.command(cls=GivenOnce, short_help="Lay an overlay out in the order of its image.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("image", shell_complete=images)
@click.option("--limit", type=RATE, metavar="SIZE", help="At most SIZE bytes per second, 0 for no limit.")
@click.option("--no-wait", is_flag=True, help="Return as soon as it has begun.")
@click.option("--pause", "command", flag_value="pause", help="Pause the one that runs.")
@click.option("--resume", "command", flag_value="resume", help="Let it continue.")
@click.option("--cancel", "command", flag_value="cancel", help="End it. What is in order stays so.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress and no result, only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the image's status afterwards as JSON.")
def defrag(
    mountpoint: str,
    image: str,
    limit: int | None,
    no_wait: bool,
    command: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Lay the data of IMAGE's overlay out in the order of the image, while guests use it.

    After that, reading the image from start to end reads the overlay's file from start to end. The stream must have
    ended, or be off. Needs 128 MiB of free space. With --limit and a job that runs, its limit changes. Ctrl-C ends it,
    and what is in order stays so. If another server takes the mount over, it begins anew, but not with --no-wait.
    qedfs info shows in how many pieces an overlay is.
    """
    JobOrder(
        mountpoint,
        image,
        "defrag",
        stays="what is in order stays so",
        ended="in order",
        limit=limit,
        command=command,
        no_wait=no_wait,
        quiet=quiet,
        as_json=as_json,
    ).carry_out()
