"""Damaged images: each gives the right bytes or one SourceError, within bounds of work.

What is right is said by a second reader of a few lines (`plain_disk`), which believes every table. The first reader
judges, so it may refuse what the second one understands; it may never answer with other bytes.
"""

from __future__ import annotations

import random
import tracemalloc

from qedfs.errors import SourceError
from qedfs.source.qcow2 import Qcow2Source
from tests.harness.sample import sample
from tests.source.qcow2.build import COMPRESSED, COPIED, deflated, image, packed_entry
from tests.source.qcow2.support import MemorySource, plain_disk

CASES = sample(300, whole=5000)
CLUSTERS = 24
SIZE = CLUSTERS * 512 - 100
L1, L2, DATA, PACKED, FILE_SIZE = 512, 1024, 2048, 16 << 10, 20 << 10

# Offset and width of what decides in a header.
FIELDS = [(4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (72, 8), (100, 4)]
STRANGE = [0, 1, 2, 255, 256, 511, 512, FILE_SIZE - 512, FILE_SIZE - 1, FILE_SIZE, (1 << 32) - 1, (1 << 64) - 1]
STRANGE += [1 << bit for bit in (16, 31, 32, 55, 56, 61, 62, 63)]


def sound_image() -> bytes:
    """Data, zeros of all kinds, and compressed clusters that share sectors."""
    source = random.Random(8)
    entries, clusters, packed_at = [], {}, PACKED
    for index in range(CLUSTERS):
        if index % 4 == 0:
            clusters[DATA + 512 * index] = source.randbytes(512)
            entries.append(COPIED | DATA + 512 * index)
        elif index % 4 == 1:
            clusters[packed_at] = deflated((source.randbytes(20) * 30)[:512])
            entries.append(packed_entry(packed_at, len(clusters[packed_at])))
            packed_at += len(clusters[packed_at])
        else:
            entries.append([0, 1, COPIED | DATA | 1][index % 3])
    return image({L1: [COPIED | L2], L2: entries}, clusters, l1_size=1, size=SIZE, file_size=FILE_SIZE)


def damaged(sound: bytes, rng: random.Random) -> bytes:
    """One to four fields, entries or bytes overwritten; now and then the file is cut, too."""
    content = bytearray(sound)
    for _ in range(rng.choice([1, 1, 2, 4])):
        match rng.randrange(5):
            case 0:
                at, width = rng.choice(FIELDS)
                content[at : at + width] = (_number(rng) & ((1 << 8 * width) - 1)).to_bytes(width, "big")
            case 1:
                at = _entry_at(rng)
                content[at : at + 8] = _number(rng).to_bytes(8, "big")
            case 2:
                content[_entry_at(rng) + rng.randrange(8)] ^= 1 << rng.randrange(8)
            case 3:
                content[rng.randrange(112)] = rng.randrange(256)
            case 4:
                content[rng.randrange(PACKED, PACKED + 512)] = rng.randrange(256)
    if rng.random() < 0.05:
        del content[rng.choice([rng.randrange(L2 + 512), rng.randrange(len(content))]) :]
    return bytes(content)


def _entry_at(rng: random.Random) -> int:
    return rng.choice([L1, L2 + 8 * rng.randrange(CLUSTERS)])


def _number(rng: random.Random) -> int:
    match rng.randrange(3):
        case 0:
            return rng.choice(STRANGE)
        case 1:
            return rng.choice([0, COPIED, COMPRESSED]) | rng.randrange(FILE_SIZE + 1024)
        case _:
            return rng.getrandbits(64)


async def outcome(content: bytes) -> str:
    """What became of an image: refused, unreadable in part, or all right."""
    inner = MemorySource(content)
    try:
        source = await Qcow2Source.open(inner, "disk.qcow2")
    except SourceError as exc:
        check_message(exc)
        return "refused"
    size = source.identity.size
    answers = []
    for pos in {0, max(0, size - SIZE)}:
        stop = min(pos + SIZE, size)
        answers.append(await right(source, content, pos, stop - pos))
        answers += [await right(source, content, at, min(700, stop - at)) for at in range(pos, stop, 512)]
    assert len(inner.reads) < 300
    assert inner.received < 2 << 20
    return "right" if all(answers) else "in part"


async def right(source: Qcow2Source, content: bytes, pos: int, size: int) -> bool:
    """Whether the range could be read; if so it has to be right, and the extents as well."""
    buffer = bytearray(b"\xa5" * size)
    try:
        await source.read(pos, memoryview(buffer))
    except SourceError as exc:
        check_message(exc)
        return False
    assert buffer == plain_disk(content, pos, size)
    for extent in await source.extents(pos, size) or ():
        assert pos <= extent.pos < extent.pos + extent.size <= pos + size
        assert not extent.zero or not any(buffer[extent.pos - pos : extent.pos - pos + extent.size])
    return True


def check_message(error: SourceError) -> None:
    assert str(error).startswith("backing disk.qcow2 ")
    assert str(error).isprintable()


async def test_sound_image() -> None:
    assert await outcome(sound_image()) == "right"


async def test_damaged_images() -> None:
    rng = random.Random(20)
    sound = sound_image()
    seen = dict.fromkeys(("refused", "in part", "right"), 0)
    for _ in range(CASES):
        seen[await outcome(damaged(sound, rng))] += 1
    assert min(seen.values()) > CASES // 20, f"the damage is too much or too little: {seen}"


async def test_what_a_header_claims_costs_no_memory() -> None:
    """Tables and clusters of the largest size there can be, of which the file has next to nothing."""
    claims: list[dict[str, int]] = [
        {"size": (1 << 63) - 1, "cluster_bits": 21, "l1_size": 4 << 20, "l1_offset": 0},
        {"size": 1 << 37, "cluster_bits": 9, "l1_size": 4 << 20},
        {"size": 1 << 40, "cluster_bits": 21, "l1_size": 2, "l1_offset": 0},
    ]
    tracemalloc.start()
    try:
        for claim in claims:
            await outcome(image({512: [COPIED | L2], L2: [COMPRESSED | 2048] * 64}, {}, **claim))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
