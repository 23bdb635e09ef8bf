"""The space of leaked clusters goes back to the file system, and nothing else does."""

from __future__ import annotations

import random

import pytest

from qedfs.errors import BadOverlay
from qedfs.format.tables import ZERO
from qedfs.overlay.check import check, give_back_leaks
from qedfs.overlay.open import open_storage
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import SPAN, Built, filled
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


def rows(kind: str) -> Built:
    """A table of 512 entries whose data lies in order, but for what `kind` says."""
    built = filled({cluster: bytes([cluster % 250 + 1]) for cluster in range(512)}, image_size=2 * SPAN)
    table = int.from_bytes(built.data[built.header.l1_table_offset :][:8], "little")
    first = int.from_bytes(built.data[table:][:8], "little")
    places = {
        "in order": {},
        "all zero": dict.fromkeys(range(512), ZERO),
        "one zero": {7: ZERO},
        "one missing": {300: 0},
        "two alike": {300: first},
        "two exchanged": {300: first + 301 * 4096, 301: first + 300 * 4096},
        "one unaligned": {300: first + 300 * 4096 + 512},
        "past the end": {number: first + (number + 1) * 4096 for number in range(512)},
        "in the header": {number: number * 4096 for number in range(512)},
    }
    for number, entry in places[kind].items():
        built.put_u64(table + 8 * number, entry)
    if kind == "two alike":
        second = len(built.data)  # another table refers to the same clusters
        built.data += built.data[table : table + 4096]
        built.put_u64(built.header.l1_table_offset + 8, second)
    return built


@pytest.mark.parametrize(
    "kind",
    [
        *("in order", "all zero", "one zero", "one missing", "two alike", "two exchanged", "one unaligned"),
        *("past the end", "in the header"),
    ],
)
def test_a_table_that_is_judged_as_a_whole_gets_the_same_report(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage(rows(kind).data)
    header, _ = read_header(storage)
    found = check(storage, header)
    monkeypatch.setattr("qedfs.overlay.check._Walk._all_at_once", lambda *_: False)
    assert found == check(storage, header)
    assert (found.corruptions == 0) == (kind in {"in order", "all zero", "one zero", "one missing", "two exchanged"})


def test_a_row_of_clusters_is_judged_without_a_look_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def each(*_: object) -> bool:
        raise AssertionError("one by one")

    monkeypatch.setattr("qedfs.overlay.check._Walk._l2_entry", each)
    storage = MemoryStorage(rows("in order").data)
    assert check(storage, read_header(storage)[0]).allocated == 512
