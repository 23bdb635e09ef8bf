"""All rows, in the order of the table."""

from __future__ import annotations

from ..values import Row
from . import (
    barriers,
    beside,
    cold,
    complete,
    defrag,
    export,
    fresh,
    full,
    guest,
    many,
    sparse,
    start,
    stream,
    thousand,
    whole,
)

ROWS: tuple[Row, ...] = (
    *stream.ROWS,
    *cold.ROWS,
    *complete.ROWS,
    *fresh.ROWS,
    *guest.ROWS,
    *many.ROWS,
    *barriers.ROWS,
    *beside.ROWS,
    *sparse.ROWS,
    *full.ROWS,
    *start.ROWS,
    *thousand.ROWS,
    *whole.ROWS,
    *export.ROWS,
    *defrag.ROWS,
)
