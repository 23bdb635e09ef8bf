"""`qedfs snapshot`: a copy of the overlay of a mounted image, as it is at one moment.

Owns the options and the words of the result. The server makes the copy (`mount/snapshot.py`). Must not open the
overlay.
"""

from __future__ import annotations

import os

import click

from qedfs.cli.completion import files, images, mountpoints
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.option_types import PLACE
from qedfs.cli.served_images import check_served, fetch, stem
from qedfs.cli.takeovers import Unanswered, lasting_client
from qedfs.cli.ui.output import print_json
from qedfs.errors import QedfsError, UsageError
from qedfs.host.procfs import filesystem_type


@click.command(cls=GivenOnce, short_help="Copy the overlay of an image in use.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("image", shell_complete=images)
@click.argument("file", type=PLACE, shell_complete=files)
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def snapshot(mountpoint: str, image: str, file: str, quiet: bool, as_json: bool) -> None:
    """Copy the overlay of IMAGE, of the mount at MOUNTPOINT, to FILE, as it is at a moment between two writes.

    All writes that have returned are in it, and no part of another. It is as a disk is after a power cut: for more, let
    the guest freeze its file systems meanwhile (fsfreeze, virsh domfsfreeze). FILE is an overlay of the same backing,
    complete or not. It is on the disk when the command returns.

    The copy shares its blocks with the overlay, so it takes no room at first, and writes wait only for a moment, about
    which the command tells. So FILE must be on the same file system, and that must be able to share blocks: XFS with
    reflink, or Btrfs. The server of the mount writes FILE. It is an error if there is one.
    """
    target = os.path.abspath(file)
    if filesystem_type(os.path.dirname(target)) == "fuse.qedfs":
        raise UsageError(f"{file}: is inside a mount of qedfs; a snapshot is an overlay, and belongs beside the others")
    with lasting_client(mountpoint) as client:
        found = fetch(client, image, mountpoint)[0]
        check_served(found)
        try:
            done = client.execute("x-qedfs-snapshot", device=stem(found["name"]), file=target)
        except Unanswered as exc:
            raise QedfsError(
                f"{file}: the server of the mount has ended before it answered, and another one serves on; if there is"
                " such a file now, it is a whole snapshot, otherwise repeat the command"
            ) from exc
    if as_json:
        print_json({"mountpoint": os.path.abspath(mountpoint), "image": found["name"], **done})
    elif not quiet:
        click.echo(f"{file}: {found['name']} as it was; writes waited for {done['pause_seconds'] * 1000:.0f} ms")
