"""`qedfs create`: a new overlay, as large as its backing."""

from __future__ import annotations

import os

import click
import trio

from qedfs.cli.credentials_option import credentials as read
from qedfs.cli.credentials_option import credentials_option
from qedfs.cli.option_types import DURATION, SIZE
from qedfs.cli.ui.output import print_json, remark
from qedfs.errors import UsageError
from qedfs.overlay.create import create_overlay, encode_backing_name
from qedfs.source.credentials import Credentials
from qedfs.source.url import Location, parse_location
from qedfs.units import format_size

FORMATS = ("raw", "qcow2", "qed")


@click.command(short_help="Make an overlay of a remote image.")
@click.argument("overlay", type=click.Path())
@click.option("--backing", metavar="URL", help="Where missing data comes from: http(s), nbd(s), nbd+unix or a file.")
@click.option(
    "--backing-format",
    type=click.Choice(FORMATS),
    metavar="[raw|qcow2]",
    help="Format of the backing. Default: raw; one that looks like another format or is compressed is refused.",
)
@click.option("--size", type=SIZE, metavar="SIZE", help="Size of the image. Default: the size of the backing.")
@click.option(
    "--cluster-size", type=SIZE, default="64K", show_default=True, metavar="SIZE", help="Smallest unit to fetch."
)
@click.option(
    "--table-size", type=int, default=4, show_default=True, metavar="CLUSTERS", help="Clusters per table; QEMU: 2 or 4."
)
@click.option("--no-copy-on-read", is_flag=True, help="By default, mounts do not keep what they fetch for readers.")
@click.option(
    "--source-timeout", type=DURATION, default="10s", show_default=True, help="How long to try to reach the backing."
)
@credentials_option
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def create(
    overlay: str,
    backing: str | None,
    backing_format: str | None,
    size: int | None,
    cluster_size: int,
    table_size: int,
    no_copy_on_read: bool,
    source_timeout: float,
    credentials: str | None,
    as_json: bool,
) -> None:
    """Make OVERLAY, an empty QED file over a backing image.

    Without --size, the size comes from the backing, which also shows that it can be used. With --size, the backing is
    not contacted; unless --backing-format is given as well, the mount then detects its format. A local backing that is
    not an absolute path is relative to OVERLAY's folder, as in QEMU.
    """
    if backing is None and size is None:
        raise UsageError("give --backing, --size or both")
    if backing_format == "qed":
        raise UsageError("--backing-format qed: only raw and qcow2 backings can be served")
    location, looked_at = None, False
    if backing is not None:
        encode_backing_name(backing)  # raises for a bad name before a server is contacted
        location = parse_location(backing, relative_to=os.path.dirname(os.path.abspath(overlay)))
    if size is None and location is not None:
        _check_scheme(backing or "", location)
        size, looked_at = trio.run(_size, location, backing_format, source_timeout, read(credentials)), True
    header = create_overlay(
        overlay,
        image_size=size or 0,
        backing=backing,
        # If neither the user nor we know the format yet, the mount probes it.
        raw_backing=backing_format == "raw" or (backing_format is None and (looked_at or backing is None)),
        cluster_size=cluster_size,
        table_size=table_size,
        copy_on_read=not no_copy_on_read,
    )
    made = header.geometry.image_size
    if as_json:
        shown = None if location is None else str(location)
        print_json({"overlay": os.path.abspath(overlay), "size": made, "backing": shown, "cluster_size": cluster_size})
    else:
        click.echo(f"{overlay}: {format_size(made)}" + ("" if location is None else f" over {location}"))
    if location is not None:
        _remark_on_local_files(location)


def _remark_on_local_files(location: Location) -> None:
    local = [*filter(None, (location.path, *location.tls_files))]
    if location.path is not None:
        what = "a local backing has to be allowed when it is mounted"
    else:
        what = "the key has to be allowed when it is mounted, and then the server too"
        local.append(str(location).partition("?")[0])
    if location.path is not None or location.tls_files:
        remark(f"{what}: {' '.join(f'--allow-backing {path}' for path in local)}")


def _check_scheme(text: str, location: Location) -> None:
    """Raise UsageError for `server/disk.raw`: a URL without its scheme names a local file that does not exist."""
    first, slash, _ = text.partition("/")
    if location.path is None or not slash or first in (".", "..") or not set(first) & set(".:"):
        return
    if not os.path.lexists(location.path):
        raise UsageError(f"backing {location}: there is no such file; a URL begins with its scheme, like http://")


async def _size(location: Location, backing_format: str | None, timeout_seconds: float, shown: Credentials) -> int:
    """The size in bytes of the disk in the backing. The user has typed the URL, so the policy allows it."""
    # Imported here because loading libcurl is slow.
    from qedfs.source.open import remote_source
    from qedfs.source.policy import Policy

    local = tuple(filter(None, (location.path, *location.tls_files)))
    # A policy that allows a local file forbids everything that it does not name, so name the URL too.
    policy = Policy((*local, location.secret_url) if local else ())
    async with trio.open_nursery() as nursery:
        remote = remote_source(
            location,
            policy,
            nursery,
            deadline_seconds=timeout_seconds,
            raw=backing_format == "raw",  # if the user says raw, the first bytes do not matter
            expected=backing_format or "raw",
            credentials=shown,
        )
        try:
            return (await remote.connect()).size
        finally:
            with trio.CancelScope(shield=True):
                await remote.aclose()
            nursery.cancel_scope.cancel()
