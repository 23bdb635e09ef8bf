"""Commits an overlay into its backing: the backing gets the overlay's own clusters, which the overlay then drops.

Owns the order of writes in two files. Must not know how the backing is found, opened or allowed, nor its format.

At every moment, also after a kill or a power cut, the overlay over the backing reads as before, and a mount serves it:

1. The record of the overlay says, durably, that a commit is going on. The pin of before does not count any more, as the
   backing is about to get another mtime. In its place come samples of what the commit leaves alone: blocks where the
   overlay has nothing. So a mount still notices another version. Without this step, a mount would refuse the backing.
2. The backing grows to the size of the image, and gets the overlay's bytes. The overlay still has them, and they win.
3. The backing becomes durable with its times. Otherwise the entries could go before the bytes of the backing are there.
4. The record gets the pin of the backing as it is now. If this came after step 5, a mount would serve an overlay that
   needs the backing for everything over a version of which nothing but samples is known.
5. The entries of the overlay go, and then its file is cut off (`Session.drop_committed`). Any of them that a power cut
   leaves refers to the same bytes as the backing has.

If it is interrupted, the same again ends it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from qedfs.format.record import Pin, Record, Standby, digest
from qedfs.format.tables import MISSING, ZERO
from qedfs.image.commit_target import Target
from qedfs.overlay.clustermap import Run
from qedfs.overlay.overlay import Overlay
from qedfs.source.samples import BLOCK_BYTES, MOST_LOOKED_AT, Samples

PIECE_BYTES = 4 << 20
LOOKS = 32  # for samples, spread over what is missing
LOOK_BYTES = BLOCK_BYTES * MOST_LOOKED_AT

Renewed = Callable[[str], Awaitable[Pin]]


@dataclasses.dataclass(slots=True)
class Committed:
    """Bytes of the overlay: of its data and of its zero clusters. `written`: of the backing, where it was different.

    `grown`: by how much the disk of the backing became longer.
    """

    data: int = 0
    zeros: int = 0
    written: int = 0
    grown: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Pinning:
    """How the overlay's pin follows a backing that a mount can read.

    `renewed`: the pin of the backing as it is when this is called, with these samples.
    """

    renewed: Renewed


async def copy(
    overlay: Overlay, runs: Sequence[Run], target: Target, progress: Callable[[int], None], result: Committed
) -> None:
    """Step 2. `runs`: the image, or a part of it, of which missing ones are left out. `result` is counted up.

    Raises QedfsError: of either file.
    """
    if target.size < overlay.image_size:
        result.grown = overlay.image_size - target.size
        await target.grow(overlay.image_size)
    buffer = bytearray(PIECE_BYTES)
    for run in runs:
        if run.offset == ZERO:
            result.written += await target.zero(run.pos, run.size)
            result.zeros += run.size
            progress(run.size)
        elif run.offset != MISSING:
            for done in range(0, run.size, PIECE_BYTES):
                view = memoryview(buffer)[: min(PIECE_BYTES, run.size - done)]
                await overlay.read_data(run.offset + done, view)
                result.written += await target.store(run.pos + done, view)
                result.data += len(view)
                progress(len(view))


async def commit_down(
    overlay: Overlay,
    runs: Sequence[Run],
    target: Target,
    pinning: Pinning | None,
    progress: Callable[[int], None],
    *,
    keep: bool,
) -> Committed:
    """Commit all runs of a writable overlay, which nobody else uses. It is closed afterwards, also after an error.

    `pinning`: None if the backing is of a kind that qedfs does not read, so that the overlay has no pin. `keep`: the
    overlay keeps its clusters.

    Raises:
        QedfsError: a file failed. The image reads as before, and another call goes on.
    """
    open_yet = True
    try:
        result, pin = await _committed(overlay, runs, target, pinning, progress)
        await overlay.change_record(lambda record: dataclasses.replace(record, pin=pin, committing=False))
        if not keep:
            open_yet = False
            with trio.CancelScope(shield=True):
                await overlay.drop_committed()
    finally:
        if open_yet:
            with trio.CancelScope(shield=True):
                await overlay.close()
    return result


async def _committed(
    overlay: Overlay, runs: Sequence[Run], target: Target, pinning: Pinning | None, progress: Callable[[int], None]
) -> tuple[Committed, Pin | None]:
    """Steps 1 to 3. Returns the pin of the backing for step 4."""
    await overlay.flush()
    samples = "" if pinning is None else (await _samples(runs, target)).encode()
    known = None if pinning is None else Pin(digest(overlay.backing or ""), target.size, samples=samples)
    await overlay.change_record(lambda record: begun(record, known))
    await target.begin()
    result = Committed()
    await copy(overlay, runs, target, progress, result)
    # After the reads: if another program has cut the overlay off, they were zeros.
    await overlay.inspect()
    await target.sync()
    await target.rest()
    return result, None if pinning is None else await pinning.renewed(samples)


def begun(record: Record, pin: Pin | None) -> Record:
    """The record of step 1. `pin`: of the size of the backing, with samples."""
    # A guest's bytes go where the way back to standby would not find them any more.
    standby = Standby.ACTIVE if record.standby is Standby.REVOCABLE else record.standby
    return dataclasses.replace(record, pin=pin, committing=True, standby=standby)


async def _samples(runs: Sequence[Run], target: Target) -> Samples:
    """Samples of the backing where the overlay has nothing."""
    samples, size = Samples(), target.size
    for pos, length in _looks([(run.pos, min(run.size, size - run.pos)) for run in runs if run.offset == MISSING]):
        await target.sample(pos, length, samples)
    return samples


def _looks(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Up to LOOKS places (pos, size), spread evenly over the ranges, whose sizes may be negative."""
    inside = [(pos, size) for pos, size in ranges if size > 0]
    step = max(LOOK_BYTES, sum(size for _, size in inside) // LOOKS // BLOCK_BYTES * BLOCK_BYTES)
    skip = 0  # bytes until the next look
    for pos, size in inside:
        for at in range(skip, size, step):
            yield pos + at, min(LOOK_BYTES, size - at)
        skip = (skip - size) % step
