"""`qedfs create`: a new overlay over a backing, which is looked at first.

Owns which options go together, the size that follows from them, and what the user is warned of. Must not know how the
file is laid out (`overlay/create.py`), nor how a backing is looked at (`source/look.py`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click
import trio

from qedfs.cli.backing_argument import location_of, misplaced_url
from qedfs.cli.credentials_option import credentials as read
from qedfs.cli.credentials_option import credentials_option
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import DURATION, SIZE, Checked, parse_source_errors, source_error_words
from qedfs.cli.ui.layout import printable
from qedfs.cli.ui.output import print_json, remark
from qedfs.errors import UsageError
from qedfs.overlay.create import already_exists, create_overlay, encode_backing_name
from qedfs.overlay.preallocation import Preallocation
from qedfs.source.url import Location, redact
from qedfs.units import format_size

if TYPE_CHECKING:
    from qedfs.source.look import Look

SUFFIX = ".qed"  # of the overlays that a mount of a folder serves

FORMATS = ("raw", "qcow2", "qed")


class _Create(GivenOnce):
    """Says where the URL goes if it is given as an argument; click would only call it unexpected."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments of the command line."""
        if not ctx.resilient_parsing:
            values, extra, _ = self.make_parser(ctx).parse_args(args=list(args))
            words = [word for word in (values.get("overlay"), *extra) if isinstance(word, str)]
            url = misplaced_url(words)
            if url is not None:
                overlay = next((word for word in words if word != url), "disk.qed")
                raise click.UsageError(
                    f"the URL goes after --backing: qedfs create {redact(overlay)} --backing {redact(url)}", ctx
                )
        return super().parse_args(ctx, args)


