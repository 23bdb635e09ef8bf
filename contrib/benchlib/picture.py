"""A picture of a run as SVG: for each row, how qedfs stands to the others on a logarithmic scale.

To the right of the middle qedfs is better, each step by a factor of two. Written by hand: no library to install.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .table import number
from .values import QEDFS, RowResult

_ROW_HEIGHT = 20
_LABEL_WIDTH = 190
_STEP_WIDTH = 90  # of a factor of two
_STEPS = 5  # factors of two that are drawn to the right; to the left there are fewer
_LEFT_STEPS = 2
_TOP = 46
_WIDTH = _LABEL_WIDTH + (_LEFT_STEPS + _STEPS) * _STEP_WIDTH + 40
_COLOURS = {"qemu": "#d9822b", "nbdkit": "#7961db", "limit": "#5c7080"}
_OTHER_COLOUR = "#2965cc"


def to_svg(measured: Sequence[RowResult]) -> str:
    """The whole picture."""
    rows = [found for found in measured if _comparisons(found)]
    height = _TOP + len(rows) * _ROW_HEIGHT + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        *_legend(),
        *_grid(height),
    ]
    for place, found in enumerate(rows):
        lines += _row(found, _TOP + place * _ROW_HEIGHT + _ROW_HEIGHT // 2)
    return "\n".join([*lines, "</svg>", ""])


def _comparisons(measured: RowResult) -> dict[str, float]:
    """How many times better qedfs is than each other contender."""
    ours = measured.results.get(QEDFS)
    if ours is None or not ours.outcomes or not ours.median:
        return {}
    found = {}
    for name, result in measured.results.items():
        if name != QEDFS and result.outcomes and result.median:
            found[name] = measured.row.unit.advantage(ours.median, result.median)
    return found


def _x(advantage: float) -> float:
    steps = max(-_LEFT_STEPS, min(_STEPS, math.log2(advantage)))
    return _LABEL_WIDTH + (_LEFT_STEPS + steps) * _STEP_WIDTH


def _legend() -> list[str]:
    lines = [_text(8, 16, "qedfs is ... times as good as")]
    for place, (name, colour) in enumerate([*_COLOURS.items(), ("another contender of the row", _OTHER_COLOUR)]):
        x = _LABEL_WIDTH + place * _STEP_WIDTH
        lines += [f'<circle cx="{x}" cy="12" r="4" fill="{colour}"/>', _text(x + 8, 16, name)]
    return lines


def _grid(height: int) -> list[str]:
    lines = []
    for step in range(-_LEFT_STEPS, _STEPS + 1):
        x, colour = _x(2.0**step), "#182026" if step == 0 else "#dddddd"
        lines.append(f'<line x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{height - 14}" stroke="{colour}"/>')
        lines.append(_text(x - 6, _TOP - 10, f"{2.0**step:g}"))
    return lines


def _row(measured: RowResult, y: int) -> list[str]:
    lines = [_text(8, y + 4, measured.row.name)]
    for name, advantage in _comparisons(measured).items():
        colour = _COLOURS.get(name, _OTHER_COLOUR)
        title = f"<title>{escape(name)}: {number(advantage)}</title>"
        lines.append(f'<circle cx="{_x(advantage):.1f}" cy="{y}" r="4" fill="{colour}">{title}</circle>')
    return lines


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y}">{escape(text)}</text>'
