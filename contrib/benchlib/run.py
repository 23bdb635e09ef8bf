"""Measures rows: the contenders of a row by turns, A B A B, so that what the machine does meanwhile hits all alike."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from tests.harness.process import Died

from .lab import Lab
from .qmp import QmpFailed
from .values import Contenders, Outcome, Result, Row, RowResult

# What a contender can do wrong without the others having to suffer for it.
_FAILURES = (RuntimeError, OSError, subprocess.SubprocessError, Died, QmpFailed, LookupError, ValueError)

Progress = Callable[[str], None]


def measure(lab: Lab, row: Row, runs: int, progress: Progress) -> RowResult:
    """All runs of all contenders of one row."""
    began = time.monotonic()
    turns = min(runs, row.runs) if row.runs else runs
    try:
        with row.prepare(lab) as contenders:
            results = _by_turns(row, contenders, turns, progress)
    except _FAILURES as exc:
        results = {"set-up": Result((), _first_line(exc))}
        progress(f"  {row.name}: {_first_line(exc)}")
    return RowResult(row, results, os.getloadavg()[0], time.monotonic() - began)


def _by_turns(row: Row, contenders: Contenders, turns: int, progress: Progress) -> dict[str, Result]:
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    for _ in range(turns):
        for name, contender in contenders.items():
            if name in errors:
                continue
            try:
                outcome = contender()
            except _FAILURES as exc:
                errors[name] = _first_line(exc)
                progress(f"  {row.name} {name}: {exc}")
                continue
            outcomes[name].append(outcome)
            progress(f"  {row.name} {name}: {outcome.value:.4g} {row.unit.label}")
    return {name: Result(tuple(found), errors.get(name, "")) for name, found in outcomes.items()}


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0] if lines else ''}"


def to_stderr(text: str) -> None:
    """The usual progress."""
    print(text, file=sys.stderr, flush=True)
