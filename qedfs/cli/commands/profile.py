"""`qedfs profile`: records which ranges readers waited for, so that a later mount can prefetch them.

Owns what is printed, and that no file is replaced but a profile. Must not know how a profile is written
(`image/boot_profile.py`), nor what the server counts as a wait.
"""

from __future__ import annotations

import os

import click

from qedfs.cli.completion import images, mountpoints
from qedfs.cli.new_file import check_replaceable, new_file
from qedfs.cli.option_types import PLACE
from qedfs.cli.served_images import fetch
from qedfs.cli.takeovers import lasting_client
from qedfs.cli.ui.output import print_json
from qedfs.errors import QedfsError
from qedfs.image.boot_profile import FIRST_LINE, Range, written
from qedfs.units import format_size


@click.command(short_help="Record what readers of an image waited for.")
@click.argument("mountpoint", type=PLACE, shell_complete=mountpoints)
@click.argument("image", shell_complete=images)
@click.argument("file", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def profile(mountpoint: str, image: str, file: str, as_json: bool) -> None:
    """Write to FILE which ranges readers of IMAGE have waited for since the mount at MOUNTPOINT started, in order.

    Boot a guest once from a fresh overlay that is mounted with --no-stream, write the profile, and pass it to later
    mounts with --profile. Then each overlay of the same disk has what a boot reads before the guest asks for it. With a
    stream, the profile would lack the ranges that the stream fetches first.

    An existing FILE is replaced only if it is a profile.
    """
    check_replaceable(file, FIRST_LINE.encode(), "profile")
    with lasting_client(mountpoint) as client:
        found = fetch(client, image, mountpoint)[0]
        told = client.execute("x-qedfs-profile", device=found["name"])["ranges"]
    ranges: list[Range] = [(pos, size) for pos, size in told]
    if not ranges:
        raise QedfsError(f"{found['name']}: no reader has waited for anything yet, so the profile would be empty")
    size = sum(size for _, size in ranges)
    with new_file(file) as target:
        target.write(written(ranges, f"{found['name']}: pos and size of what readers waited for, in bytes").encode())
    if as_json:
        shown = {"mountpoint": os.path.abspath(mountpoint), "image": found["name"], "file": os.path.abspath(file)}
        print_json({**shown, "range_count": len(ranges), "size": size})
    else:
        click.echo(f"{file}: {len(ranges)} ranges, {format_size(size)}")
