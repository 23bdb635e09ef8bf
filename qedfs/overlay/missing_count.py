"""How many clusters of an overlay are missing: counted once, from the start to the end, and exact from then on.

Owns the count, how far it has come, and what a failed barrier means for it. Must not know who asks, nor where the
clusters are that are not missing. `clustermap.py` reports each change of an entry (`less`), between two awaits.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

import trio

from qedfs.errors import BadOverlay
from qedfs.format.geometry import Geometry
from qedfs.format.tables import MISSING
from qedfs.overlay.table_rows import count_missing
from qedfs.overlay.table_slices import TableSlices

COUNT_AT_ONCE = 32  # slices or holes to count before other tasks get their turn


class MissingCount:
    """The count of one overlay."""

    def __init__(self, tables: TableSlices, geometry: Geometry, gap: Callable[[int], Awaitable[int]]) -> None:
        """`gap`: see `ClusterMap.gap`."""
        self._tables = tables
        self._geometry = geometry
        self._gap = gap
        self._total: int | None = None  # as of the last complete count
        self._epoch = 0  # the epoch of the tables that were counted
        self._counted_to = 0  # slices below this one are included in _counted
        self._counted = 0
        self._uncountable: BadOverlay | None = None  # the error of the first invalid table
        self._shift = tables.slice_entries.bit_length() - 1

    @property
    def total(self) -> int | None:
        """How many clusters are missing; None until `count` has ended, and again after a failed barrier."""
        return self._total if self._epoch == self._tables.epoch else None

    @property
    def damage(self) -> BadOverlay | None:
        """How the overlay is damaged, according to the tables that have been read: all of them, after `count`."""
        return self._tables.damage if self._uncountable is None else self._uncountable.fresh()

    @property
    def _slices(self) -> int:
        return -(-self._geometry.clusters // self._tables.slice_entries)

    async def count(self) -> None:
        """Count the missing clusters once. From then on `total` is kept exact.

        May run concurrently with readers, writers and other counts: `less` keeps the slices below `_counted_to` up to
        date.

        Raises:
            BadOverlay: an L1 entry points to an invalid place. All other tables have been read even so, because
                their bad entries have to be marked.
        """
        for turn in itertools.count():
            if turn % COUNT_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if self._epoch != self._tables.epoch:
                # A failed barrier has taken entries back, so counted clusters may be missing now.
                self._epoch = self._tables.epoch
                self._total, self._counted_to, self._counted = None, 0, 0
            number = self._counted_to
            if number >= self._slices:  # again each time, as the image may grow
                break
            try:
                missing = await self._gap(number << self._shift)
                stop = number - (-missing >> self._shift)
                if not missing:
                    part = await self._tables.entries(number)
                    inside = min(self._tables.slice_entries, self._geometry.clusters - (number << self._shift))
                    missing = count_missing(part if inside == len(part) else part[:inside], self._geometry.cluster_size)
                    stop = number + 1
            except BadOverlay as exc:
                self._uncountable = self._uncountable or exc
                missing, stop = 0, (number // self._tables.per_table + 1) * self._tables.per_table
            # There must be no await after the entries are examined: a cluster that got its entry in between would be
            # counted as missing for ever. Another task may be counting, too, and may have counted this slice while we
            # waited for it.
            if number == self._counted_to and self._epoch == self._tables.epoch:
                self._counted += missing
                self._counted_to = stop
        if self._uncountable is not None:
            raise self._uncountable.fresh()
        self._total = self._counted

    def less(self, number: int, count: int) -> None:
        """Count `count` clusters less in a slice, as they are not missing any more; more if it is negative."""
        # In a slice that the count has not reached yet, it will find the new entries.
        if number < self._counted_to:
            self._counted -= count
            if self._total is not None:
                self._total -= count

    def grow(self, geometry: Geometry) -> None:
        """Count what a larger image adds. The slice of its last cluster so far is in memory, or has no entries."""
        per_slice = self._tables.slice_entries
        number, first = divmod(self._geometry.clusters, per_slice)
        self._geometry = geometry
        if first and number < self._counted_to:
            # The count has included this slice, up to the old end.
            stop = min(per_slice, geometry.clusters - number * per_slice)
            part = self._tables.slices.get(number)
            self._counted += stop - first if part is None else part[first:stop].count(MISSING)
        if self._total is not None:
            self._total = self._counted if self._counted_to >= self._slices else None
