"""Holes of the overlay file: where one ends, asked of the file system once for each extent."""

from __future__ import annotations

from typing import cast

from qedfs.overlay.holes import Holes
from qedfs.overlay.storage import FileExtent, Storage


class Extents:
    """A file with data up to 100, a hole up to 1000 and data up to 1100."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def extent(self, offset: int) -> FileExtent:
        self.asked.append(offset)
        return next(FileExtent(end, hole) for end, hole in ((100, False), (1000, True), (1100, False)) if offset < end)


def test_the_end_of_a_hole_is_asked_for_once() -> None:
    file = Extents()
    holes = Holes(cast("Storage", file))
    assert not holes.known(0)
    assert [holes.at(offset) for offset in (0, 99, 100, 500, 999, 1000)] == [0, 0, 900, 500, 1, 0]
    assert file.asked == [0, 100, 1000]
    assert [holes.known(offset) for offset in (999, 1000, 1099, 1100)] == [False, True, True, False]
