"""`qedfs resize`: another size for an image, in an overlay file or in a mount.

Owns the meaning of SIZE, the choice between a file and a mount, and what the user is told before the change. Must not
know tables (`overlay/resize.py`), nor the rule about larger backings (`image/growth.py`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click
import trio

from qedfs.cli.asked_source import Asking, ask
from qedfs.cli.completion import images, mountpoints
from qedfs.cli.credentials_option import credentials as read
from qedfs.cli.credentials_option import credentials_option
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.locked_file import image_explained
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.overlay_files import run_changing
from qedfs.cli.served_images import check_served, fetch
from qedfs.cli.takeovers import lasting_client
from qedfs.cli.ui.output import print_json, remark
from qedfs.errors import InStandby, UsageError
from qedfs.format.record import digest
from qedfs.image.growth import check_backing
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.source.url import parse_location
from qedfs.units import format_size, parse_size

if TYPE_CHECKING:
    from qedfs.source.retrying import RetryingSource


@click.command(cls=GivenOnce, short_help="Change the size of an image.")
@click.argument("overlay", type=PLACE, metavar="OVERLAY|MOUNTPOINT", shell_complete=mountpoints)
@click.argument("size", nargs=-1, required=True, metavar="[IMAGE] SIZE", shell_complete=images)
@click.option("--shrink", is_flag=True, help="Allow a smaller size, if only zeros and missing parts are cut off.")
@click.option("--allow-backing", multiple=True, metavar="PREFIX", help="As for mount: where the backing may be.")
@click.option(
    "--source-timeout", type=DURATION, default="10s", show_default=True, help="How long to try to reach the backing."
)
@credentials_option
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the sizes as JSON.")
def resize(
    overlay: str,
    size: tuple[str, ...],
    shrink: bool,
    allow_backing: tuple[str, ...],
    source_timeout: float,
    credentials: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Give the image of OVERLAY, which is not mounted, or IMAGE of the mount at MOUNTPOINT another SIZE.

    SIZE is the new size, like 20G, or how much is added, like +10G; a multiple of 512 bytes. What is new reads as
    zeros. An image over a backing that is larger than the image does not grow, as it would show what was cut off; to
    find that out, the backing may be asked for its size.

    +10G counts from the size of the moment: a command that was killed may have done it, and the same again would add
    twice. So it first tells the size that it asks for, and to repeat it with that size is safe.

    A mounted image only grows, while it is read, written and streamed. Its users have to look at its size again: a loop
    device with losetup -c, QEMU with block_resize.

    With --shrink, an OVERLAY may get smaller. Nothing is cut off but zeros, and parts that the overlay does not have
    yet; discard the rest first.
    """
    image: str | None = None
    if len(size) == 1:
        asking = Asking(allow_backing, read(credentials), source_timeout)
        before, made = run_changing(_resize_file, overlay, size[0], shrink, asking, quiet)
    elif len(size) == 2:
        if shrink:
            raise UsageError("--shrink is for an overlay that is not mounted")
        image, overlay, before, made = _resize_mounted(overlay, *size, quiet=quiet)
    else:
        raise UsageError("usage: qedfs resize OVERLAY SIZE, or qedfs resize MOUNTPOINT IMAGE SIZE")
    if as_json:
        print_json({"overlay": os.path.abspath(overlay), "image": image, "size": made, "size_before": before})
    elif not quiet:
        click.echo(f"{image or overlay}: {format_size(made)} ({made} bytes), before {format_size(before)}")


def target_size(text: str, present: int) -> int:
    """The size in bytes that the user means. Raises UsageError."""
    sign = text[:1] if text[:1] in ("+", "-") else ""
    size = parse_size(text.removeprefix(sign))
    return {"": size, "+": present + size, "-": present - size}[sign]


def _tell_target(name: str, text: str, size: int, *, quiet: bool) -> None:
    """Tell the size that a relative one means, before anything changes: a command that is killed cannot tell it."""
    if text[:1] in ("+", "-") and not quiet:
        remark(f"{name}: {text} asks for {size} bytes; if this is broken off, repeat it with that size")


def _resize_mounted(mountpoint: str, name: str, text: str, *, quiet: bool) -> tuple[str, str, int, int]:
    """Returns the image, its overlay, the size before, and the size."""
    with lasting_client(mountpoint) as client:
        found: dict[str, Any] = fetch(client, name, mountpoint)[0]
        check_served(found)
        size = target_size(text, found["size"])
        _tell_target(found["name"], text, size, quiet=quiet)
        client.execute("block_resize", device=found["name"], size=size)
    return found["name"], found["overlay"], found["size"], size


async def _resize_file(path: str, text: str, shrink: bool, asking: Asking, quiet: bool) -> tuple[int, int]:
    """Returns the size before, and the size."""
    with image_explained(path):
        overlay = await open_overlay(path, writable=True)
    try:
        before = overlay.image_size
        size = target_size(text, before)
        if overlay.backing is not None and overlay.record.standby.waits:
            raise InStandby(f"{path}: is in standby, so its size is that of its source")
        if size < before and not shrink:
            raise UsageError(f"{path}: has {before} bytes, and {size} are less; --shrink cuts off zeros at the end")
        try:
            if size > before:
                await _check_backing(path, overlay, asking)
                _tell_target(path, text, size, quiet=quiet)
                await overlay.grow(size)
            elif shrink:
                _tell_target(path, text, size, quiet=quiet)
                await overlay.shrink(size)
        except UsageError as exc:
            raise UsageError(f"{path}: {str(exc).removeprefix(f'{path}: ')}") from exc
        return before, size
    finally:
        with trio.CancelScope(shield=True):
            await overlay.close()


async def _check_backing(path: str, overlay: Overlay, asking: Asking) -> None:
    """Raise UsageError if the backing is larger than the image, which would show more of it."""
    if overlay.backing is None:
        return
    pin = overlay.record.pin
    if pin is not None and pin.backing == digest(overlay.backing):
        check_backing(path, overlay.image_size, pin.size)
        return
    location = parse_location(overlay.backing, relative_to=_folder(path))

    async def size_of(remote: RetryingSource, _: trio.Nursery) -> int:
        return (await remote.connect()).size

    size = await ask(location, asking, size_of, raw=not overlay.probes_backing)
    check_backing(path, overlay.image_size, size)


def _folder(path: str) -> str:
    return os.path.dirname(os.path.realpath(path))
