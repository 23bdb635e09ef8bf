"""What a power cut anywhere in a recorded stream leaves of the image, as two readers see it: ours and QEMU's.

Owns the walk over all states of a log, and what counts as lost: every byte that reads otherwise than the backing. The
states are those of `cuts.py`; beside the bytes, each has to keep the promises of `examine.py`. A stream writes nothing
of its own: in every state the image has to read as the backing does. Must not know whose stream it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import trio

from qedfs.errors import QedfsError
from qedfs.overlay.check import check
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage, Written
from tests.harness.images import Check, qemu_check
from tests.harness.require import require
from tests.model import SECTOR
from tests.overlay.cuts import Disk, Truncation
from tests.overlay.examine import Broken, examine, read_content
from tests.overlay.powercut import states
from tests.overlay.scenario import BACKING_NAME, History

EVERY_CHOICE = 1 << 20  # more than a position has


class Stretch(NamedTuple):
    """Bytes of the image."""

    pos: int
    size: int


class Loss(NamedTuple):
    """One state and what it has lost."""

    cut: Truncation
    lost: tuple[Stretch, ...]
    zeros: bool  # whether all of that reads as zeros
    checked: Check  # by `qemu-img check`


@dataclasses.dataclass
class Tally:
    """What was seen."""

    states: int = 0  # that differ from one another
    losses: list[Loss] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)  # other promises, and readers that disagree


def replay_stream(history: History, folder: Path, *, seed: int = 0, only_losses: bool = False) -> Tally:
    """Look at every state at every position of the log of a stream.

    Args:
        folder: where QEMU gets to see the states, best in memory.
        seed: of the choices that are made at random, above all how far the file has grown.
        only_losses: QEMU gets to see only the states that have lost something, and the others are not looked into.
    """
    (folder / BACKING_NAME).write_bytes(history.scenario.backing)
    return trio.run(_replay_stream, history, folder, seed, only_losses)


async def _replay_stream(history: History, folder: Path, seed: int, only_losses: bool) -> Tally:
    tally = Tally()
    for cut, image in _distinct_states(history, random.Random(seed)):
        tally.states += 1
        if only_losses and await read_content(image, history.scenario.base) == history.scenario.base:
            continue
        try:
            await _judge(tally, history, cut, image, folder)
        except (Broken, QedfsError, RuntimeError) as exc:
            tally.broken.append(f"position {cut.position}: {exc}")
    return tally


def _distinct_states(history: History, rng: random.Random) -> Iterator[tuple[Truncation, bytearray]]:
    seen: set[tuple[bytes, bool]] = set()
    for cut, image in states(history, EVERY_CHOICE, rng):
        # The same bytes are another state once the end of the stream has been reported.
        key = hashlib.blake2b(image).digest(), history.detached_at <= cut.position
        if key not in seen:
            seen.add(key)
            yield cut, image


async def _judge(tally: Tally, history: History, cut: Truncation, image: bytearray, folder: Path) -> None:
    """Count a loss; raise what else is wrong. RuntimeError: QEMU cannot read it."""
    base = history.scenario.base
    content = await read_content(image, base)
    theirs, checked = _seen_by_qemu(image, folder)
    if theirs != content:
        raise Broken("QEMU and qedfs read different bytes")
    if checked != _seen_by_us(image):
        raise Broken(f"qemu-img check: {checked}, qedfs: {_seen_by_us(image)}")
    lost = tuple(differing(content, base))
    if lost:
        zeros = not any(any(content[pos : pos + size]) for pos, size in lost)
        tally.losses.append(Loss(cut, lost, zeros, checked))
        return
    await examine(image, history, cut.position, random.Random(tally.states))


def differing(one: bytes, other: bytes) -> Iterator[Stretch]:
    """The stretches of whole sectors in which two images of one size differ."""
    start = None
    for pos in range(0, len(one) + SECTOR, SECTOR):
        if one[pos : pos + SECTOR] != other[pos : pos + SECTOR]:
            start = pos if start is None else start
        elif start is not None:
            yield Stretch(start, pos - start)
            start = None


def _seen_by_us(image: bytearray) -> Check:
    storage = MemoryStorage(image, writable=False)
    report = check(storage, read_header(storage)[0])
    return Check(report.corruptions, report.leaks)


def _seen_by_qemu(image: bytearray, folder: Path) -> tuple[bytes, Check]:
    """The image as QEMU reads it, and what it thinks of the tables."""
    state, raw = folder / "state.qed", folder / "state.raw"
    state.write_bytes(image)
    checked = qemu_check(state)
    argv: list[str | Path] = [require("qemu-img"), "convert", "-f", "qed", "-O", "raw", state, raw]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"qemu-img convert: {done.stderr.strip()}")
    return raw.read_bytes(), checked


def describe(history: History, cut: Truncation) -> str:
    """Which of the writes that no barrier had covered are on the disk in a state, and which are not."""
    log = history.storage.log
    disk = Disk(history.storage.start, log)
    disk.advance(cut.position)
    there = {piece.place: piece for piece in cut.pieces}
    words = []
    for index in disk.pending():
        entry, piece = log[index], there.get(index)
        if isinstance(entry, Written):
            place = f"{len(entry.data)} bytes at {entry.offset:#x}" if entry.offset else "the header"
            torn = piece is not None and piece.stop - piece.start < len(entry.data)
            words.append(f"{place} {'missing' if piece is None else 'torn' if torn else 'written'}")
    return ", ".join(words)
