"""Searches entries of a table for data and for holes. Pure: entries in, an index out. Takes at most 0.5 ms for 64 KiB.

Must not know where the table lies, nor which clusters its entries are of. A hole is a zero cluster and, if the caller
says so, a missing one.
"""

from __future__ import annotations

from array import array

from qedfs.format.tables import MISSING, ZERO


def next_hole(part: array[int], start: int, stop: int, *, missing_is_hole: bool) -> int:
    """The index of the first hole from `start` on; `stop` if there is none before it."""
    for entry in (ZERO, MISSING) if missing_is_hole else (ZERO,):
        try:
            stop = part.index(entry, start, stop)
        except ValueError:
            continue
    return stop


def next_data(part: array[int], start: int, stop: int, *, missing_is_hole: bool) -> int:
    """The index of the first entry from `start` on that is no hole; `stop` if there is none before it."""

    def all_holes(first: int, end: int) -> bool:
        if missing_is_hole:
            return max(part[first:end], default=ZERO) <= ZERO
        return part[first:end].tobytes() == _zeros(end - first)

    if all_holes(start, stop):
        return stop
    while stop - start > 1:  # the first one is in this range
        middle = (start + stop) // 2
        if all_holes(start, middle):
            start = middle
        else:
            stop = middle
    return start


def _zeros(count: int) -> bytes:
    return (array("Q", (ZERO,)) * count).tobytes()
