"""The command blocks of the user's documents. Owns how a document says what runs a block. Must not run anything.

A block is fenced by ``` without a language. A comment on the line before it, which no reader sees, says what runs it:
`<!-- run: tour -->`, or `<!-- run: look (root) -->` if the commands need root. Blocks of one name run in one folder, in
the order of the document. `<!-- tried by: contrib/test-package -->` names a file that runs them, or compares with them,
elsewhere. Output has the language `console`, a file its own (`toml`, `fstab`).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>[^\n]*) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_COMMENT = re.compile(r"run: (?P<name>[a-z-]+)(?P<root> \(root\))?|tried by: (?P<elsewhere>\S+)")


@dataclasses.dataclass(frozen=True)
class Block:
    """Commands of a document."""

    document: str
    line: int
    commands: str
    recipe: str  # the name that its comment gives; "" if something else runs it
    root: bool
    elsewhere: str  # the file that runs it; "" if it has a recipe


class Unmarked(ValueError):
    """A block that nothing runs."""


def documents() -> list[Path]:
    """README and the guide's pages."""
    return [ROOT / "README.md", *sorted((ROOT / "contrib/docs").glob("*.md"))]


def files(path: Path, language: str) -> list[str]:
    """What a document shows of files, such as `toml`, in order."""
    return [match["text"] for match in _BLOCK.finditer(path.read_text()) if match["language"] == language]


def commands_tried_by(file: str) -> list[str]:
    """The commands of all blocks whose comment names this file."""
    return [block.commands for path in documents() for block in blocks(path) if block.elsewhere == file]


def blocks(path: Path) -> list[Block]:
    """The command blocks of a document, in order.

    Raises:
        Unmarked: there is no comment before one, or it says something else.
    """
    text = path.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        if match["language"]:
            continue
        line = text.count("\n", 0, match.start("text")) + 1
        said = _COMMENT.fullmatch(match["comment"] or "")
        if said is None:
            raise Unmarked(f"{path.name}:{line}: no comment says what runs these commands: {match['comment']}")
        found.append(
            Block(
                document=path.name,
                line=line,
                commands=match["text"],
                recipe=said["name"] or "",
                root=bool(said["root"]),
                elsewhere=said["elsewhere"] or "",
            )
        )
    return found


def recipes(path: Path) -> dict[str, list[Block]]:
    """The blocks that run here, by recipe."""
    found: dict[str, list[Block]] = {}
    for block in blocks(path):
        if block.recipe:
            found.setdefault(block.recipe, []).append(block)
    return found
