"""What guests do with a complete image, at each size, depth and order: qedfs next to QEMU's FUSE export, as one table.

Both serve a copy of one overlay that a stream has filled, so the layout is a stream's. The copies are made alike, since
the size of the page cache's folios depends on how a file was written. All is in the page cache before the first job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from . import fio, ours, qemu
from .figures import GIB, KIB, MIB
from .lab import Lab
from .rows.complete import warm

_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB, MIB)
_PATTERNS = ("randread", "read", "randwrite", "write")
_DEPTHS = (1, 16)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One job, and what each of the two reached, in operations per second: the medians of all runs."""

    title: str
    qedfs: float
    qemu: float

    @property
    def ratio(self) -> float:
        """How many times better qedfs is."""
        return self.qedfs / self.qemu


def jobs(seconds: float) -> dict[str, fio.Job]:
    """All jobs by title. A buffered job has one request at a time, since the kernel makes its own of it."""
    found = {}
    for pattern, size, depth in itertools.product(_PATTERNS, _SIZES, _DEPTHS):
        found[f"{pattern} {_size(size)} direct, depth {depth}"] = fio.Job(pattern, size, depth, seconds)
    for pattern, size in itertools.product(_PATTERNS, _SIZES):
        found[f"{pattern} {_size(size)} buffered"] = fio.Job(pattern, size, 1, seconds, direct=False)
    found["randwrite 4K + fsync"] = fio.Job("randwrite", 4 * KIB, 1, seconds, direct=False, sync="fsync")
    found["write 16K + fdatasync"] = fio.Job("write", 16 * KIB, 1, seconds, direct=False, sync="fdatasync")
    return found


def measure(lab: Lab, runs: int, told: Callable[[Cell], None]) -> list[Cell]:
    """All jobs, by turns: qedfs, QEMU, qedfs, QEMU. `told` is called with each cell as it is there.

    Raises what the servers and fio raise: half a table would have another mean.
    """
    cells = []
    with (
        _copies(lab) as (one, other),
        ours.served(lab, one) as mount,
        qemu.exported(lab, other) as (_, image),
    ):
        warm(one, other)
        for title, job in jobs(float(lab.fio_seconds)).items():
            rates: dict[Path, list[float]] = {ours.image_path(mount, one): [], image: []}
            for _ in range(runs):
                for target, found in rates.items():
                    lab.settle()
                    found.append(fio.run(target, job).iops)
            cells.append(Cell(title, *(statistics.median(found) for found in rates.values())))
            told(cells[-1])
    return cells


def line(cell: Cell) -> str:
    """A cell as text."""
    return (
        f"{cell.title:<34} {cell.qedfs:>9,.0f} {cell.qemu:>9,.0f}  {cell.ratio:5.2f}{'' if cell.ratio >= 1 else '  *'}"
    )


def summary(cells: list[Cell]) -> str:
    """The mean of the ratios, and how many are below 1."""
    below = sum(cell.ratio < 1 for cell in cells)
    mean = statistics.geometric_mean(cell.ratio for cell in cells)
    worst = min(cells, key=lambda cell: cell.ratio)
    lowest = f"the lowest {worst.ratio:.2f}: {worst.title}"
    return f"geometric mean of {len(cells)} rows {mean:.2f}; {below} below 1 (*), {lowest}"


@contextlib.contextmanager
def _copies(lab: Lab) -> Iterator[tuple[Path, Path]]:
    """Two equal copies of a streamed overlay, on the disk."""
    streamed = lab.fresh("streamed.qed")
    copies = lab.fresh("copy.qed"), lab.fresh("copy.qed")
    try:
        with lab.origin("http", GIB) as origin:
            ours.create(streamed, origin.url)
            with ours.served(lab, streamed, stream=True) as mount:
                mount.wait(timeout="5m")
        for copy in copies:
            shutil.copyfile(streamed, copy)
        lab.settle()
        yield copies
    finally:
        for path in (streamed, *copies):
            path.unlink(missing_ok=True)


def _size(size: int) -> str:
    return f"{size // MIB}M" if size >= MIB else f"{size // KIB}K"
