"""A full overlay of 1 TiB, of which only the tables are on the disk: opened, checked, and its map told."""

from __future__ import annotations

import contextlib
import sys
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import trio

from qedfs.overlay.open import open_overlay
from tests.harness.require import require
from tests.overlay.images import empty

from .. import processor
from ..figures import KIB
from ..lab import Lab
from ..values import QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_SIZE = 1 << 40
_CLUSTER = 64 * KIB
_FACTOR = 0x9E3779B1  # odd, so that a multiplication modulo a power of two is another order
_SECONDS = 240.0
_TRIES = 2

IN_A_ROW, BETWEEN, SCATTERED = "in a row", "between", "scattered"
# What is asked of each overlay. A map of scattered clusters is a list of 16.8 million: printing it would be measured.
_COMMANDS = {IN_A_ROW: ("info", "check", "map"), BETWEEN: ("info", "check", "map"), SCATTERED: ("info", "check")}


def _write_overlay(path: Path, layout: str) -> None:
    """All tables before the data, or each before its own data as they come to be; or before data in no order."""
    built = empty(cluster_size=_CLUSTER, table_size=4, image_size=_SIZE, backing=b"")
    shape = built.header.geometry
    count, span = shape.l1_used, shape.entries * _CLUSTER
    tables, data = len(built.data), len(built.data) + count * shape.table_bytes
    with path.open("wb") as file:
        file.truncate(data + _SIZE)
        for index in range(count):
            table, first = tables + index * shape.table_bytes, data + index * span
            if layout == BETWEEN:
                table += index * span
                first = table + shape.table_bytes
            entries = array("Q", range(first, first + span, _CLUSTER))
            if layout == SCATTERED:
                numbers = range(index * shape.entries, (index + 1) * shape.entries)
                entries = array("Q", (data + number * _FACTOR % shape.clusters * _CLUSTER for number in numbers))
            built.put_u64(built.header.l1_table_offset + 8 * index, table)
            file.seek(table)
            file.write(entries.tobytes())
        file.seek(0)
        file.write(built.data)


async def _end_session(path: Path) -> None:
    """Let the overlay say that its last session has ended in order; otherwise `check` trusts no page cache."""
    await (await open_overlay(str(path), writable=True)).close()


def _measured(tool: dict[str, list[str]], overlays: dict[str, Path]) -> Outcome:
    figures: dict[str, float] = {}
    for layout, overlay in overlays.items():
        names = _COMMANDS[layout]
        found = processor.cpu_ms(_TRIES, _SECONDS, *([*tool[name], str(overlay)] for name in names))
        figures |= {f"{name} ms, {layout}": value for name, value in zip(names, found, strict=True)}
    return Outcome(figures.pop(f"check ms, {IN_A_ROW}"), figures)


def _ours(overlays: dict[str, Path]) -> Outcome:
    words = [sys.executable, "-m", "qedfs"]
    outcome = _measured(
        {"info": [*words, "info"], "check": [*words, "check"], "map": [*words, "map", "--json"]}, overlays
    )
    (start,) = processor.cpu_ms(_TRIES, _SECONDS, [*words, "--version"])
    return Outcome(outcome.value, {"start ms": start, **outcome.figures})


def _qemu(overlays: dict[str, Path]) -> Outcome:
    words = [require("qemu-img")]
    # It counts the clusters of the file too high, and so tells of leaks: exit code 3.
    check = ["sh", "-c", f'{words[0]} check -f qed "$0" || [ $? -eq 3 ]']
    info, told = [*words, "info", "-f", "qed"], [*words, "map", "--output=json", "-f", "qed"]
    return _measured({"info": info, "check": check, "map": told}, overlays)


@contextlib.contextmanager
def _prepare(lab: Lab) -> Iterator[Contenders]:
    overlays = {layout: lab.fresh("full.qed") for layout in _COMMANDS}
    try:
        for layout, path in overlays.items():
            _write_overlay(path, layout)
            trio.run(_end_session, path)
        yield {QEDFS: partial(_ours, overlays), QEMU: partial(_qemu, overlays)}
    finally:
        for path in overlays.values():
            path.unlink(missing_ok=True)


ROWS = (
    Row(
        "full-1t",
        "check a full overlay of 1 TiB whose tables lie in a row, before the data",
        Unit.MILLISECONDS,
        _prepare,
        (Target(1, against=QEMU),),
        note="processor time; between: each table before its data; scattered: data in no order",
        runs=3,
    ),
)
