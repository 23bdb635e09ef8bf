"""The measured rows as text: one block per row, so that it is read in a terminal as it grows."""

from __future__ import annotations

from .values import QEDFS, Result, RowResult

_VALUE_WIDTH = 10


def row_text(measured: RowResult) -> str:
    """A row: its title and verdict, then a line for each contender."""
    row = measured.row
    lines = [f"{row.name}: {row.title}{_verdict(measured)}"]
    ours = measured.results.get(QEDFS)
    for name, result in measured.results.items():
        lines.append("  " + _contender(name, result, ours, measured))
    if row.note:
        lines.append(f"  ({row.note})")
    return "\n".join(lines)


def _verdict(measured: RowResult) -> str:
    target, ratio, met = measured.row.target, measured.ratio(), measured.met()
    if target is None:
        return ""
    unit = measured.row.unit
    wanted = "at least" if unit.higher_is_better else "at most"
    against = f" of {target.against}" if target.against else f" {unit.label}".rstrip()
    if ratio is None:
        return f"  [{wanted} {target.bound:g}{against}: not measured]"
    return f"  [{ratio:.3g}{against}, target {wanted} {target.bound:g}: {'met' if met else 'NOT MET'}]"


def _contender(name: str, result: Result, ours: Result | None, measured: RowResult) -> str:
    if not result.outcomes:
        return f"{name:<10} {result.error or 'did not run'}"
    unit = measured.row.unit
    text = f"{name:<10} {number(result.median):>{_VALUE_WIDTH}} {unit.label:<5} +-{result.spread / 2:4.0%}"
    if ours is not None and ours.outcomes and name != QEDFS:
        text += f"  qedfs is {unit.advantage(ours.median, result.median):.2f} times as good"
    if result.scaled:
        text += "  (of a part, scaled)"
    figures = "  ".join(f"{label} {number(value)}" for label, value in result.figures().items())
    return f"{text}  {figures}" if figures else text


def number(value: float) -> str:
    """Three digits that matter, without an exponent."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
