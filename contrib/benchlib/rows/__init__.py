"""All rows, in the order of the table."""

from __future__ import annotations

from ..values import Row
from . import complete, stream

ROWS: tuple[Row, ...] = (*stream.ROWS, *complete.ROWS)
