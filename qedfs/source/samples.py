"""Samples of a version: the digests of a few of its blocks, to check later whether the source still serves it.

Owns the choice of blocks and their encoding as text. Must not know where bytes come from, nor what follows from a
difference. The blocks are those of the file on the server: of the qcow2 or QED file, not of the disk inside it.

Taking samples costs no request, because they come from data that was read anyway. The overlay has usually kept these
blocks, and the blocks that a guest needs first (boot sector, superblocks) are among them. The samples are spread evenly
over all reads so far. Blocks of zeros are left out, because another version may well have zeros in the same place. A
version that differs only in other blocks goes unnoticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Awaitable, Callable

import trio

from qedfs.errors import QedfsError

BLOCK_BYTES = 4096
MOST_SAMPLES = 12  # as many as fit into the record
# As many as are kept while the source is used. Comparing them costs one round trip. Two disks that differ in one block
# of ten, such as a clone and its original, pass for the same with 12 samples in 28 of 100 cases, with 64 in 1 of 1000.
MOST_IN_MEMORY = 64
MOST_LOOKED_AT = 16  # blocks per read that are searched for one that is not zero
DIGEST_DIGITS = 12  # 48 bits make a collision by accident improbable; a server that lies would defeat any digest
_ZEROS = bytes(BLOCK_BYTES)

Read = Callable[[int, memoryview], Awaitable[object]]
"""Fills the buffer with the bytes of the file at a position, as `Source.read` does."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """The digest of the block at `pos`, a multiple of BLOCK_BYTES."""

    pos: int
    digest: str


class Samples:
    """The samples of one version of a source. Starts empty."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._reads = 0
        self._every = 1  # every n-th read is sampled

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def places(self) -> list[int]:
        """Where they are, in ascending order."""
        return sorted(sample.pos for sample in self._samples)

    def offer(self, pos: int, data: memoryview) -> None:
        """Take a sample of bytes just read, if this read is to be sampled and has data other than zeros."""
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
        if len(self._samples) == MOST_IN_MEMORY:
            del self._samples[1::2]
            self._every *= 2
        self._samples.append(sample)

    def encode(self) -> str:
        """Encode as text: comma-separated samples, each a block number and a digest in hex, with a colon in between.

        MOST_SAMPLES of them at most, spread evenly.
        """
        chosen = self._samples[:: max(1, -(-len(self._samples) // MOST_SAMPLES))]
        return ",".join(f"{sample.pos // BLOCK_BYTES:x}:{sample.digest}" for sample in chosen)

    def copy(self) -> Samples:
        """The same samples, to which others can be added."""
        made = Samples()
        made._samples = list(self._samples)
        return made

    @classmethod
    def decode(cls, text: str) -> Samples:
        """Decode the output of `encode`."""
        made = cls()
        made.take_over(text)
        return made

    def take_over(self, text: str) -> None:
        """Add samples of the same version that an earlier session stored, as far as there is room."""
        known = {sample.pos for sample in self._samples}
        parts = (part.split(":") for part in filter(None, text.split(",")))
        found = [Sample(int(block, 16) * BLOCK_BYTES, digest) for block, digest in parts]
        earlier = [sample for sample in found if sample.pos not in known]
        room = MOST_IN_MEMORY - len(self._samples)
        if earlier and room:
            self._samples = [*earlier[:: -(-len(earlier) // room)], *self._samples]

    async def difference(self, read: Read, size: int) -> str | None:
        """Read the blocks again from a file of `size` bytes. Returns a text about the first that differs, or None.

        Raises what `read` raises.
        """
        different: list[int] = []
        failures: list[QedfsError] = []

        async def check(sample: Sample) -> None:
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
                nursery.start_soon(check, sample)
        if failures:
            raise failures[0]
        return f"the bytes at {min(different)} differ" if different else None


def _digest(block: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(block).hexdigest()[:DIGEST_DIGITS]
