"""What a check reports, however its clusters lie. The space of leaked ones goes back to the file system."""

from __future__ import annotations

import errno
import os
import random
from array import array
from unittest.mock import Mock

import pytest

from qedfs.errors import BadOverlay, QedfsError
from qedfs.format.tables import ZERO
from qedfs.overlay.check import _Walk, check, give_back_leaks, repair
from qedfs.overlay.open import open_storage
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import SPAN, Built, empty, filled, many_tables
from tests.overlay.scenario import read_all

CLUSTER = 4096
# pytest-xdist has a thread, for which Python 3.12 warns of a fork.
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


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


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each entry be judged by itself."""
    monkeypatch.setattr("qedfs.overlay.check.is_scattered", lambda _: False)
    monkeypatch.setattr("qedfs.overlay.check.UsedClusters.claim_row", lambda *_: False)


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The entries that are judged by themselves from now on."""
    looked: list[int] = []
    judge = _Walk._l2_entry

    def noted(walk: _Walk, index: int, entry: int) -> bool:
        looked.append(entry)
        return judge(walk, index, entry)

    monkeypatch.setattr("qedfs.overlay.check._Walk._l2_entry", noted)
    return looked


def shuffle(built: Built) -> None:
    """Put the entries of each table in another order, so that none follows another."""
    for table in range(2):
        offset = int.from_bytes(built.data[built.header.l1_table_offset + 8 * table :][:8], "little")
        if offset:
            entries = array("Q", bytes(built.data[offset : offset + 4096]))
            built.data[offset : offset + 4096] = (entries[::-2] + entries[::2]).tobytes()


@pytest.fixture(params=[1, 2, 3], ids="{} processes".format)
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many share a walk, as if it were laborious from the start."""
    monkeypatch.setattr("qedfs.overlay.check.SHARED_FROM", 0)
    found: int = request.param
    return found


KINDS = (
    *("in order", "all zero", "one zero", "one missing", "two alike", "two exchanged", "one unaligned"),
    *("past the end", "in the header"),
)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@FORKS
def test_entries_that_are_judged_together_get_the_same_report(
    kind: str, scattered: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = rows(kind)
    if scattered:
        shuffle(built)
    storage = MemoryStorage(built.data)
    header, _ = read_header(storage)
    found = check(storage, header, processes=processes)
    one_by_one(monkeypatch)
    assert found == check(storage, header)
    assert (found.corruptions == 0) == (kind in {"in order", "all zero", "one zero", "one missing", "two exchanged"})


@pytest.mark.parametrize("scattered", [False, True])
def test_clusters_are_judged_without_a_look_at_each(scattered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    built = rows("in order")
    if scattered:
        shuffle(built)
    looked = count_looks(monkeypatch)
    storage = MemoryStorage(built.data)
    assert check(storage, read_header(storage)[0]).allocated == 512
    assert not looked


@pytest.mark.parametrize("kind", ["two alike", "one unaligned", "past the end", "in the header"])
@FORKS
def test_scattered_entries_that_are_wrong_are_repaired_as_in_a_row(
    kind: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = rows(kind)
    shuffle(built)
    together, alone = MemoryStorage(built.data), MemoryStorage(built.data)
    header, _ = read_header(together)
    found = repair(together, header, processes=processes)
    one_by_one(monkeypatch)
    assert found == repair(alone, header)
    assert together.bytes == alone.bytes
    assert (found.repaired > 0) == (kind != "two alike")


def test_leaks_between_scattered_clusters_are_found() -> None:
    built = rows("one missing")
    shuffle(built)
    storage = MemoryStorage(built.data)
    header, _ = read_header(storage)
    leaked = check(storage, header).leaks
    assert leaked == 1
    give_back_leaks(storage, header)
    found = check(storage, header)
    assert (found.allocated, found.corruptions) == (511, 0)


def test_the_progress_is_told_in_bytes_of_the_image() -> None:
    storage = MemoryStorage(many_tables(3).data)
    told: list[int] = []
    check(storage, read_header(storage)[0], told.append)
    assert told == [0, SPAN, 2 * SPAN]


def disorder(tables: int, rng: random.Random) -> Built:
    """Tables full of rows, zeros, holes and scattered clusters. Some places are leaked."""
    built = empty(image_size=tables * SPAN)
    first = len(built.data) // CLUSTER
    places = list(range(first + tables, first + tables * 513))
    if rng.random() < 0.5:
        rng.shuffle(places)
    for number in range(tables):
        built.put_u64(built.header.l1_table_offset + 8 * number, len(built.data))
        mine = places[512 * number :][:512]
        built.data += array("Q", (rng.choice((place * CLUSTER,) * 97 + (0, 0, ZERO)) for place in mine)).tobytes()
    built.data += bytes(512 * tables * CLUSTER)
    return built


@pytest.mark.parametrize("damage", ["", "two alike in two parts", "data in a table", "data in L1", "one table twice"])
@FORKS
def test_processes_that_share_a_walk_find_what_one_finds(
    damage: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.overlay.check.PARTS", 4)
    rng = random.Random(damage)
    for _ in range(3):
        built = disorder(7, rng)
        tables = array("Q", bytes(built.data[built.header.l1_table_offset :][: 8 * 7]))
        other = int.from_bytes(built.data[tables[2] + 8 * 7 :][:8], "little") or built.header.area_bytes + CLUSTER
        wrong = {
            "two alike in two parts": (tables[-2] + 8 * rng.randrange(512), other),
            "data in a table": (tables[-2] + 8 * rng.randrange(512), tables[1]),
            "data in L1": (tables[-2] + 8 * rng.randrange(512), built.header.l1_table_offset),
            "one table twice": (built.header.l1_table_offset + 8 * 6, tables[0]),
        }
        if damage:
            built.put_u64(*wrong[damage])
        storage = MemoryStorage(built.data)
        header, _ = read_header(storage)
        found = check(storage, header, processes=processes)
        assert found == check(storage, header)
        assert (found.corruptions > 0) == (damage != "")


@FORKS
def test_a_table_that_another_process_cannot_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qedfs.overlay.check.SHARED_FROM", 0)
    storage = MemoryStorage(many_tables(40).data)
    header, _ = read_header(storage)
    here, read, broken = os.getpid(), storage.read, header.l1_table_offset + CLUSTER

    def reads(offset: int, view: memoryview) -> None:
        if offset >= broken and os.getpid() != here:
            raise QedfsError("the disk fails for the other one")
        read(offset, view)

    monkeypatch.setattr(storage, "read", reads)
    assert check(storage, header, processes=2).allocated == 40
    monkeypatch.setattr(storage, "read", lambda *_: _failing())
    with pytest.raises(QedfsError, match="fails for all"):
        check(storage, header, processes=2)


@pytest.mark.parametrize("lacking", ["MAX_SCATTERED", "shared_marks"])
def test_a_walk_for_which_memory_lacks_is_not_shared(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qedfs.overlay.check.SHARED_FROM", 0)
    few, none = 40, Mock(side_effect=OSError(errno.ENOMEM, "Cannot allocate memory"))
    monkeypatch.setattr(f"qedfs.overlay.check.{lacking}", few if lacking == "MAX_SCATTERED" else none)
    monkeypatch.setattr("os.fork", Mock(side_effect=AssertionError("shared")))
    storage = MemoryStorage(many_tables(40).data)
    assert check(storage, read_header(storage)[0], processes=2).allocated == 40


def _failing() -> None:
    raise QedfsError("the disk fails for all")
