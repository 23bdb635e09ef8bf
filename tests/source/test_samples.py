"""A few blocks of a source by their digests: which are remembered, how they are written down, what they notice."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re

import pytest
import trio

from qedfs.errors import SourceUnreachable
from qedfs.format.record import Pin, Record, decode_record, digest, encode_record
from qedfs.source.samples import BLOCK_BYTES, MOST_IN_MEMORY, MOST_SAMPLES, Read, Samples

KIB = 1024
# As large as the other fields get.
LARGE = Pin(digest("x"), (1 << 63) - 1, "e" * 300, "m" * 33, "sha-256:" + 64 * "f", 16 * "a", called="n" * 60)
CONTENT = random.Random(7).randbytes(1024 * KIB)


def reading(content: bytes, asked: list[int] | None = None) -> Read:
    async def read(pos: int, buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if asked is not None:
            asked.append(pos)
        buffer[:] = content[pos : pos + len(buffer)]

    return read


def offered(*ranges: tuple[int, int], content: bytes = CONTENT) -> Samples:
    samples = Samples()
    for pos, size in ranges:
        samples.offer(pos, memoryview(content)[pos : pos + size])
    return samples


def positions(samples: Samples) -> list[int]:
    return [int(part.split(":")[0], 16) * BLOCK_BYTES for part in samples.encode().split(",") if part]


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 64 * KIB), (128 * KIB, 64 * KIB)], [0, 128 * KIB]),
        ([(100, 8 * KIB)], [4 * KIB]),  # the first whole block
        ([(100, 4 * KIB)], []),  # none
        ([(0, 100)], []),
        ([(0, 4 * KIB), (0, 64 * KIB)], [0]),  # the same again
    ],
)
async def test_whole_blocks_are_taken(ranges: list[tuple[int, int]], expected: list[int]) -> None:
    assert positions(offered(*ranges)) == expected


async def test_blocks_of_zeros_say_nothing() -> None:
    content = bytes(8 * KIB) + CONTENT[: 8 * KIB] + bytes(128 * KIB)
    samples = offered((0, 64 * KIB), (64 * KIB, 64 * KIB), content=content)
    assert positions(samples) == [8 * KIB]
    assert not offered((64 * KIB, 64 * KIB), content=content)


async def test_they_spread_over_all_reads_and_do_not_grow() -> None:
    samples = offered(*((pos, 4 * KIB) for pos in range(0, len(CONTENT), 4 * KIB)))
    found = positions(samples)
    assert MOST_SAMPLES // 2 < len(found) <= MOST_SAMPLES
    assert found[0] == 0
    assert found[-1] > 3 * len(CONTENT) // 4
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert max(gaps) <= 2 * min(gaps[1:])


@pytest.mark.parametrize("count", [0, 1, MOST_SAMPLES])
async def test_they_come_back_from_the_record(count: int) -> None:
    samples = offered(*((pos * 8 * KIB, 4 * KIB) for pos in range(count)))
    pin = Pin(
        digest("x"), len(CONTENT), "e" * 300, "m" * 33, "sha-256:" + 64 * "f", 16 * "a", samples.encode(), "n" * 60
    )
    record = Record("0" * 32, pin, copy_on_read=False)
    slot = encode_record(record)
    assert decode_record((slot, bytes(len(slot)))) == record
    assert pin.samples == Samples.decode(pin.samples).encode()


async def test_the_largest_positions_fit_a_record() -> None:
    far = Samples()
    for number in range(MOST_SAMPLES):
        far.offer((1 << 63) - (number + 1) * BLOCK_BYTES, memoryview(b"x" * BLOCK_BYTES))
    pin = dataclasses.replace(LARGE, samples=far.encode())
    slot = encode_record(Record("0" * 32, pin))
    found = decode_record((slot, slot))
    assert found is not None
    assert found.pin == pin


async def test_very_long_validators_leave_no_room_for_them() -> None:
    pin = dataclasses.replace(LARGE, etag="e" * 510, last_modified="m" * 400)
    samples = ",".join([f"{'f' * 13}:{'0' * 12}"] * MOST_SAMPLES)
    slot = encode_record(Record("0" * 32, dataclasses.replace(pin, samples=samples)))
    found = decode_record((slot, slot))
    assert found is not None
    assert found.pin == pin


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "0:",
        ":0123456789ab",
        "0:0123456789a",
        "0:0123456789AB",
        "0:0123456789ab,",
        "0:0123456789ab,1:x",
        "0:" + 13 * "0",
    ],
)
async def test_garbled_ones_are_no_record(text: str) -> None:
    good = encode_record(Record("", Pin(digest("x"), 1, samples="0:0123456789ab")))
    assert decode_record((good, good)) is not None
    bad = encode_record(Record("", Pin(digest("x"), 1, samples=text)))
    assert decode_record((bad, bad)) is None


async def test_earlier_ones_are_taken_over_as_far_as_there_is_room() -> None:
    first, second = offered((0, 4 * KIB), (8 * KIB, 4 * KIB)), offered((8 * KIB, 4 * KIB))
    second.take_over(first.encode())
    assert positions(second) == [0, 8 * KIB]
    third = Samples()
    third.take_over("")
    assert not third
    third.take_over(first.encode())
    assert positions(third) == [0, 8 * KIB]
    # Of more of them than there is room for, those that lie far apart.
    many = offered(*((pos * 4 * KIB, 4 * KIB) for pos in range(MOST_SAMPLES)))
    few = offered(*((512 * KIB + pos * 4 * KIB, 4 * KIB) for pos in range(MOST_IN_MEMORY - 3)))
    few.take_over(many.encode())
    asked: list[int] = []
    await few.difference(reading(CONTENT, asked), len(CONTENT))
    assert sorted(asked)[:4] == [0, 16 * KIB, 32 * KIB, 512 * KIB]
    assert len(few) == MOST_IN_MEMORY
    few.take_over(first.encode())
    assert len(few) == MOST_IN_MEMORY
    assert MOST_SAMPLES // 2 < len(positions(few)) <= MOST_SAMPLES  # the record has room for no more


async def test_a_copy_grows_alone() -> None:
    samples = offered((0, 4 * KIB))
    other = samples.copy()
    other.take_over(offered((8 * KIB, 4 * KIB)).encode())
    assert (positions(samples), len(other)) == ([0], 2)


async def test_what_they_notice() -> None:
    samples = offered((0, 4 * KIB), (64 * KIB, 4 * KIB), (128 * KIB, 4 * KIB))
    asked: list[int] = []
    assert await samples.difference(reading(CONTENT, asked), len(CONTENT)) is None
    assert sorted(asked) == [0, 64 * KIB, 128 * KIB]
    other = bytearray(CONTENT)
    other[65 * KIB] ^= 1
    assert await samples.difference(reading(bytes(other)), len(CONTENT)) == f"the bytes at {64 * KIB} differ"
    assert await samples.difference(reading(CONTENT), 130 * KIB) == f"the bytes at {128 * KIB} differ"
    # Others than the sampled ones are not looked at.
    other = bytearray(CONTENT)
    other[5 * KIB] ^= 1
    assert await samples.difference(reading(bytes(other)), len(CONTENT)) is None


async def test_an_error_of_the_source_is_no_verdict() -> None:
    async def read(pos: int, buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        raise SourceUnreachable("away")

    with pytest.raises(SourceUnreachable, match="away"):
        await offered((0, 4 * KIB), (8 * KIB, 4 * KIB)).difference(read, len(CONTENT))


def test_they_are_short() -> None:
    assert re.fullmatch(r"0:[0-9a-f]{12}", offered((0, 4 * KIB)).encode())
