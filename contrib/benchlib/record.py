"""The record of a run, for machines."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .values import Result, RowResult


def to_json(facts: Mapping[str, str], runs: int, quick: bool, measured: Sequence[RowResult]) -> str:
    """Everything: the machine, and for each row every run of every contender."""
    whole = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": dict(facts),
        "runs": runs,
        "quick": quick,
        "rows": [_row(found) for found in measured],
    }
    return json.dumps(whole, indent=1) + "\n"


def _row(measured: RowResult) -> dict[str, Any]:
    row = measured.row
    return {
        "name": row.name,
        "title": row.title,
        "unit": row.unit.label,
        "targets": [dataclasses.asdict(verdict) for verdict in measured.verdicts()],
        "load_average": measured.load_average,
        "seconds": round(measured.seconds, 1),
        "contenders": {name: _result(result) for name, result in measured.results.items()},
    }


def _result(result: Result) -> dict[str, Any]:
    if not result.outcomes:
        return {"error": result.error}
    return {
        "median": result.median,
        "spread": result.spread,
        "scaled": result.scaled,
        "values": [outcome.value for outcome in result.outcomes],
        "figures": result.figures(),
        "error": result.error or None,
    }
