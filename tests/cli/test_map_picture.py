"""`qedfs map --png`: the file is decoded again, and looked at pixel by pixel."""

from __future__ import annotations

import errno
import itertools
import os
import string
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qedfs.cli.new_file import new_file
from qedfs.cli.ui import font, map_picture
from qedfs.cli.ui.cells import Cells, Kind
from qedfs.cli.ui.map_picture import (
    COLOURS,
    GRID_LEFT,
    GRID_TOP,
    GRID_WIDTH,
    INK,
    LINE_HEIGHT,
    MARGIN,
    MOST_CELLS,
    SCALE,
    TEXT_GAP,
    WHITE,
)
from qedfs.cli.ui.png import SIGNATURE, Colour, encode_png
from qedfs.errors import Inaccessible, NoSpace, SourceError
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Run
from qedfs.overlay.create import create_overlay

from ..harness.images import qemu_create, qemu_io, sparse_image
from ..harness.mounts import qedfs
from .support import QEDFS

CLUSTER = 65536
GLYPHS = " 0123456789.,:-_+()?" + string.ascii_letters
DATE = "2026-11-30 23:45"
DATA = 1 << 20  # an offset where data may lie


class Picture(NamedTuple):
    """A PNG of indexed colours, decoded."""

    rows: list[list[Colour]]
    description: str

    def cells(self, columns: int, count: int) -> list[Colour]:
        """The colours in the middle of the first `count` cells of the grid."""
        pitch = GRID_WIDTH // columns
        half = pitch // 2 - 1
        places = (divmod(cell, columns) for cell in range(count))
        return [self.rows[GRID_TOP + half + row * pitch][GRID_LEFT + half + column * pitch] for row, column in places]

    def text(self, x: int, y: int, length: int) -> str:
        """The text that is written there, read dot by dot."""
        return "".join(_glyph_at(self.rows, x + at * SCALE * font.ADVANCE, y) for at in range(length))


def _glyph_at(rows: list[list[Colour]], x: int, y: int) -> str:
    dots = {(dx, dy) for dx in range(5) for dy in range(8) if rows[y + dy * SCALE][x + dx * SCALE] == INK}
    return next((glyph for glyph in GLYPHS if set(font.dots(glyph)) == dots), "#")


def decode(data: bytes) -> Picture:
    """The picture in a PNG file, whose chunks must be whole."""
    assert data.startswith(SIGNATURE)
    chunks = list(_chunks(data[len(SIGNATURE) :]))
    assert [name for name, _ in chunks] == [b"IHDR", b"PLTE", b"iTXt", b"IDAT", b"IEND"]
    (_, header), (_, colours), (_, text), (_, packed), _ = chunks
    width, height, *rest = struct.unpack(">IIBBBBB", header)
    assert rest == [8, 3, 0, 0, 0]
    palette = [(r, g, b) for r, g, b in zip(*[iter(colours)] * 3, strict=True)]
    pixels = zlib.decompress(packed)
    assert len(pixels) == height * (width + 1)
    lines = [pixels[at : at + width + 1] for at in range(0, len(pixels), width + 1)]
    assert {line[0] for line in lines} == {0}  # no filter
    keyword, _, rest_of_text = text.partition(b"\0")
    assert (keyword, rest_of_text[:4]) == (b"Description", b"\0\0\0\0")
    return Picture([[palette[index] for index in line[1:]] for line in lines], rest_of_text[4:].decode())


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    while data:
        (length,) = struct.unpack_from(">I", data)
        name, body, (crc,) = data[4:8], data[8 : 8 + length], struct.unpack_from(">I", data, 8 + length)
        assert crc == zlib.crc32(name + body)
        yield name, body
        data = data[12 + length :]


def colour(kind: Kind) -> Colour:
    return COLOURS[kind][1]


# Runs -> cells


def cells_of(image_size: int, most: int, *runs: Run, standing_alone: bool = False) -> Cells:
    cells = Cells(image_size, CLUSTER, most, standing_alone=standing_alone)
    for run in runs:
        cells.add(run)
    return cells


