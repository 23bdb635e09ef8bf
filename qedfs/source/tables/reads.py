"""Pieces of a request, and the few reads of the file that bring them.

Owns the rules by which neighbouring clusters become one piece and neighbouring pieces one read, and how many reads run
at the same time. Must not know what a table entry means. `at` is a position in the caller's buffer, `offset` one in the
file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import trio

from qedfs.errors import QedfsError
from qedfs.source.base import Source

# Two pieces are fetched with one read if the gap between them is no larger than this. The bytes of the gap take 0.3 ms
# at 1 Gbit/s, far less than a round trip. With the smallest clusters of qcow2, L2 tables are exactly this far apart.
MAX_GAP_BYTES = 32 << 10
MAX_JOINED_BYTES = 4 << 20  # a read of several pieces is at most this large, because it goes through a buffer
CONCURRENT_READS = 8  # reads of the file for one request, if its clusters are scattered

Job = Callable[[], Awaitable[None]]


@dataclasses.dataclass(slots=True)
class Zeros:
    """A part of the buffer that reads as zeros."""

    at: int
    size: int


@dataclasses.dataclass(slots=True)
class Data:
    """A part of the buffer whose bytes are in the file as they are."""

    at: int
    offset: int
    size: int


class Piece(Protocol):
    """A range of the file."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


P = TypeVar("P", bound=Piece)


@dataclasses.dataclass(frozen=True, slots=True)
class Batch(Generic[P]):
    """One read of the file that covers its pieces."""

    offset: int
    size: int
    pieces: Sequence[P]


def add_zeros(zeros: list[Zeros], at: int, size: int) -> None:
    """Add a part to a list in the order of the buffer, joined with the one before if nothing is between them."""
    last = zeros[-1] if zeros else None
    if last is not None and last.at + last.size == at:
        last.size += size
    else:
        zeros.append(Zeros(at, size))


def add_data(data: list[Data], at: int, offset: int, size: int) -> None:
    """As `add_zeros`. Two parts are joined if they are neighbours in the file, too."""
    last = data[-1] if data else None
    if last is not None and last.at + last.size == at and last.offset + last.size == offset:
        last.size += size
    else:
        data.append(Data(at, offset, size))


def join(pieces: Iterable[P]) -> list[Batch[P]]:
    """Join the pieces into few reads. A piece that is larger than MAX_JOINED_BYTES gets a read of its own."""
    batches: list[Batch[P]] = []
    joined: list[P] = []
    start = end = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        stop = max(end, piece.offset + piece.size)
        if joined and (piece.offset - end > MAX_GAP_BYTES or stop - start > MAX_JOINED_BYTES):
            batches.append(Batch(start, end - start, joined))
            joined, stop = [], piece.offset + piece.size
        if not joined:
            start = piece.offset
        joined.append(piece)
        end = stop
    if joined:
        batches.append(Batch(start, end - start, joined))
    return batches


def part(data: memoryview, batch: Batch[P], piece: P) -> memoryview:
    """The bytes of one piece among those of its batch."""
    start = piece.offset - batch.offset
    return data[start : start + piece.size]


async def read_batch(file: Source, batch: Batch[P], *, urgent: bool) -> memoryview:
    """The bytes of a batch, in a buffer of their own. Raises what `Source.read` raises."""
    data = memoryview(bytearray(batch.size))
    await file.read(batch.offset, data, urgent=urgent)
    return data


async def run_all(jobs: Sequence[Job]) -> None:
    """Run all jobs, a few at a time. The first QedfsError cancels the others and is raised, not in a group."""
    if len(jobs) == 1:
        await jobs[0]()
        return
    failures: list[QedfsError] = []
    rest = iter(jobs)
    async with trio.open_nursery() as nursery:

        async def work() -> None:
            for job in rest:
                try:
                    await job()
                except QedfsError as exc:
                    failures.append(exc)
                    nursery.cancel_scope.cancel()
                    return

        for _ in range(min(CONCURRENT_READS, len(jobs))):
            nursery.start_soon(work)
    if failures:
        raise failures[0]
