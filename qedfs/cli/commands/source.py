"""`qedfs source ...`: what a mount does about the sources of its images.

Owns the options of `on-error` and `set`. Must not know how a request waits by such a rule (`image/stalls.py`), nor how
an image gets another address (`mount/source_move.py`).
"""

from __future__ import annotations

import os

import click

from qedfs.cli.backing_argument import location_of
from qedfs.cli.completion import images, mountpoints, rules
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import PLACE, parse_source_errors
from qedfs.cli.served_images import on_each
from qedfs.cli.ui.output import remark
from qedfs.errors import UsageError
from qedfs.mount.request_timeout import remark_on_limit


@click.group(short_help="Say what to do about sources.")
def source() -> None:
    """Say what a mount does about the sources of its images."""


source.command_class = GivenOnce


@source.command("on-error", short_help="Let reads fail or wait.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("words", nargs=-1, required=True, metavar="[IMAGE] eio|wait[:TIME]", shell_complete=rules)
@click.option("--json", "as_json", is_flag=True, help="Print the state of the images afterwards as JSON.")
def on_error(mountpoint: str, words: tuple[str, ...], as_json: bool) -> None:
    """Say what reads of missing parts do while the source of IMAGE is away.

    Without IMAGE, this applies to all images of the mount. eio: they fail after --source-timeout of the mount. wait:
    they wait until the source is back, with a TIME at most that long. The overlay records this, so it holds in later
    mounts, too. With eio, reads that have waited longer than --source-timeout fail at once.
    """
    if len(words) > 2:
        raise UsageError("usage: qedfs source on-error MOUNTPOINT [IMAGE] eio|wait[:TIME]")
    rule = parse_source_errors(words[-1])
    if rule.wait:
        longest = float("inf") if rule.bound_seconds is None else rule.bound_seconds
        if text := remark_on_limit(longest):
            remark(text)
    image = words[0] if len(words) == 2 else None
    bound = {} if rule.bound_seconds is None else {"bound": rule.bound_seconds}
    on_each(mountpoint, image, "x-qedfs-on-source-error", as_json=as_json, action=rule.action, **bound)


@source.command("set", short_help="Use another address of the same source.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("image", shell_complete=images)
@click.argument("url")
@click.option("--force", is_flag=True, help="Also if no fetched block is known that could be compared.")
@click.option("--json", "as_json", is_flag=True, help="Print the state of the image afterwards as JSON.")
def set_source(mountpoint: str, image: str, url: str, force: bool, as_json: bool) -> None:
    """Fetch what IMAGE lacks from URL from now on: another address, port or mirror of the same disk.

    Size, a published digest and blocks that were fetched before are compared first. If they differ, nothing changes
    (exit code 5). The overlay names URL from then on, so later mounts use it, too. Readers that wait for the old
    address get their bytes from the new one. Other images keep their source.
    """
    location = location_of(url, os.getcwd(), option="URL")
    place = os.path.abspath(url) if location.kind == "file" else url
    on_each(mountpoint, image, "x-qedfs-source-set", as_json=as_json, url=place, force=force)
