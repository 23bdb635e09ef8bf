"""The measured rows as text: one block per row, so that it is read in a terminal as it grows."""

from __future__ import annotations

from .values import QEDFS, Result, RowResult, Unit, Verdict

_NAME_WIDTH = 16


def row_text(measured: RowResult) -> str:
    """A row: its title and verdicts, then a line for each contender with its by-products."""
    row = measured.row
    lines = [f"{row.name}: {row.title}  ({measured.seconds:.0f} s, load average {measured.load_average:.1f})"]
    lines += [f"  target  {verdict_text(verdict, row.unit)}" for verdict in measured.verdicts()]
    ours = measured.results.get(QEDFS)
    lines += [f"  {_contender(name, result, ours, row.unit)}" for name, result in measured.results.items()]
    if row.note:
        lines.append(f"  ({row.note})")
    return "\n".join(lines)


def verdict_text(verdict: Verdict, unit: Unit) -> str:
    """A target in words, and whether it is met."""
    target = verdict.target
    if target.figure:
        wanted = f"{target.figure} at most {target.bound:g}"
    else:
        bound = "at least" if unit.higher_is_better else "at most"
        wanted = f"{bound} {target.bound:g} {f'of {target.against}' if target.against else unit.label}"
    if verdict.reached is None:
        return f"{wanted}: not measured"
    return f"{wanted}: {number(verdict.reached)}, {'met' if verdict.met else 'NOT MET'}"


def _contender(name: str, result: Result, ours: Result | None, unit: Unit) -> str:
    if not result.outcomes:
        return f"{name:<{_NAME_WIDTH}} {result.error or 'did not run'}"
    text = f"{name:<{_NAME_WIDTH}} {number(result.median):>8} {unit.label:<5} ±{result.spread / 2:4.0%}"
    if ours is not None and ours.outcomes and name != QEDFS:
        text += f"  qedfs is {unit.advantage(ours.median, result.median):.2f} times as good"
    if result.scaled:
        text += "; of a part, scaled"
    figures = ", ".join(f"{label} {number(value)}" for label, value in result.figures().items())
    return text + (f"  [{figures}]" if figures else "") + (f"  then: {result.error}" if result.error else "")


def number(value: float) -> str:
    """Three digits that matter, without an exponent."""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
