"""`qedfs map --missing`: the parts of an image that need its backing, of a mount or of an overlay file.

Owns the form of the list, which is the same for both. Must not look tables up: `cli/commands/map.py` does that for a
file, and the server for a mount.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import click
import trio

from qedfs.cli.overlay_files import peeked
from qedfs.cli.served_images import check_served, fetch
from qedfs.cli.takeovers import lasting_client
from qedfs.cli.ui.output import JsonList
from qedfs.errors import UsageError
from qedfs.format.tables import MISSING
from qedfs.units import format_size

Range = tuple[int, int]  # pos, size in bytes


def print_missing(place: str, image: str | None, *, as_json: bool) -> None:
    """Print the ranges, in the format of qemu-img map --output=json or as text.

    `place`: an overlay, or with `image` a mountpoint. Raises the errors of a command that asks a mount or reads a file.
    """
    printed = JsonList() if as_json else None
    count = total = 0
    for pos, size in _of_file(place) if image is None else _of_mount(place, image):
        count, total = count + 1, total + size
        if printed is not None:
            printed.add({"start": pos, "length": size, "depth": 1, "present": False, "zero": False, "data": False})
        else:
            click.echo(f"{pos} {size}")
    if printed is not None:
        printed.close()
    else:
        click.echo(f"{format_size(total)} missing, in {count} part{'s' if count != 1 else ''}", err=True)


def _of_mount(mountpoint: str, name: str) -> Iterator[Range]:
    with lasting_client(mountpoint) as client:
        found = fetch(client, name, mountpoint)[0]
        check_served(found)
        pos: int | None = 0
        while pos is not None:
            answer = client.execute("x-qedfs-missing", device=found["name"], offset=pos)
            yield from ((start, size) for start, size in answer["ranges"])
            pos = answer["next"]


def _of_file(path: str) -> Iterator[Range]:
    if os.path.isdir(path):
        raise UsageError(f"{path}: name the image of this mount, too: qedfs map {path} IMAGE --missing")
    yield from trio.run(_ranges, path)


async def _ranges(path: str) -> list[Range]:
    from qedfs.cli.commands.map import whole_map  # here, as that module imports this one

    async with peeked(path) as overlay:
        if overlay.backing is None:
            return []
        return [(run.pos, run.size) async for run in whole_map(overlay) if run.offset == MISSING]
