"""A small font for the legend of a picture: the characters that a legend needs, drawn as they look.

Pure. A glyph is five dots wide and eight high, of which the last row is for descenders; one column separates glyphs.
"""

from __future__ import annotations

from collections.abc import Iterator

HEIGHT = 8  # dots
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
    """(column, row) of every dot that is set when `text` is written from (0, 0) on. A blank sets none."""
    for at, character in enumerate(text):
        for y, row in enumerate(_GLYPHS[character] if character != " " else []):
            yield from ((at * ADVANCE + x, y) for x, dot in enumerate(row) if dot == "#")
