"""Damaged QED images: each gives the right bytes or one SourceError, within bounds of work and memory.

What is right is said by a second reader of a few lines (`plain_disk`), which believes every table. The first reader
judges, so it may refuse what the second one understands; it may never answer with other bytes.
"""

from __future__ import annotations

import random
import tracemalloc

from qedfs.errors import SourceError
from qedfs.source.qed import QedSource
from tests.harness.sample import sample
from tests.source.qcow2.support import MemorySource
from tests.source.qed.support import CLUSTER, DATA, L1, L2, image, plain_disk

CASES = sample(150, whole=4000)
CLUSTERS = 12
SIZE = CLUSTERS * CLUSTER - 1024
FILE_SIZE = DATA + CLUSTERS * CLUSTER

# Offset and width of what decides in a header.
FIELDS = [(0, 4), (4, 4), (8, 4), (12, 4), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8), (56, 4), (60, 4)]
STRANGE = [0, 1, 2, 512, CLUSTER - 1, CLUSTER, L2, FILE_SIZE - CLUSTER, FILE_SIZE - 1, FILE_SIZE, (1 << 64) - 1]
STRANGE += [1 << bit for bit in (12, 16, 26, 31, 32, 55, 62, 63)]


def sound_image() -> bytes:
    source = random.Random(8)
    entries = [[DATA + CLUSTER * (CLUSTERS - 1 - index), 0, 1][index % 3] for index in range(CLUSTERS)]
    clusters = {entry: source.randbytes(CLUSTER) for entry in entries if entry > 1}
    return image({L1: [L2], L2: entries}, clusters, size=SIZE, file_size=FILE_SIZE)


def damaged(sound: bytes, rng: random.Random) -> bytes:
    """One to four fields, entries or bytes overwritten; now and then the file is cut, too."""
    content = bytearray(sound)
    for _ in range(rng.choice([1, 1, 2, 4])):
        match rng.randrange(4):
            case 0:
                at, width = rng.choice(FIELDS)
                content[at : at + width] = (_number(rng) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            case 1:
                at = _entry_at(rng)
                content[at : at + 8] = _number(rng).to_bytes(8, "little")
            case 2:
                content[_entry_at(rng) + rng.randrange(8)] ^= 1 << rng.randrange(8)
            case 3:
                content[rng.randrange(64)] = rng.randrange(256)
    if rng.random() < 0.1:
        del content[rng.choice([rng.randrange(L2 + 512), rng.randrange(len(content))]) :]
    return bytes(content)


def _entry_at(rng: random.Random) -> int:
    return rng.choice([L1, L2 + 8 * rng.randrange(CLUSTERS)])


def _number(rng: random.Random) -> int:
    match rng.randrange(3):
        case 0:
            return rng.choice(STRANGE)
        case 1:
            return rng.randrange(FILE_SIZE + CLUSTER)
        case _:
            return rng.getrandbits(64)


async def outcome(content: bytes) -> str:
    """What became of an image: refused, unreadable in part, or all right."""
    inner = MemorySource(content)
    try:
        source = await QedSource.open(inner, "disk.qed")
    except SourceError as exc:
        check_message(exc)
        return "refused"
    size = source.identity.size
    answers = []
    for pos in {0, max(0, size - SIZE)}:
        stop = min(pos + SIZE, size)
        answers.append(await right(source, content, pos, stop - pos))
        answers += [await right(source, content, at, min(5000, stop - at)) for at in range(pos, stop, CLUSTER)]
    assert len(inner.reads) < 300
    assert inner.received < 4 << 20
    await source.aclose()
    return "right" if all(answers) else "in part"


async def right(source: QedSource, content: bytes, pos: int, size: int) -> bool:
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
    assert str(error).startswith("backing disk.qed ")
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
    """Images of the largest disks there can be, of which the file has next to nothing."""
    claims: list[dict[str, int]] = [
        {"size": 1 << 62, "cluster_size": 1 << 26, "table_size": 16, "l1_offset": 1 << 26},
        {"size": (1 << 63) - 512, "cluster_size": 1 << 22, "table_size": 16, "l1_offset": 1 << 22},
        {"size": 1 << 30},
    ]
    tracemalloc.start()
    try:
        for claim in claims:
            await outcome(image({L1: [L2], L2: [DATA] * 64}, {}, **claim))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
