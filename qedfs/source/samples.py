"""A few blocks of a source, remembered by their digests: how to tell whether what is served now is still the same.

Owns which blocks are remembered and how they are written down. Must not know where bytes come from, nor what follows
from a difference. Blocks are of the file that the server has (of a qcow2 image, not of the disk inside).

Nothing is asked for to fill it: the blocks are of what was read anyway, so they are blocks that an overlay has kept,
and those that a guest wants first (boot sector, superblocks) are among them. They are spread evenly over all reads so
far. Blocks of zeros are left out, since another version may well have zeros in the same place. What it cannot tell: a
version that differs in other blocks only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Awaitable, Callable

import trio

from qedfs.errors import QedfsError

BLOCK_BYTES = 4096
MOST_SAMPLES = 12  # fits into the record, and costs one round trip
MOST_LOOKED_AT = 16  # blocks of one read, for one that is not zero
DIGEST_DIGITS = 12  # 48 bits: this is against accidents, a server that wants to lie can do so anyway
_ZEROS = bytes(BLOCK_BYTES)

Read = Callable[[int, memoryview], Awaitable[None]]
"""Fills the buffer with the bytes of the file at a position; `Source.read`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """The digest of the block at `pos`, a multiple of BLOCK_BYTES."""

    pos: int
    digest: str


class Samples:
    """Samples of one version of a source; at first none."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._reads = 0
        self._every = 1  # one read in so many is sampled

    def __len__(self) -> int:
        return len(self._samples)

    def offer(self, pos: int, data: memoryview) -> None:
        """These bytes of the version have just been read."""
        self._reads += 1
        if self._reads % self._every:
            return
        first = -pos % BLOCK_BYTES
        for at in range(first, min(len(data), first + MOST_LOOKED_AT * BLOCK_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
            block = data[at : at + BLOCK_BYTES]
            if block != _ZEROS:
                self._add(Sample(pos + at, _digest(block)))
                return

    def _add(self, sample: Sample) -> None:
        if any(known.pos == sample.pos for known in self._samples):
            return
        if len(self._samples) == MOST_SAMPLES:
            del self._samples[1::2]
            self._every *= 2
        self._samples.append(sample)

    def encode(self) -> str:
        """As text: number of the block and digest, both in hex, separated by a colon; commas between samples."""
        return ",".join(f"{sample.pos // BLOCK_BYTES:x}:{sample.digest}" for sample in self._samples)

    @classmethod
    def decode(cls, text: str) -> Samples:
        """What `encode` has written."""
        made = cls()
        made.take_over(text)
        return made

    def take_over(self, text: str) -> None:
        """Add samples of the same version that an earlier session has written down, as far as there is room."""
        known = {sample.pos for sample in self._samples}
        parts = (part.split(":") for part in filter(None, text.split(",")))
        found = [Sample(int(block, 16) * BLOCK_BYTES, digest) for block, digest in parts]
        earlier = [sample for sample in found if sample.pos not in known]
        room = MOST_SAMPLES - len(self._samples)
        if earlier and room:
            self._samples = [*earlier[:: -(-len(earlier) // room)], *self._samples]

    async def difference(self, read: Read, size: int) -> str | None:
        """Read the blocks again, from a file of `size` bytes; say which one differs, or None. Errors of `read`."""
        different: list[int] = []
        failures: list[QedfsError] = []

        async def look(sample: Sample) -> None:
            if sample.pos + BLOCK_BYTES > size:
                different.append(sample.pos)
                return
            block = bytearray(BLOCK_BYTES)
            try:
                await read(sample.pos, memoryview(block))
            except QedfsError as exc:
                failures.append(exc)
                nursery.cancel_scope.cancel()
                return
            if _digest(block) != sample.digest:
                different.append(sample.pos)

        async with trio.open_nursery() as nursery:
            for sample in list(self._samples):
                nursery.start_soon(look, sample)
        if failures:
            raise failures[0]
        return f"the bytes at {min(different)} are others" if different else None


def _digest(block: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(block).hexdigest()[:DIGEST_DIGITS]
