"""Overlays that are wrong: made from a sound one by changing what a careless or hostile maker would change.

Owns the mutations, the named cases, and the one property: whatever the file is, opening, mapping, reading, checking and
writing either work or raise a QedfsError, in few steps and little memory, and a file that is refused has not been
written.
"""

from __future__ import annotations

import os
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import trio

from qedfs.cli.commands.map import whole_map
from qedfs.errors import QedfsError
from qedfs.format.header import BACKING_FILE, NEED_CHECK, UNTOUCHED
from qedfs.format.record import Record, encode_record, slot_offsets
from qedfs.overlay.check import check
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from qedfs.overlay.storage import FileStorage
from tests.harness.hang import HANG_SECONDS
from tests.overlay.images import Built, empty, filled
from tests.overlay.work import TooMuchWork, at_most

MOST_STEPS = 1_000_000  # four for each table of the case that claims the most of them
MOST_WRITTEN_CLUSTER = 1 << 20  # a partial write to a cluster of 64 MiB costs what it costs
MOST_GROWTH_BYTES = 64 << 20
# Offset and width of the header's fields.
FIELDS = {
    "magic": (0, 4),
    "cluster_size": (4, 4),
    "table_size": (8, 4),
    "header_size": (12, 4),
    "features": (16, 8),
    "compat": (24, 8),
    "autoclear": (32, 8),
    "l1_offset": (40, 8),
    "image_size": (48, 8),
    "name_offset": (56, 4),
    "name_size": (60, 4),
}
EDGES = (0, 1, 2, 511, 512, 513, 4095, 4096, 4097, 65536, (1 << 26) - 1, 1 << 26, 1 << 27, (1 << 31) - 1, 1 << 31)


class Malformed(NamedTuple):
    """A file: its first bytes, and its length, the rest being a hole."""

    name: str
    data: bytes
    length: int

    def put(self, path: Path) -> None:
        """Write it, sparse."""
        with path.open("wb") as file:
            file.write(self.data)
            file.truncate(self.length)


class Verdict(NamedTuple):
    """What became of a file. `error` is empty if it was opened."""

    error: str
    steps: int
    growth: int  # bytes of resident memory


class Escape(Exception):
    """The property does not hold."""


def sound(rng: random.Random) -> Built:
    """A valid overlay with some of everything."""
    cluster_size = rng.choice((4096, 4096, 8192, 65536))
    clusters: dict[int, bytes | int] = {n: rng.choice((1, b"x" * 512, b"y" * 100)) for n in range(rng.randint(0, 5))}
    built = filled(
        clusters,
        cluster_size=cluster_size,
        table_size=rng.choice((1, 2, 4)),
        image_size=rng.choice((512, cluster_size * 3 + 512, cluster_size * 600)),
    )
    slots = slot_offsets(built.header)
    if slots and rng.random() < 0.5:
        built.data[slots[0] : slots[0] + 1536] = encode_record(Record("5" * 32))
        built.replace(autoclear_features=UNTOUCHED)
    return built


def generate(rng: random.Random) -> Malformed:
    """A sound overlay with one to three things changed."""
    built = sound(rng)
    names = []
    length = len(built.data)
    for _ in range(rng.randint(1, 3)):
        mutate = rng.choice(MUTATIONS)
        names.append(mutate.__name__)
        length = mutate(built.data, length, rng)
    return Malformed("+".join(names), bytes(built.data[:length]), max(0, length))


