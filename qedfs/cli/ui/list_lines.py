"""The list of mounts for people: a table and troubles. Pure: entries of `qedfs list --json` -> lines of text.

Owns the columns. Must not know how mounts are found or asked (`cli/commands/list.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qedfs.cli.ui.layout import printable, table, wrapped
from qedfs.cli.ui.status_lines import percent, states_text

HEADER = ("mountpoint", "source", "images", "state", "local", "pid", "user")
ALIGNMENT = "<<><>><"


def list_lines(mounts: Sequence[Mapping[str, Any]], width: int | None = None) -> list[str]:
    """All mounts. Without a width, each mount and each trouble is one line."""
    if not mounts:
        return ["no mounts"]
    lines = list(table([HEADER, *map(_row, mounts)], ALIGNMENT, width))
    for mount in mounts:
        for text in _remarks(mount):
            line = printable(f"{mount['mountpoint']}: {text}")
            lines += [line] if width is None else wrapped(line, width)
    return lines


def _row(mount: Mapping[str, Any]) -> tuple[str, ...]:
    place, source, user = (printable(mount[key]) for key in ("mountpoint", "source", "user"))
    pid = "" if mount["pid"] is None else str(mount["pid"])
    if mount["states"] is None:
        return (place, source, "", mount["state"], "", pid, user)
    local = percent(mount["populated"], mount["total"]) if mount["image_count"] else ""
    return (place, source, str(mount["image_count"]), _state(mount), local, pid, user)


def _state(mount: Mapping[str, Any]) -> str:
    states = mount["states"]
    return next(iter(states)) if mount["image_count"] == 1 else states_text(states) or "no overlays"


def _remarks(mount: Mapping[str, Any]) -> list[str]:
    copies = mount["copies"]
    error = [] if mount["error"] is None else [mount["error"]]
    return [*error, *([f"is also mounted at {', '.join(copies)}"] if copies else [])]
