"""`qedfs map`: shows which parts of an image are data, zeros or missing, as JSON, as text or as a PNG.

Owns the walk over the map of an overlay file, its JSON, and the picture on a terminal. Must not ask the server of a
mount, nor draw pixels: `cli/missing_ranges.py` and `cli/ui/map_picture.py` do.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import click
import trio

from qedfs.cli.completion import images
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.missing_ranges import print_missing
from qedfs.cli.new_file import check_replaceable, new_file
from qedfs.cli.option_types import PLACE
from qedfs.cli.overlay_files import peeked
from qedfs.cli.ui import map_picture
from qedfs.cli.ui.cells import Cells, Kind
from qedfs.cli.ui.output import JsonList, console
from qedfs.cli.ui.png import SIGNATURE
from qedfs.errors import UsageError
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Run
from qedfs.overlay.overlay import Overlay
from qedfs.units import format_size

ROWS = 16  # most lines of the picture on a terminal
CLUSTERS_AT_ONCE = 1 << 15  # clusters to look up in one step
# The character for each Kind, in the order of their values.
_SIGNS = "█░·▒"
_ASCII_SIGNS = "#0.+"


@click.command("map", cls=GivenOnce, short_help="Show which parts are local.")
@click.argument("overlay", type=PLACE, metavar="OVERLAY|MOUNTPOINT")
@click.argument("image", required=False, shell_complete=images)
@click.option("--missing", is_flag=True, help="List only what is missing.")
@click.option("--png", metavar="FILE", type=PLACE, help="Draw into this file instead of on the terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in the format of qemu-img map --output=json.")
def show_map(overlay: str, image: str | None, missing: bool, png: str | None, as_json: bool) -> None:
    """Draw which parts of OVERLAY are data, zeros or missing. It may be mounted meanwhile.

    Data was either written or fetched; the overlay does not record which. An existing FILE is replaced only if it is a
    PNG.

    In JSON, parts with depth 0 are in the overlay and those with depth 1 in its backing, which is not contacted;
    `offset` is the position of data in the overlay file.

    --missing lists the parts that need the backing. With MOUNTPOINT and IMAGE, the mount is asked: the overlay file
    shows an entry only some seconds after it was made.
    """
    if missing:
        if png is not None:
            raise UsageError("--missing is a list; omit --png")
        print_missing(overlay, image, as_json=as_json)
        return
    if image is not None:
        raise UsageError("an IMAGE of a mount goes with --missing; to draw a map, name the overlay alone")
    if png is not None:
        check_replaceable(png, SIGNATURE, "PNG")
    screen = console()
    most = screen.width * ROWS if png is None else map_picture.MOST_CELLS
    cells = trio.run(_walk, overlay, most, as_json)
    if png is not None:
        with new_file(png) as file:
            file.write(map_picture.draw(cells, os.path.basename(overlay), time.strftime("%Y-%m-%d %H:%M")))
    if as_json:
        return
    if png is None:
        _draw(cells, screen.width)
    else:
        _explain(cells, png)


async def _walk(path: str, most: int, as_json: bool) -> Cells:
    """Reduce the map to at most `most` cells. With `as_json`, print each run when it is found: a map may be long."""
    async with peeked(path) as overlay:
        standing_alone = overlay.backing is None
        cells = Cells(overlay.image_size, overlay.cluster_size, most, standing_alone=standing_alone)
        printed = JsonList()
        async for run in whole_map(overlay):
            cells.add(run)
            if as_json:
                printed.add(_extent(run, standing_alone=standing_alone))
        if as_json:
            printed.close()
        return cells


async def whole_map(overlay: Overlay) -> AsyncIterator[Run]:
    """Yield the runs of the whole image. No two neighbours could be one run. A range without tables costs one step."""
    last: Run | None = None
    pos = 0
    while pos < overlay.image_size:
        for run in await _some_runs(overlay, pos):
            pos += run.size
            if last is not None and _continues(last, run):
                last = last._replace(size=last.size + run.size)
                continue
            if last is not None:
                yield last
            last = run
    if last is not None:
        yield last


async def _some_runs(overlay: Overlay, pos: int) -> list[Run]:
    """The run from `pos` to the end of a range without tables, or the runs of the next CLUSTERS_AT_ONCE clusters."""
    left = overlay.image_size - pos
    gap = await overlay.gap(pos // overlay.cluster_size)
    if gap:
        return [Run(MISSING, pos, min(gap * overlay.cluster_size, left))]
    size = min(CLUSTERS_AT_ONCE * overlay.cluster_size, left)
    await overlay.load(pos, size)
    # A mount may have extended the file since we opened it, and the entries just loaded may point there.
    overlay.follow_growth()
    return await overlay.map(pos, size)


def _continues(last: Run, run: Run) -> bool:
    return last.offset + last.size == run.offset if last.offset > ZERO else last.offset == run.offset


def _extent(run: Run, *, standing_alone: bool) -> dict[str, Any]:
    """One entry of `qemu-img map --output=json` (MapEntry of qapi/block-core.json)."""
    extent: dict[str, Any] = {"start": run.pos, "length": run.size, "depth": 0}
    if run.offset > ZERO:
        return {**extent, "present": True, "zero": False, "data": True, "offset": run.offset}
    if run.offset == ZERO:
        return {**extent, "present": True, "zero": True, "data": False}
    # Without a backing, missing clusters read as zeros.
    return {**extent, "depth": 0 if standing_alone else 1, "present": False, "zero": standing_alone, "data": False}


def _draw(cells: Cells, width: int) -> None:
    signs = _SIGNS if "utf" in (sys.stdout.encoding or "").lower() else _ASCII_SIGNS
    line = "".join(signs[kind] for kind in cells.kinds())
    for at in range(0, len(line), width):
        click.echo(line[at : at + width])
    legend = ", ".join(f"{signs[kind]} {text}" for kind, text in map_picture.legend(cells).items())
    click.echo(legend)
    click.echo(f"one character is {format_size(cells.size)}, the image {format_size(cells.image_size)}")


def _explain(cells: Cells, path: str) -> None:
    """Print the scale and the colours of the picture at `path`."""
    click.echo(f"{path}: {map_picture.scale_of(cells)}, in reading order")
    for kind in Kind:
        name, _ = map_picture.COLOURS[kind]
        click.echo(f"{name:<11} {map_picture.legend(cells)[kind]}")