def _field(data: bytearray, length: int, rng: random.Random) -> int:
    offset, width = FIELDS[rng.choice(list(FIELDS))]
    limit = 1 << 8 * width
    old = int.from_bytes(data[offset : offset + width], "little")
    near = (old + 1, old - 1, old * 2, old // 2, old ^ (1 << rng.randrange(8 * width)), limit - 1, limit - 512)
    new = rng.choice((*EDGES, *near, rng.randrange(limit))) % limit
    data[offset : offset + width] = new.to_bytes(width, "little")
    return length


def _entry(data: bytearray, length: int, rng: random.Random) -> int:
    """An entry of some table: itself, the header, another table, the end, beyond it, not aligned."""
    first = int.from_bytes(data[40:48], "little") % max(8, len(data))
    at = min(len(data) - 8, first + 8 * rng.choice((0, 1, 2, 511, 512, 513, 514, 1024, 1025)))
    cluster = int.from_bytes(data[4:8], "little") or 4096
    values = (0, 1, 2, cluster, first, at, at - at % cluster, len(data), len(data) - cluster, len(data) - 1, 1 << 62)
    if at >= 0:
        value = rng.choice((*values, rng.randrange(1 << 64), rng.randrange(0, len(data) + cluster, cluster)))
        data[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
    return length


def _flip(data: bytearray, length: int, rng: random.Random) -> int:
    for _ in range(rng.randint(1, 16)):
        data[rng.randrange(min(len(data), rng.choice((64, 4096, len(data)))))] = rng.randrange(256)
    return length


def _cut(data: bytearray, length: int, rng: random.Random) -> int:
    return rng.choice((0, 1, 63, 64, 65, 512, length // 2, max(0, length - 1), max(0, length - 4096)))


def _stretch(data: bytearray, length: int, rng: random.Random) -> int:
    """A hole behind the file, up to what a file system takes."""
    return length + rng.choice((1, 511, 4096, 65536, 1 << 30, 1 << 40, 1 << 50))


def _huge(data: bytearray, length: int, rng: random.Random) -> int:
    """Tables and an image of the largest legal sizes, in a file that is long enough for them."""
    shift, table = rng.randint(12, 26), rng.choice((1, 2, 4, 8, 16))
    struct.pack_into("<III", data, 4, 1 << shift, table, 1)
    entries = (table << shift) // 8
    struct.pack_into("<QQ", data, 40, 1 << shift, min(entries * entries << shift, (1 << 63) - 512))
    return max(length, (table + 2) << shift)


def _everywhere(data: bytearray, length: int, rng: random.Random) -> int:
    """Every entry of L1 that is in the file leads to a table of its own, and all of those are one hole."""
    cluster, table = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8))
    table_bytes, l1 = cluster * table, int.from_bytes(data[40:48], "little")
    if not 0 < table_bytes <= 1 << 30:
        return length
    end = -(-len(data) // cluster) * cluster if cluster else 0
    places = range(l1, min(len(data), l1 + table_bytes) - 7, 8)
    for number, at in enumerate(places):
        data[at : at + 8] = (end + number * table_bytes).to_bytes(8, "little")
    span = table_bytes // 8 * cluster
    data[48:56] = min(max(1, len(places)) * span, (1 << 63) - 512).to_bytes(8, "little")
    return max(length, end + len(places) * table_bytes)


def _dirty(data: bytearray, length: int, rng: random.Random) -> int:
    data[16] |= NEED_CHECK
    return length


def _name(data: bytearray, length: int, rng: random.Random) -> int:
    name = rng.choice((b"\xff\xfe", b"a\0b", b"", b"x" * 4095, b"x" * 4096, "é".encode() * 20))
    data[64 : 64 + len(name)] = name
    data[16] |= BACKING_FILE
    struct.pack_into("<II", data, 56, rng.choice((64, 64, 0, 63, 4000, 1 << 31)), len(name))
    return max(length, len(data))


MUTATIONS: tuple[Callable[[bytearray, int, random.Random], int], ...] = (
    *(_field, _field, _entry, _entry, _entry),
    *(_flip, _cut, _stretch, _huge, _everywhere, _dirty, _name),
)


def named() -> Iterator[Malformed]:
    """Small cases, each for one lesson."""
    rng = random.Random(1)
    for field, (offset, width) in FIELDS.items():
        limit = 1 << 8 * width
        for value in {*EDGES, 3, 16, 32, limit // 2, limit - 512, limit - 1} - {v for v in EDGES if v >= limit}:
            built = filled({0: b"x", 1: 1})
            built.data[offset : offset + width] = (value % limit).to_bytes(width, "little")
            yield Malformed(f"{field} {value:#x}", bytes(built.data), len(built.data))
    for mutate in dict.fromkeys(MUTATIONS):
        for number in range(6):
            built = sound(rng)
            length = mutate(built.data, len(built.data), rng)
            yield Malformed(f"{mutate.__name__} {number}", bytes(built.data[:length]), length)
    for shift in range(12, 27, 2):
        for table in (1, 16):
            built = empty()
            struct.pack_into("<III", built.data, 4, 1 << shift, table, 1)
            entries = (table << shift) // 8
            struct.pack_into("<QQ", built.data, 40, 1 << shift, min(entries * entries << shift, (1 << 63) - 512))
            for features in (5, 5 | NEED_CHECK):
                built.data[16] = features
                size = (table + 2) << shift
                yield Malformed(f"largest image, 2^{shift} x {table}, {features:#x}", bytes(built.data), size)


async def judge(case: Malformed, path: Path) -> Verdict:
    """Put the case to a file and try everything on it, first for reading, then for writing. Raises Escape."""
    case.put(path)
    errors, growth = [], 0
    try:
        with at_most(MOST_STEPS) as work:
            for writable in (False, True):
                before = _resident()
                with trio.fail_after(HANG_SECONDS):
                    error = await _try(path, writable=writable)
                errors.append(error)
                growth = max(growth, _resident() - before)
                if error and not _holds(path, case):
                    raise Escape(f"{case.name}: refused ({error}) and written to")
    except TooMuchWork as exc:
        raise Escape(f"{case.name}: {exc}") from exc
    verdict = Verdict(errors[-1] or errors[0], work.steps, growth)
    if verdict.growth > MOST_GROWTH_BYTES:
        raise Escape(f"{case.name}: grew by {verdict.growth >> 20} MiB")
    return verdict


async def _try(path: Path, *, writable: bool) -> str:
    """Returns the error of the opening; what fails later is the matter of one cluster."""
    storage = FileStorage.open(str(path), writable=writable)
    try:
        try:
            overlay = await open_storage(storage)
        except QedfsError as exc:
            return str(exc) or type(exc).__name__
        await _use(overlay, writable=writable)
    finally:
        storage.close()
    return ""


async def _use(overlay: Overlay, *, writable: bool) -> None:
    size, cluster = overlay.image_size, overlay.cluster_size
    places = {pos for pos in (0, cluster, 511 * 4096, size // 2 // 512 * 512, size - 512) if 0 <= pos < size}
    for pos in sorted(places):
        await _allowed_to_fail(_read(overlay, pos, min(65536, size - pos)))
    await _allowed_to_fail(overlay.clusters.next_missing(0, 16))
    await _allowed_to_fail(_checked(overlay))
    await _allowed_to_fail(overlay.count_missing())
    if not writable:
        await _allowed_to_fail(_mapped(overlay))
    if writable and cluster <= MOST_WRITTEN_CLUSTER:
        for pos in sorted(places):
            await _allowed_to_fail(overlay.write(pos, b"w" * 512, lambda _: _fill(cluster)))
        await _allowed_to_fail(overlay.adopt(0, bytearray(b"a" * min(cluster, size)), min(cluster, size)))
        await _allowed_to_fail(overlay.flush())


async def _fill(size: int) -> bytes:
    return bytes(size)


async def _read(overlay: Overlay, pos: int, size: int) -> None:
    for run in await overlay.map(pos, size):
        if run.offset > 1:
            await overlay.read_data(run.offset, memoryview(bytearray(run.size)))


async def _checked(overlay: Overlay) -> None:
    check(overlay.storage, read_header(overlay.storage)[0])


async def _mapped(overlay: Overlay) -> None:
    async for run in whole_map(overlay):
        assert run.size > 0


async def _allowed_to_fail(call: object) -> None:
    try:
        await call  # type: ignore[misc]
    except QedfsError:
        return


def _holds(path: Path, case: Malformed) -> bool:
    with path.open("rb") as file:
        return file.read(len(case.data)) == case.data and file.seek(0, os.SEEK_END) == case.length


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
