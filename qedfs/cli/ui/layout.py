"""Text layout for terminals: escaping, shortening, wrapping, columns.

Pure. Owns which characters are escaped, and how wide a text is. Must not know what it says. Widths are in terminal
cells; a Chinese character takes two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

CUT = "..."  # ASCII: every terminal has it
COLUMN_GAP = "  "
HANGING = "  "
LEAST_FOLD = 8  # minimum width of the column that folds
MOST_LISTED = 3


def printable(text: str) -> str:
    """The text with control characters escaped: they could move the cursor, change colours or reorder text.

    Needed because names of files and backings, and the answers of servers, may hold anything.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cell_len(text: str) -> int:
    """How many cells of a terminal the text takes."""
    if text.isascii() and text.isprintable():
        return len(text)
    from rich import cells  # here, because loading it takes as long as a short command, which needs it rarely

    return cells.cell_len(text)


def padded(text: str, width: int, *, right: bool = False) -> str:
    """The text padded with blanks to `width` cells. A longer text is returned unchanged."""
    blanks = " " * (width - cell_len(text))
    return blanks + text if right else text + blanks


def shortened(text: str, width: int) -> str:
    """The text in at most `width` cells. Cuts the middle, since names and messages often differ at their ends."""
    if cell_len(text) <= width:
        return text
    if width <= len(CUT):
        return CUT[:width]
    from rich.cells import set_cell_size  # here: see `cell_len`

    tail = (width - len(CUT)) // 2
    head = width - len(CUT) - tail
    return set_cell_size(text, head) + CUT + set_cell_size(text[::-1], tail)[::-1]


def wrapped(text: str, width: int) -> Iterator[str]:
    """Lines of at most `width` cells, broken between words. All lines but the first are indented."""
    line = ""
    for word in text.split(" "):
        if not line:
            line = word
        elif cell_len(line) + 1 + cell_len(word) <= width:
            line += " " + word
        else:
            yield line
            line = HANGING + word
        while cell_len(line) > width:
            first, *rest = _chopped(line, max(width, len(HANGING) + 2))
            yield first
            line = HANGING + "".join(rest)
    yield line


def _chopped(text: str, width: int) -> list[str]:
    """The text in parts of at most `width` cells."""
    if cell_len(text) <= width:
        return [text]
    from rich.cells import chop_cells  # here: see `cell_len`

    return chop_cells(text, width)


def table(
    rows: Sequence[Sequence[str]], alignment: str, width: int | None = None, *, cut: bool = False
) -> Iterator[str]:
    """Rows as lines. `alignment`: "<" or ">" per column.

    If the rows are wider than `width`, the first column folds over several lines, or is shortened if `cut`.
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        others = sum(widths[1:]) + len(COLUMN_GAP) * (len(widths) - 1)
        widths[0] = min(widths[0], max(LEAST_FOLD, width - others))
    for first, *rest in rows:
        name, *folded = [shortened(first, widths[0])] if cut or not first else _chopped(first, widths[0])
        cells = zip([name, *rest], widths, alignment, strict=True)
        yield COLUMN_GAP.join(padded(cell, size, right=side == ">") for cell, size, side in cells).rstrip()
        yield from folded


def listed(names: Sequence[str], most: int = MOST_LISTED) -> str:
    """The first few names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
