"""A map in cells: each of one kind, as many as fit, and the totals in bytes."""

from __future__ import annotations

from qedfs.cli.ui.cells import Cells, Kind
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Run

CLUSTER = 4096


def test_cells_are_a_power_of_two_of_clusters() -> None:
    for clusters, most, size, count in ((10, 10, 1, 10), (10, 9, 2, 5), (10, 1, 16, 1), (0, 9, 1, 0)):
        cells = Cells(clusters * CLUSTER, CLUSTER, most, standing_alone=False)
        assert (cells.size, len(cells)) == (size * CLUSTER, count)


def kinds(*offsets: int, standing_alone: bool = False, most: int = 2) -> tuple[list[Kind], list[int]]:
    cells = Cells(len(offsets) * CLUSTER, CLUSTER, most, standing_alone=standing_alone)
    for cluster, offset in enumerate(offsets):
        cells.add(Run(pos=cluster * CLUSTER, size=CLUSTER, offset=offset))
    return cells.kinds(), [cells.totals[kind] // CLUSTER for kind in (Kind.DATA, Kind.ZEROS, Kind.MISSING)]


def test_what_a_cell_holds() -> None:
    data = 8192
    assert kinds(data, ZERO, ZERO, ZERO) == ([Kind.DATA, Kind.ZEROS], [1, 3, 0])
    assert kinds(MISSING, MISSING, MISSING, ZERO) == ([Kind.MISSING, Kind.PART], [0, 1, 3])
    assert kinds(MISSING, data, data, data) == ([Kind.PART, Kind.DATA], [3, 0, 1])


def test_without_a_backing_nothing_is_missing() -> None:
    assert kinds(MISSING, MISSING, 8192, MISSING, standing_alone=True) == ([Kind.ZEROS, Kind.DATA], [1, 3, 0])
