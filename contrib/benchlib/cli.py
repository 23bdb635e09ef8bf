"""The command line of the bench."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import busy, machine, matrix, picture, record
from .lab import laboratory
from .rows import ROWS
from .run import measure, to_stderr
from .table import row_text
from .values import Row, RowResult

_RUNS = 5
_QUICK_RUNS = 2


def main() -> None:
    """Measures what was asked for and prints it."""
    options = _parser().parse_args()
    if options.list:
        print("\n".join(f"{row.name:<24} {row.title}" for row in ROWS))
        return
    rows = _chosen(options.rows)
    runs = options.runs or (_QUICK_RUNS if options.quick else _RUNS)
    # An orderly end on SIGTERM as well: mounts and servers are taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine.mount_fusectl()
    facts = machine.describe(options.folder)
    print("\n".join(f"{name:<20} {fact}" for name, fact in facts.items()), flush=True)
    if options.matrix:
        _measure_matrix(runs, options)
        return
    measured = _measure_all(rows, runs, options)
    if options.json:
        options.json.write_text(record.to_json(facts, runs, options.quick, measured))
    if options.plot:
        options.plot.write_text(picture.to_svg(measured))


def _measure_all(rows: Sequence[Row], runs: int, options: argparse.Namespace) -> list[RowResult]:
    began = time.monotonic()
    measured = []
    with (
        laboratory(options.folder, quick=options.quick, nice=options.nice) as lab,
        busy.processors(options.busy),
    ):
        for row in rows:
            measured.append(measure(lab, row, runs, to_stderr if options.verbose else _silent))
            print(f"\n{row_text(measured[-1])}", flush=True)
    told = [verdict.met for found in measured for verdict in found.verdicts() if verdict.met is not None]
    seconds, load = time.monotonic() - began, os.getloadavg()[0]
    print(f"\n{sum(told)} of {len(told)} targets met; {runs} runs, {seconds:.0f} s, load average {load:.1f}")
    return measured


def _measure_matrix(runs: int, options: argparse.Namespace) -> None:
    print(f"\n{'operations per second':<34} {'qedfs':>9} {'qemu':>9}  ratio")
    with (
        laboratory(options.folder, quick=options.quick, nice=options.nice) as lab,
        busy.processors(options.busy),
    ):
        cells = matrix.measure(lab, runs, lambda cell: print(matrix.line(cell), flush=True))
    print(f"{matrix.summary(cells)}; load average {os.getloadavg()[0]:.1f}")


def _silent(_: str) -> None:
    pass


def _chosen(names: str | None) -> Sequence[Row]:
    if names is None:
        return ROWS
    by_name = {row.name: row for row in ROWS}
    unknown = [name for name in names.split(",") if name not in by_name]
    if unknown:
        _refuse(f"no row {', '.join(unknown)}; --list tells them")
    return [by_name[name] for name in names.split(",")]


def _refuse(text: str) -> NoReturn:
    print(f"bench: {text}", file=sys.stderr)
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="Measures qedfs next to QEMU and others, in one run.")
    parser.add_argument("--rows", metavar="NAME,...", help="only these")
    parser.add_argument(
        "--matrix", action="store_true", help="reads and writes of all sizes and depths, instead of rows"
    )
    parser.add_argument("--busy", action="store_true", help="with other work on all processors")
    parser.add_argument("--list", action="store_true", help="tell the rows and end")
    parser.add_argument(
        "--runs", type=int, metavar="N", help=f"of each contender (default: {_RUNS}; {_QUICK_RUNS} if quick)"
    )
    parser.add_argument("--quick", action="store_true", help="less work per row: five minutes for all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the ratios")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="work folder, on the disk to measure")
    parser.add_argument(
        "--nice", type=int, default=0, metavar="N", help="for all contenders, on a machine that is shared"
    )
    parser.add_argument("--verbose", action="store_true", help="tell each run as it ends")
    return parser
