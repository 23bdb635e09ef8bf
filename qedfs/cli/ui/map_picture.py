"""The cells of a map -> a self-explanatory PNG: a grid of squares with a legend below it.

Above the grid are the overlay's name and the date; to its left is where in the image each row begins. Pure. Owns the
layout, the colours and the legend. Must not know tables (`cells.py`), nor the encoding of a PNG (`png.py`). The grid
runs like text, from left to right and from top to bottom. The sizes of a cell and of a row are powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qedfs.cli.ui import font
from qedfs.cli.ui.cells import Cells, Kind
from qedfs.cli.ui.layout import shortened
from qedfs.cli.ui.png import Colour, encode_png
from qedfs.units import format_size

MOST_COLUMNS = 128
MOST_CELLS = MOST_COLUMNS * MOST_COLUMNS // 2  # keeps the grid at least twice as wide as high
LEAST_COLUMNS = 8
GRID_WIDTH = 768  # pixels
MARGIN = 12
GAP = 1  # between two cells
SCALE = 2  # pixels per dot of the font
LINE_HEIGHT = 12 * SCALE
SWATCH = 7 * SCALE
TEXT_GAP = 3 * SCALE  # between a swatch and its text

# Where the grid begins: below the title, and right of the positions of rows, the longest of which is "1023 MiB".
GRID_TOP = MARGIN + LINE_HEIGHT
GRID_LEFT = MARGIN + len("1023 MiB") * SCALE * font.ADVANCE + TEXT_GAP

WHITE: Colour = (0xFF, 0xFF, 0xFF)
INK: Colour = (0x22, 0x22, 0x22)
# Zeros are pale: there is nothing in them. All four differ in lightness, too (CIE L* 32, 58, 79, 95), so that they can
# be told apart by colour-blind readers and in print without colours.
COLOURS: dict[Kind, tuple[str, Colour]] = {
    Kind.DATA: ("dark blue", (0x00, 0x4F, 0x80)),
    Kind.ZEROS: ("pale yellow", (0xFB, 0xF0, 0xC0)),
    Kind.MISSING: ("grey", (0xC4, 0xC4, 0xC4)),
    Kind.PART: ("blue", (0x4A, 0x90, 0xC8)),
}
NAMES = {Kind.DATA: "data", Kind.ZEROS: "zeros", Kind.MISSING: "missing", Kind.PART: "in part"}

_PAPER = 0
_INK = 1
_FIRST_KIND = 2
PALETTE: list[Colour] = [WHITE, INK, *(COLOURS[kind][1] for kind in Kind)]


class Shape(NamedTuple):
    """The layout of the grid. `pitch`: pixels from one cell to the next."""

    columns: int
    rows: int
    pitch: int


def shape_of(cells: Cells) -> Shape:
    """The narrowest grid that is at least twice as wide as high."""
    columns = LEAST_COLUMNS
    while columns * columns // 2 < len(cells):
        columns *= 2
    return Shape(columns, -(-len(cells) // columns), GRID_WIDTH // columns)


def legend(cells: Cells) -> dict[Kind, str]:
    """For each kind its name and its total size."""
    return {kind: NAMES[kind] + _amount(cells, kind) for kind in Kind}


def scale_of(cells: Cells) -> str:
    """The sizes of a cell, a row and the image, in words."""
    row = cells.size * shape_of(cells).columns
    return f"one cell {format_size(cells.size)}, one row {format_size(row)}, image {format_size(cells.image_size)}"


def draw(cells: Cells, name: str, date: str) -> bytes:
    """The bytes of the PNG file. `name` and `date` become its title, and go into its description."""
    shape = shape_of(cells)
    foot = GRID_TOP + shape.rows * shape.pitch + MARGIN
    canvas = Canvas(GRID_LEFT + GRID_WIDTH + MARGIN, foot + 2 * LINE_HEIGHT + MARGIN)
    _write_title(canvas, name, date)
    _write_positions(canvas, cells, shape)
    for at, kind in enumerate(cells.kinds()):
        row, column = divmod(at, shape.columns)
        side = shape.pitch - GAP
        canvas.fill(GRID_LEFT + column * shape.pitch, GRID_TOP + row * shape.pitch, side, side, _FIRST_KIND + kind)
    for x, (kind, text) in zip(_tab_stops(), legend(cells).items(), strict=True):
        canvas.fill(x, foot, SWATCH, SWATCH, _FIRST_KIND + kind)
        canvas.write(x + SWATCH + TEXT_GAP, foot, text)
    canvas.write(MARGIN, foot + LINE_HEIGHT, scale_of(cells))
    description = ", ".join(f"{COLOURS[kind][0]}: {text}" for kind, text in legend(cells).items())
    return encode_png(canvas.rows, PALETTE, f"{name}; {date}; {description}; {scale_of(cells)}")


def _write_title(canvas: Canvas, name: str, date: str) -> None:
    """The name on the left, shortened if need be, and the date on the right."""
    right = GRID_LEFT + GRID_WIDTH - len(date) * SCALE * font.ADVANCE
    canvas.write(right, MARGIN, date)
    canvas.write(MARGIN, MARGIN, shortened(name, (right - MARGIN) // (SCALE * font.ADVANCE) - 2))


def _write_positions(canvas: Canvas, cells: Cells, shape: Shape) -> None:
    """Where rows begin in the image, beside as many rows as have room for the text."""
    step = 1
    while step * shape.pitch < LINE_HEIGHT:
        step *= 2
    for row in range(0, shape.rows, step):
        text = format_size(row * shape.columns * cells.size)
        x = GRID_LEFT - TEXT_GAP - len(text) * SCALE * font.ADVANCE
        canvas.write(x, GRID_TOP + row * shape.pitch, text)


class Canvas:
    """Rows of pixels. A pixel is an index into the palette."""

    def __init__(self, width: int, height: int) -> None:
        self.rows = [bytearray([_PAPER]) * width for _ in range(height)]

    def fill(self, x: int, y: int, width: int, height: int, colour: int) -> None:
        """Draw a rectangle."""
        for row in self.rows[y : y + height]:
            row[x : x + width] = bytes([colour]) * width

    def write(self, x: int, y: int, text: str) -> None:
        """Draw a line of text."""
        for column, row in font.dots(text):
            self.fill(x + column * SCALE, y + row * SCALE, SCALE, SCALE, _INK)


def _amount(cells: Cells, kind: Kind) -> str:
    return f" {format_size(cells.totals[kind])}" if kind in cells.totals else ""


def _tab_stops() -> Iterator[int]:
    """The x positions of the legend's entries, spaced for the longest possible text ("missing 1023 MiB")."""
    x = MARGIN
    for kind in Kind:
        yield x
        longest = len(f"{NAMES[kind]} 1023 MiB" if kind is not Kind.PART else NAMES[kind])
        x += SWATCH + TEXT_GAP + SCALE * font.ADVANCE * (longest + 2)