@click.command(cls=_Create, short_help="Make an overlay of a remote image.")
@click.argument("overlay", type=click.Path())
@click.option("--backing", metavar="URL", help="Where missing data comes from: http(s), nbd(s), nbd+unix or a file.")
@click.option(
    "--backing-format",
    type=click.Choice(FORMATS),
    help="Format of the backing. Default: found out. With raw, its content is not looked at.",
)
@click.option("--size", type=SIZE, metavar="SIZE", help="Size of the image. Default: the size of the disk.")
@click.option("--shrink", is_flag=True, help="Allow a --size that is smaller than the disk: the rest is cut off.")
@click.option("--offline", is_flag=True, help="Do not contact the backing. Needs --size.")
@click.option(
    "--cluster-size", type=SIZE, default="64K", show_default=True, metavar="SIZE", help="Smallest unit to fetch."
)
@click.option(
    "--table-size", type=int, default=4, show_default=True, metavar="CLUSTERS", help="Clusters per table; QEMU: 2 or 4."
)
@click.option(
    "--preallocation",
    type=click.Choice([kind.value for kind in Preallocation]),
    default=Preallocation.OFF.value,
    show_default=True,
    help="Give the file its tables at once, in one row (metadata), or tables and space for the whole disk (falloc).",
)
@click.option("--no-copy-on-read", is_flag=True, help="By default, mounts do not keep what they fetch for readers.")
@click.option(
    "--standby",
    is_flag=True,
    help="Mounts pass reads through and keep nothing until qedfs activate: the backing still changes.",
)
@click.option(
    "--on-source-error",
    type=Checked(parse_source_errors),
    metavar="eio|wait[:TIME]",
    shell_complete=source_error_words,
    help="What reads of mounts do while the backing is away: fail, or wait until it is back, for at most TIME. "
    "Default: fail.",
)
@click.option(
    "--source-timeout", type=DURATION, default="10s", show_default=True, help="How long to try to reach the backing."
)
@credentials_option
@click.option("--quiet", "-q", is_flag=True, help="Print only errors and warnings.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def create(
    overlay: str,
    backing: str | None,
    backing_format: str | None,
    size: int | None,
    shrink: bool,
    offline: bool,
    cluster_size: int,
    table_size: int,
    preallocation: str,
    no_copy_on_read: bool,
    standby: bool,
    on_source_error: str | None,
    source_timeout: float,
    credentials: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make OVERLAY, an empty QED file over a backing image.

    The backing is looked at: whether it is a raw disk, or a qcow2 or QED image, and how large the disk is. Archives,
    compressed files, other formats and web pages are refused. What was found is printed, and an overlay of a raw disk
    says so: no mount will look for another format in it.

    With a larger --size, the image ends with zeros. With --offline, the backing is not contacted; unless
    --backing-format raw is given, the mount then detects its format. A local backing that is not an absolute path is
    relative to OVERLAY's folder, as in QEMU.

    With --json: `overlay` (absolute path), `size` of the image, `backing` (the URL without secrets, or null),
    `backing_format` ("raw", "qcow2", "qed", or null for one that is not known), `compression` of a qcow2 image ("zlib",
    "zstd", or null), `disk_size` of the disk in the backing, `stored_size` of the backing's file (these two are null
    if nobody has looked), `cluster_size` and `preallocation`. All sizes are in bytes.
    """
    _check(backing, backing_format, size, offline=offline, standby=standby, on_source_error=on_source_error)
    if os.path.lexists(overlay):
        raise already_exists(overlay)
    location, found = None, None
    if backing is not None:
        encode_backing_name(backing)  # raises for a bad name before a server is contacted
        location = location_of(backing, os.path.realpath(os.path.dirname(overlay)))
        if not offline:
            found = _look(location, backing_format, source_timeout, credentials)
    known_format = backing_format if found is None else found.format
    private = location is not None and (location.stores_login or location.stores_query)
    header = create_overlay(
        overlay,
        image_size=_image_size(size, found, shrink=shrink),
        backing=backing,
        # If neither the user nor we know the format yet, the mount probes it. QED has a name for raw only.
        raw_backing=backing is None or known_format == "raw",
        cluster_size=cluster_size,
        table_size=table_size,
        copy_on_read=not no_copy_on_read,
        private=private,
        standby=standby,
        source_size=None if found is None else found.size,
        preallocation=Preallocation(preallocation),
        on_source_error="" if on_source_error is None else parse_source_errors(on_source_error).stored(),
    )
    made = header.geometry.image_size
    if as_json:
        print_json(
            {
                "overlay": os.path.abspath(overlay),
                "size": made,
                "backing": None if location is None else str(location),
                "backing_format": known_format,
                "compression": None if found is None else found.compression,
                "disk_size": None if found is None else found.size,
                "stored_size": None if found is None else found.stored_size,
                "cluster_size": cluster_size,
                "preallocation": preallocation,
            }
        )
    elif not quiet:
        click.echo(printable(f"{overlay}: {format_size(made)}{_over(location, found, made)}"))
    if not quiet and not overlay.endswith(SUFFIX):
        remark(f"{overlay}: a mount of its folder does not serve it, as its name does not end in {SUFFIX}")
    if location is not None:
        _warn_of_secrets(overlay, location)
        if not quiet:
            _remark_on_local_files(location)


def _check(
    backing: str | None,
    backing_format: str | None,
    size: int | None,
    *,
    offline: bool,
    standby: bool,
    on_source_error: str | None,
) -> None:
    if backing is None and size is None:
        raise UsageError("give --backing, --size or both")
    if backing is None and backing_format is not None:
        raise UsageError("--backing-format needs --backing")
    if offline and size is None:
        raise UsageError("--offline needs --size, since the size of the disk is not asked for")
    if standby and backing is None:
        raise UsageError("--standby needs --backing: without one there is nothing to wait for")
    if on_source_error is not None and backing is None:
        raise UsageError("--on-source-error needs --backing: without one there is no source")


def _look(location: Location, backing_format: str | None, timeout_seconds: float, credentials: str | None) -> Look:
    # Imported here because loading libcurl is slow.
    from qedfs.source.look import look

    shown = read(credentials)

    async def run() -> Look:
        return await look(location, backing_format=backing_format, deadline_seconds=timeout_seconds, credentials=shown)

    return trio.run(run)


def _image_size(size: int | None, found: Look | None, *, shrink: bool) -> int:
    """The size of the image in bytes. Raises UsageError if it is smaller than the disk and the user does not say so."""
    if size is None:
        return 0 if found is None else found.size
    if found is not None and size < found.size and not shrink:
        raise UsageError(
            f"--size {size} is smaller than the disk in the backing ({found.size} bytes, {format_size(found.size)});"
            " --shrink cuts the disk off there"
        )
    return size


def _over(location: Location | None, found: Look | None, made: int) -> str:
    """The rest of the line that says what was made."""
    if location is None:
        return ""
    if found is None:
        return f" over {location} (not contacted)"
    change = ""
    if made >= found.size + 512:
        change = "; zeros after it"
    elif made < found.size:
        change = "; cut off"
    return f" over {location} ({found}{change})"


def _warn_of_secrets(overlay: str, location: Location) -> None:
    if location.stores_login:
        remark(
            f"the user name and password in the URL are stored in {overlay}, which only its owner may read (mode 0600);"
            " to keep them out of it, put them into ~/.netrc or a --credentials file instead"
        )
    elif location.stores_query:
        remark(
            f"the query of the URL, which may be a key, is stored in {overlay}; only its owner may read it (mode 0600)"
        )


def _remark_on_local_files(location: Location) -> None:
    local = [*filter(None, (location.path, *location.tls_files))]
    if location.path is not None:
        what = "a local backing has to be allowed when it is mounted"
    else:
        what = "the key has to be allowed when it is mounted, and then the server too"
        local.append(str(location).partition("?")[0])
    if location.path is not None or location.tls_files:
        remark(f"{what}: {' '.join(f'--allow-backing {path}' for path in local)}")
