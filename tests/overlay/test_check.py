"""The space of leaked clusters goes back to the file system, and nothing else does."""

from __future__ import annotations

import random

import pytest

from qedfs.errors import BadOverlay
from qedfs.overlay.check import check, give_back_leaks
from qedfs.overlay.open import open_storage
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import filled
from tests.overlay.scenario import read_all

CLUSTER = 4096


@pytest.mark.parametrize("seed", range(20))
async def test_leaks_are_punched_or_cut_off_and_the_image_stays(seed: int) -> None:
    rng = random.Random(seed)
    built = filled({cluster: rng.randbytes(CLUSTER) for cluster in range(40)})
    leaked = sorted(rng.sample(range(40), rng.randint(1, 39)))
    if rng.random() < 0.5:
        leaked = sorted({*leaked, 39})
    places = {}
    table = int.from_bytes(built.data[built.header.l1_table_offset :][:8], "little")
    for cluster in leaked:
        places[cluster] = int.from_bytes(built.data[table + 8 * cluster :][:8], "little")
        built.put_u64(table + 8 * cluster, 0)
    storage = MemoryStorage(built.data)
    base = bytes(built.header.geometry.image_size)
    header, _ = read_header(storage)
    expected = await read_all(await open_storage(MemoryStorage(built.data, writable=False)), base)
    left = give_back_leaks(storage, header)
    assert check(storage, header).leaks == left <= len(leaked)
    assert (left < len(leaked)) == (39 in leaked)
    for offset in places.values():
        assert not any(storage.bytes[offset : offset + CLUSTER])
    assert await read_all(await open_storage(MemoryStorage(storage.bytes, writable=False)), base) == expected


def test_nothing_is_given_back_of_a_damaged_overlay() -> None:
    built = filled({0: b"x" * CLUSTER, 1: 1 << 40})
    storage = MemoryStorage(built.data + bytes(CLUSTER))
    before = bytes(storage.bytes)
    with pytest.raises(BadOverlay, match="is damaged"):
        give_back_leaks(storage, read_header(storage)[0])
    assert storage.bytes == before
