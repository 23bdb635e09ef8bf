"""`qedfs stream ...`: drives the streams of a mount.

Owns the subcommands. Most are one QMP command for each image that is meant. Must not know what the stream does with it
(`jobs/stream.py`).
"""

from __future__ import annotations

import os

import click

from qedfs.cli.completion import images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import PLACE, RATE, SIZE
from qedfs.cli.served_images import check_served, fetch, on_each, print_images
from qedfs.cli.takeovers import lasting_client
from qedfs.cli.ui.output import print_json
from qedfs.errors import UsageError
from qedfs.units import format_size


@click.group(short_help="Start, pause, limit and step streams.")
def stream() -> None:
    """Drive the streams of a mount.

    Without IMAGE, a command applies to all images of the mount.
    """


stream.command_class = GivenOnce


_mountpoint = click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
_image = click.argument("image", required=False, shell_complete=images)
_json = click.option("--json", "as_json", is_flag=True, help="Print the state of the images afterwards as JSON.")


@stream.command(short_help="Start, or restart after a failure.")
@_mountpoint
@_image
@click.option("--limit", type=RATE, metavar="SIZE", help="At most SIZE bytes per second, 0 for no limit.")
@_json
def start(mountpoint: str, image: str | None, limit: int | None, as_json: bool) -> None:
    """Start the stream of IMAGE: after --no-stream, a cancel or a failure, or to end a pause."""
    on_each(mountpoint, image, "x-qedfs-start", as_json=as_json, limit=limit)


@stream.command(short_help="Pause until resumed.")
@_mountpoint
@_image
@_json
def pause(mountpoint: str, image: str | None, as_json: bool) -> None:
    """Pause the stream of IMAGE. The overlay records this, so the stream stays paused in later mounts."""
    on_each(mountpoint, image, "x-qedfs-pause", as_json=as_json)


@stream.command(short_help="Continue after a pause.")
@_mountpoint
@_image
@_json
def resume(mountpoint: str, image: str | None, as_json: bool) -> None:
    """Resume the stream of IMAGE."""
    on_each(mountpoint, image, "x-qedfs-resume", as_json=as_json)


@stream.command(short_help="Stop for this mount.")
@_mountpoint
@_image
@_json
def cancel(mountpoint: str, image: str | None, as_json: bool) -> None:
    """Stop the stream of IMAGE until it is started again. What is local stays local."""
    on_each(mountpoint, image, "x-qedfs-cancel", as_json=as_json)


@stream.command(short_help="Limit the rate.")
@_mountpoint
@click.argument("words", nargs=-1, required=True, metavar="[IMAGE] RATE", shell_complete=images)
@click.option("--total", is_flag=True, help="Set the limit of all images together: what they fetch over the network.")
@_json
def limit(mountpoint: str, words: tuple[str, ...], total: bool, as_json: bool) -> None:
    """Stream at most RATE bytes per second and image, like 20M; 0 is no limit."""
    if len(words) > 2 or (total and len(words) > 1):
        usage = "--total MOUNTPOINT RATE" if total else "MOUNTPOINT [IMAGE] RATE"
        raise UsageError(f"usage: qedfs stream limit {usage}")
    image = words[0] if len(words) == 2 else None
    rate = RATE.convert(words[-1], None, None)
    if total:
        with lasting_client(mountpoint) as client:
            client.execute("x-qedfs-limit-total", limit=rate)
            if as_json:
                print_images(client, None, mountpoint)
        return
    on_each(mountpoint, image, "x-qedfs-limit", as_json=as_json, limit=rate)


@stream.command(short_help="Populate the next missing run.")
@_mountpoint
@_image
@click.option("--offset", type=SIZE, default=0, metavar="SIZE", help="Where in the image to start searching.")
@click.option("--json", "as_json", is_flag=True, help="Print image, pos, size and next as JSON.")
def step(mountpoint: str, image: str | None, offset: int, as_json: bool) -> None:
    """Populate the next missing run of IMAGE with one request, and report how far it got.

    For managers that control the pace: mount with --no-stream, then call step with the `next` of the previous step as
    --offset, until it is null.
    """
    with lasting_client(mountpoint) as client:
        chosen = fetch(client, image, mountpoint)
        if len(chosen) != 1:
            raise UsageError(f"{mountpoint}: has {len(chosen)} images; name the one to step")
        check_served(chosen[0])
        name = chosen[0]["name"]
        done = client.execute("x-qedfs-step", device=name, offset=offset)
    if as_json:
        print_json({"mountpoint": os.path.abspath(mountpoint), "image": name, **done})
    elif not done["size"]:
        click.echo(f"{name}: nothing is missing from {offset} on")
    else:
        following = "nothing missing after it" if done["next"] is None else f"next at {done['next']}"
        click.echo(f"{name}: {format_size(done['size'])} at {done['pos']}, {following}")
