"""`qedfs map`: which bytes of the image are where, for programs and as a picture."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import click
import trio

from qedfs.cli.files import peeked
from qedfs.cli.output import console, print_json_list
from qedfs.format.geometry import round_down
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Run
from qedfs.overlay.overlay import Overlay
from qedfs.units import format_size

ROWS = 16  # of the picture
DATA, ZEROS, GONE = 0, 1, 2  # kinds of clusters, as an index into the pictures' signs
# data, zero, missing, some missing
_SIGNS = "█░·▒"
_ASCII_SIGNS = "#0.+"


@click.command("map", short_help="Show which parts are local.")
@click.argument("overlay", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in the shape of qemu-img map --output=json.")
def show_map(overlay: str, as_json: bool) -> None:
    """Draw which parts of OVERLAY are data, zeros or missing. It may be mounted meanwhile.

    In JSON, parts of depth 0 are in the overlay and those of depth 1 in its backing, which is not asked; `offset` is
    where data lies in the overlay file.
    """
    runs, cluster_size, standing_alone = trio.run(_collect, overlay)
    if as_json:
        print_json_list(_extent(run, standing_alone=standing_alone) for run in runs)
    else:
        _draw(runs, cluster_size, standing_alone=standing_alone)


async def _collect(path: str) -> tuple[list[Run], int, bool]:
    async with peeked(path) as overlay:
        runs = [run async for run in whole_map(overlay)]
        return runs, overlay.cluster_size, overlay.backing is None


async def whole_map(overlay: Overlay) -> AsyncIterator[Run]:
    """The runs of the whole image, each as long as can be. A stretch without an L2 table costs one step."""
    last: Run | None = None
    span = overlay.geometry.l2_span
    for index in range(overlay.geometry.l1_used):
        pos = index * span
        size = min(span, overlay.image_size - pos)
        # An L2 table can span terabytes; its slices are looked at one by one.
        runs = _pieces(overlay, pos, size) if overlay.clusters.l1[index] else _one(Run(MISSING, pos, size))
        async for run in runs:
            if last is not None and _continues(last, run):
                last = last._replace(size=last.size + run.size)
                continue
            if last is not None:
                yield last
            last = run
    if last is not None:
        yield last


async def _pieces(overlay: Overlay, pos: int, size: int) -> AsyncIterator[Run]:
    step = 4096 * overlay.cluster_size
    for at in range(pos, pos + size, step):
        length = min(step, pos + size - at)
        await overlay.clusters.load(at, length)
        # A mount may have let the file grow since it was opened, and the entries just loaded may point there.
        overlay.clusters.file_end = round_down(overlay.storage.size(), overlay.cluster_size)
        for run in await overlay.map(at, length):
            yield run


async def _one(run: Run) -> AsyncIterator[Run]:
    yield run


def _continues(last: Run, run: Run) -> bool:
    return last.offset + last.size == run.offset if last.offset > ZERO else last.offset == run.offset


def _extent(run: Run, *, standing_alone: bool) -> dict[str, Any]:
    """One entry of `qemu-img map --output=json` (MapEntry of qapi/block-core.json)."""
    extent: dict[str, Any] = {"start": run.pos, "length": run.size, "depth": 0}
    if run.offset > ZERO:
        return {**extent, "present": True, "zero": False, "data": True, "offset": run.offset}
    if run.offset == ZERO:
        return {**extent, "present": True, "zero": True, "data": False}
    # Without a backing, what is missing reads as zeros.
    return {**extent, "depth": 0 if standing_alone else 1, "present": False, "zero": standing_alone, "data": False}


def _draw(runs: list[Run], cluster_size: int, *, standing_alone: bool) -> None:
    screen = console()
    size = runs[-1].pos + runs[-1].size if runs else 0
    clusters = -(-size // cluster_size)
    cells = max(1, min(clusters, screen.width * ROWS))
    sums = _fill(runs, cells, size, standing_alone=standing_alone)
    signs = _SIGNS if "utf" in (sys.stdout.encoding or "").lower() else _ASCII_SIGNS
    line = "".join(_sign(cell, signs) for cell in sums)
    for at in range(0, len(line), screen.width):
        click.echo(line[at : at + screen.width])
    totals = [sum(cell[kind] for cell in sums) for kind in (DATA, ZEROS, GONE)]
    names = ("data", "zeros", "missing")
    legend = [f"{signs[kind]} {names[kind]} {format_size(totals[kind])}" for kind in (DATA, ZEROS, GONE)]
    click.echo(f"{', '.join(legend)}, {signs[3]} in part; one sign is {format_size(size / cells)}")


def _fill(runs: list[Run], cells: int, size: int, *, standing_alone: bool) -> list[list[int]]:
    """Bytes of each kind in each cell of the picture."""
    sums = [[0, 0, 0] for _ in range(cells)]
    for run in runs:
        kind = DATA if run.offset > ZERO else ZEROS if run.offset == ZERO or standing_alone else GONE
        for cell, count in _spread(run, cells, size):
            sums[cell][kind] += count
    return sums


def _spread(run: Run, cells: int, size: int) -> Iterator[tuple[int, int]]:
    """(cell, bytes in it) of a run; cell n begins at byte n * size / cells."""
    pos, end = run.pos, run.pos + run.size
    while pos < end:
        cell = min(cells - 1, pos * cells // size)
        border = -(-(cell + 1) * size // cells) if cell + 1 < cells else end
        stop = min(end, max(border, pos + 1))
        yield cell, stop - pos
        pos = stop


def _sign(cell: list[int], signs: str) -> str:
    if cell[GONE]:
        return signs[2] if not cell[DATA] and not cell[ZEROS] else signs[3]
    return signs[DATA] if cell[DATA] else signs[ZEROS]