def test_a_cell_is_a_power_of_two_of_clusters() -> None:
    assert [cells_of(16 * CLUSTER, most).size // CLUSTER for most in (100, 16, 15, 4, 1)] == [1, 1, 2, 4, 16]
    assert [len(cells_of(size, 4)) for size in (0, 1, CLUSTER, 4 * CLUSTER, 4 * CLUSTER + 512)] == [0, 1, 1, 4, 3]


def test_the_kinds_of_cells() -> None:
    runs = [Run(DATA, 0, CLUSTER), Run(ZERO, CLUSTER, 3 * CLUSTER), Run(MISSING, 4 * CLUSTER, 5 * CLUSTER)]
    last = Run(DATA, 9 * CLUSTER, 512)
    cells = cells_of(9 * CLUSTER + 512, 5, *runs, last)
    assert cells.kinds() == [Kind.DATA, Kind.ZEROS, Kind.MISSING, Kind.MISSING, Kind.PART]
    assert cells.totals == {Kind.DATA: CLUSTER + 512, Kind.ZEROS: 3 * CLUSTER, Kind.MISSING: 5 * CLUSTER}


def test_what_is_missing_without_a_backing_reads_as_zeros() -> None:
    cells = cells_of(2 * CLUSTER, 1, Run(DATA, 0, CLUSTER), Run(MISSING, CLUSTER, CLUSTER), standing_alone=True)
    assert cells.kinds() == [Kind.DATA]
    assert cells.totals[Kind.MISSING] == 0


# Cells -> picture


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 8), (32, 8), (33, 16), (128, 16), (129, 32), (MOST_CELLS // 2, 128), (MOST_CELLS, 128)]
)
def test_a_grid_is_at_least_twice_as_wide_as_high(count: int, columns: int) -> None:
    cells = cells_of(count * CLUSTER, MOST_CELLS, Run(ZERO, 0, count * CLUSTER))
    picture = decode(map_picture.draw(cells, "disk.qed", DATE))
    assert map_picture.shape_of(cells).columns == columns
    assert picture.cells(columns, count) == [colour(Kind.ZEROS)] * count
    grid = [row[GRID_LEFT : GRID_LEFT + GRID_WIDTH] for row in picture.rows[GRID_TOP : GRID_TOP + GRID_WIDTH // 2]]
    zeros = sum(row.count(colour(Kind.ZEROS)) for row in grid)
    assert zeros >= count * (GRID_WIDTH // columns - 1) ** 2


@pytest.mark.parametrize("size", [0, 512, 999 << 10, 1023 << 40, 1023 << 50])
def test_the_legend_fits_whatever_the_numbers(size: int) -> None:
    cells = cells_of(size, MOST_CELLS, *([Run(DATA, 0, size)] if size else []))
    cells.totals.update({Kind.ZEROS: size, Kind.MISSING: size})
    rows = decode(map_picture.draw(cells, "disk.qed", DATE)).rows
    assert {pixel for row in rows for pixel in row[-MARGIN:] + row[:MARGIN]} == {WHITE}
    foot = rows[-MARGIN - 2 * map_picture.LINE_HEIGHT :]
    shown = {pixel for row in foot for pixel in row}
    assert shown == {WHITE, INK, *(colour(kind) for kind in Kind)}


def test_a_picture_says_of_what_it_is_and_of_when() -> None:
    cells = cells_of(40 * CLUSTER, MOST_CELLS, Run(ZERO, 0, 40 * CLUSTER))  # three rows of 16
    picture = decode(map_picture.draw(cells, "Web-1_(old).qed", DATE))
    assert picture.text(MARGIN, MARGIN, len("Web-1_(old).qed")) == "Web-1_(old).qed"
    assert picture.text(GRID_LEFT + GRID_WIDTH - 16 * SCALE * font.ADVANCE, MARGIN, 16) == DATE
    assert picture.description.startswith(f"Web-1_(old).qed; {DATE}; ")
    right = GRID_LEFT - TEXT_GAP
    pitch = map_picture.shape_of(cells).pitch
    for row, text in enumerate(["0 B", "1.00 MiB", "2.00 MiB"]):
        assert picture.text(right - len(text) * SCALE * font.ADVANCE, GRID_TOP + row * pitch, len(text)) == text


def test_a_title_has_room_for_any_name() -> None:
    cells = cells_of(CLUSTER, MOST_CELLS)
    picture = decode(map_picture.draw(cells, "a" * 300 + "\udcff\N{SNOWMAN}.qed", DATE))
    assert picture.text(GRID_LEFT + GRID_WIDTH - 16 * SCALE * font.ADVANCE, MARGIN, 16) == DATE
    shown = picture.text(MARGIN, MARGIN, 54)
    assert (shown[:3], "..." in shown, "??.qed" in shown) == ("aaa", True, True)


def test_positions_stand_beside_rows_that_have_room_for_them() -> None:
    cells = cells_of(MOST_CELLS * CLUSTER, MOST_CELLS)  # 64 rows of 8 MiB, six pixels each
    picture = decode(map_picture.draw(cells, "disk.qed", DATE))
    right = GRID_LEFT - TEXT_GAP - len("32.0 MiB") * SCALE * font.ADVANCE
    assert picture.text(right, GRID_TOP + LINE_HEIGHT, 8) == "32.0 MiB"
    assert picture.text(right, GRID_TOP + 2 * LINE_HEIGHT, 8) == "64.0 MiB"


def test_no_two_glyphs_are_the_same() -> None:
    assert len({frozenset(font.dots(glyph)) for glyph in GLYPHS}) == len(GLYPHS)
    assert list(font.dots("\N{SNOWMAN}")) == list(font.dots("?"))


def test_colours_differ_in_lightness() -> None:
    """Luma of ITU-R BT.601: what is left of a colour in a grey print."""
    lumas = sorted(0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (colour(kind) for kind in Kind))
    assert min(high - low for low, high in itertools.pairwise(lumas)) > 25


def test_a_description_may_hold_any_name() -> None:
    name = "Platte \N{EM DASH} \udcff.qed"
    assert "Platte \N{EM DASH} ?.qed" in decode(encode_png([b"\0"], [WHITE], name)).description


# The command


@pytest.fixture
def overlay(folder: Path) -> Path:
    """Sixteen clusters: data at 1 and 2, zeros at 3 and 4, the rest missing."""
    sparse_image(folder / "base.raw", 1 << 20)
    path = qemu_create(folder / "disk.qed", folder / "base.raw")
    qemu_io(path, "write -P 7 64k 128k", "write -z 192k 128k")
    return path


def test_the_picture_of_an_overlay(overlay: Path, tmp_path: Path) -> None:
    shown = qedfs("map", overlay, "--png", tmp_path / "map.png").stdout
    picture = decode((tmp_path / "map.png").read_bytes())
    data, zeros, missing = colour(Kind.DATA), colour(Kind.ZEROS), colour(Kind.MISSING)
    assert picture.cells(8, 17) == [missing, data, data, zeros, zeros, *[missing] * 11, WHITE]
    assert "; dark blue: data 128 KiB, pale yellow: zeros 128 KiB, grey: missing" in picture.description
    assert shown.splitlines() == [
        f"{tmp_path}/map.png: one cell 64.0 KiB, one row 512 KiB, image 1.00 MiB, in reading order",
        "dark blue   data 128 KiB",
        "pale yellow zeros 128 KiB",
        "grey        missing 768 KiB",
        "blue        in part",
    ]


def test_a_png_is_replaced_and_json_is_printed_beside_it(overlay: Path, tmp_path: Path) -> None:
    target = tmp_path / "map.png"
    target.write_bytes(encode_png([b"\0"], [WHITE], "before"))
    printed = qedfs("map", overlay, "--png", target, "--json").stdout
    assert printed == qedfs("map", overlay, "--json").stdout
    assert "disk.qed" in decode(target.read_bytes()).description
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("nope/map.png", "cannot be written: No such file or directory"),
        ("disk.qed", "exists already and is not a PNG; remove it or choose another name"),
        (".", "exists already and is not a PNG; remove it or choose another name"),
        ("base.raw/map.png", "cannot be written: Not a directory"),
    ],
)
def test_a_refusal_is_one_line(overlay: Path, folder: Path, target: str, text: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = qedfs("map", overlay, "--png", f"{folder}/{target}", check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"qedfs: {folder}/{target}: {text}\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_is_no_overlay_leaves_no_picture(folder: Path) -> None:
    (folder / "text.qed").write_text("hello")
    assert qedfs("map", folder / "text.qed", "--png", folder / "map.png", check=False).returncode == 3
    assert [path.name for path in folder.iterdir()] == ["text.qed"]


def test_an_empty_map_of_two_terabytes_takes_no_memory(folder: Path) -> None:
    create_overlay(str(folder / "disk.qed"), image_size=2 << 40, backing="http://127.0.0.1/nowhere.img")

    def peak(*words: str | Path) -> int:
        child = subprocess.Popen([*QEDFS, *words], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        return usage.ru_maxrss << 10

    assert peak("map", folder / "disk.qed", "--png", folder / "map.png") < peak("map", "--help") + (16 << 20)
    picture = decode((folder / "map.png").read_bytes())
    assert picture.cells(128, MOST_CELLS) == [colour(Kind.MISSING)] * MOST_CELLS


# Files that appear when they are whole


@pytest.mark.parametrize("before", [None, b"before"])
def test_what_interrupts_the_writing_leaves_the_file_before(tmp_path: Path, before: bytes | None) -> None:
    target = tmp_path / "file"
    if before is not None:
        target.write_bytes(before)

    def write() -> None:
        with new_file(str(target)) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if before is None else [before])


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.EACCES, Inaccessible, "map.png: cannot be written: Permission denied"),
        (errno.EROFS, Inaccessible, "map.png: cannot be written: Read-only file system"),
        (errno.ENOSPC, NoSpace, "map.png: the file system is full"),
        (errno.EDQUOT, NoSpace, "map.png: the file system is full"),
    ],
)
def test_refusals_of_the_system(monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], text: str) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(kind) as caught, new_file("map.png"):
        raise AssertionError("there is no file to write to")
    assert str(caught.value) == text


def test_refusals_of_the_system_inside_of_tasks(tmp_path: Path) -> None:
    def write(*errors: Exception) -> None:
        with new_file(str(tmp_path / "file")):
            raise ExceptionGroup("outer", [ExceptionGroup("inner", errors)])

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(NoSpace, match="the file system is full"):
        write(full, full)
    with pytest.RaisesGroup(SourceError, ValueError, flatten_subgroups=True):
        write(SourceError("what is to be written does not come"), ValueError())
