"""A small bitmap font with the characters that the legend of a map picture needs.

Pure. A glyph is five dots wide and eight high; the last row is for descenders. One empty column separates glyphs.
"""

from __future__ import annotations

from collections.abc import Iterator

ADVANCE = 6  # dots from one glyph to the next

_DRAWN = {
    "0123456789.,BGKMPT": """
.###. ..#.. .###. .###. ...#. ##### ..##. ##### .###. .###. ..... ..... ####. .###. #...# #...# ####. #####
#...# .##.. #...# #...# ..##. #.... .#... ....# #...# #...# ..... ..... #...# #...# #..#. ##.## #...# ..#..
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...# ..... ..... #...# #.... #.#.. #.#.# #...# ..#..
#.#.# ..#.. ...#. ..##. #..#. ....# ####. ..#.. .###. .#### ..... ..... ####. #.### ##... #.#.# ####. ..#..
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....# ..... ..... #...# #...# #.#.. #...# #.... ..#..
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#. .##.. .##.. #...# #...# #..#. #...# #.... ..#..
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##.. .##.. ..#.. ####. .###. #...# #...# #.... ..#..
..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... .....
""",
    "acdegilmnoprstwz": """
..... ..... ....# ..... ..... ..#.. .##.. ..... ..... ..... ..... ..... ..... .#... ..... .....
..... ..... ....# ..... ..... ..... ..#.. ..... ..... ..... ..... ..... ..... .#... ..... .....
.###. .###. .##.# .###. .#### .##.. ..#.. ##.#. #.##. .###. ####. #.##. .#### ###.. #...# #####
....# #.... #..## #...# #...# ..#.. ..#.. #.#.# ##..# #...# #...# ##..# #.... .#... #...# ...#.
.#### #.... #...# ##### #...# ..#.. ..#.. #.#.# #...# #...# #...# #.... .###. .#... #.#.# ..#..
#...# #...# #...# #.... .#### ..#.. ..#.. #...# #...# #...# ####. #.... ....# .#..# #.#.# .#...
.#### .###. .#### .###. ....# .###. .###. #...# #...# .###. #.... #.... ####. ..##. .#.#. #####
..... ..... ..... ..... .###. ..... ..... ..... ..... ..... #.... ..... ..... ..... ..... .....
""",
}


def _glyphs() -> Iterator[tuple[str, list[str]]]:
    for characters, art in _DRAWN.items():
        rows = [line.split() for line in art.strip().splitlines()]
        yield from ((character, [row[at] for row in rows]) for at, character in enumerate(characters))


_GLYPHS = dict(_glyphs())


def dots(text: str) -> Iterator[tuple[int, int]]:
    """Yield (column, row) of each dot of `text`, whose first glyph has its top left corner at (0, 0).

    A blank has no dots. Every other character must have a glyph.
    """
    for at, character in enumerate(text):
        for y, row in enumerate(_GLYPHS[character] if character != " " else []):
            yield from ((at * ADVANCE + x, y) for x, dot in enumerate(row) if dot == "#")
