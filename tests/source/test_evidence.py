"""Whether another source has the bytes of samples, and whether that can be told at all."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from qedfs.errors import SourceUnreachable
from qedfs.source.evidence import difference
from qedfs.source.samples import BLOCK_BYTES, Samples
from tests.fakes.source import FakeSource, remote

CONTENT = random.Random(1).randbytes(64 * BLOCK_BYTES)
CHANGED = CONTENT[: 8 * BLOCK_BYTES] + bytes(BLOCK_BYTES) + CONTENT[9 * BLOCK_BYTES :]


class Decoding(FakeSource):
    """As a reader of qcow2: another file lies below the disk."""

    file = FakeSource(CONTENT[::-1])


def taken(content: bytes) -> Samples:
    samples = Samples()
    for pos in range(0, len(content), 8 * BLOCK_BYTES):
        samples.offer(pos, memoryview(content)[pos : pos + BLOCK_BYTES])
    return samples


@pytest.mark.parametrize(
    ("other", "samples", "of_raw", "found"),
    [
        (FakeSource(CONTENT), taken(CONTENT), True, ""),
        (FakeSource(CHANGED), taken(CONTENT), True, f"the bytes at {8 * BLOCK_BYTES} differ"),
        (FakeSource(CONTENT[: 8 * BLOCK_BYTES]), taken(CONTENT), True, f"the bytes at {8 * BLOCK_BYTES} differ"),
        (FakeSource(CONTENT), Samples(), True, None),
        (Decoding(CONTENT), taken(CONTENT), True, ""),  # any format of a raw disk
        (Decoding(CONTENT), taken(CONTENT[::-1]), False, ""),  # a copy of the encoded file
        (Decoding(CONTENT), taken(CONTENT), False, "the bytes at 0 differ"),
        (FakeSource(CONTENT), taken(CONTENT[::-1]), False, None),  # nothing to compare an encoded file with
    ],
)
async def test_what_differs(
    autojump_clock: trio.testing.MockClock, other: FakeSource, samples: Samples, of_raw: bool, found: str | None
) -> None:
    assert await difference(remote(other), samples, of_raw=of_raw) == found


async def test_a_copy_that_cannot_be_read_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    other = FakeSource(CONTENT)
    other.fail = SourceUnreachable("away")
    with pytest.raises(SourceUnreachable):
        await difference(remote(other), taken(CONTENT), of_raw=True)
