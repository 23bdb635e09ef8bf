"""`qedfs rebase`: an overlay that is not mounted names its backing at another place.

Owns the order: refuse an overlay that cannot be moved, compare, then change it. Must not know what is compared
(`image/known_blocks.py`), nor how the header is written (`overlay/session.py`). Of a mounted image,
`mount/source_move.py` does the same.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import click
import trio

from qedfs.cli.asked_source import Asking, ask
from qedfs.cli.backing_argument import location_of
from qedfs.cli.credentials_option import credentials as read
from qedfs.cli.credentials_option import credentials_option
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.locked_file import image_explained
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.overlay_files import run_changing
from qedfs.cli.ui.layout import printable
from qedfs.cli.ui.output import print_json
from qedfs.errors import InStandby, QedfsError, UsageError
from qedfs.format.record import Pin
from qedfs.image.image import Image
from qedfs.image.known_blocks import compared
from qedfs.mount.source_move import check_secrets
from qedfs.overlay.create import encode_backing_name
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.source.url import Location
from qedfs.units import format_size

if TYPE_CHECKING:
    from qedfs.source.retrying import RetryingSource


@click.command(cls=GivenOnce, short_help="Name another place of the backing.")
@click.argument("overlay", type=PLACE)
@click.option(
    "--backing",
    required=True,
    metavar="URL",
    help="Where the same disk is now: http(s), nbd(s), nbd+unix or a file; empty to need none.",
)
@click.option("--force", is_flag=True, help="Also if no fetched block is known that could be compared.")
@click.option(
    "--unsafe",
    is_flag=True,
    help="Contact and compare nothing. With another disk there, the image mixes both, for good.",
)
@click.option(
    "--source-timeout", type=DURATION, default="10s", show_default=True, help="How long to try to reach the backing."
)
@credentials_option
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def rebase(
    overlay: str,
    backing: str,
    force: bool,
    unsafe: bool,
    source_timeout: float,
    credentials: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Let OVERLAY, which is not mounted, fetch what it lacks from another place of the same disk.

    The disk there is compared first: its size, a published digest, and blocks that were fetched before. If they differ,
    nothing changes (exit code 5). What is local stays as it is, and the format of the backing is that of before. Of a
    mounted image, qedfs source set does the same. With an empty URL, an overlay that lacks nothing forgets its backing.
    """
    if force and unsafe:
        raise UsageError("--unsafe compares nothing, so --force has no meaning with it")
    location = location_of(backing, _folder(overlay)) if backing else None
    encode_backing_name(backing)  # raises for a bad name before a server is contacted
    asking = Asking(_allowed(location), read(credentials), source_timeout)
    how = _How(force=force, unsafe=unsafe)
    run_changing(_rebase, overlay, backing, location, asking, how)
    shown = None if location is None else str(location)
    if as_json:
        print_json({"overlay": os.path.abspath(overlay), "backing": shown, "compared": bool(backing) and not unsafe})
    elif not quiet:
        click.echo(printable(f"{overlay}: {'needs no backing' if shown is None else f'its backing is {shown}'} now"))


@dataclasses.dataclass(frozen=True, slots=True)
class _How:
    """What is enough to take another place for that of the same disk."""

    force: bool
    unsafe: bool


def _allowed(location: Location | None) -> tuple[str, ...]:
    """The prefixes that allow this location, which the user has typed."""
    local = () if location is None else tuple(filter(None, (location.path, *location.tls_files)))
    # A policy that allows a local file forbids everything that it does not name, so name the URL too.
    return (*local, location.secret_url) if location is not None and local else ()


async def _rebase(path: str, place: str, location: Location | None, asking: Asking, how: _How) -> None:
    with image_explained(path):
        overlay = await open_overlay(path, writable=True)
    try:
        if overlay.backing is None:
            raise UsageError(f"{path}: is complete, and has no backing")
        if overlay.record.standby.waits:
            raise InStandby(f"{path}: is in standby, and keeps nothing; qedfs activate ends that")
        if location is None:
            await _forget_backing(path, overlay)
            return
        check_secrets(overlay, location)
        pin = None if how.unsafe else await _compared(path, overlay, place, location, asking, force=how.force)
        await overlay.move_backing(place, pin)
        if how.unsafe:
            # After the move: until then, the pin keeps the old backing from being taken for another version.
            await overlay.change_record(lambda record: dataclasses.replace(record, pin=None))
    finally:
        with trio.CancelScope(shield=True):
            await overlay.close()


async def _forget_backing(path: str, overlay: Overlay) -> None:
    """Drop the backing, unless something is missing."""
    await overlay.count_missing()
    if overlay.missing:
        size = format_size(overlay.missing * overlay.cluster_size)
        raise QedfsError(f"{path}: {size} is still missing, and would read as zeros; mount it until it is complete")
    await overlay.detach()


async def _compared(path: str, overlay: Overlay, place: str, location: Location, asking: Asking, *, force: bool) -> Pin:
    """The pin of the new backing. Raises SourceChanged or SourceError as `compared` does."""
    image = Image(path, overlay, None)

    async def compare(remote: RetryingSource, _: trio.Nursery) -> Pin:
        return await compared(image, place, remote, force=force)

    return await ask(location, asking, compare, raw=not overlay.probes_backing)


def _folder(path: str) -> str:
    return os.path.dirname(os.path.realpath(path))  # as a mount of it does
