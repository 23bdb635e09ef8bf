"""The map of an overlay: runs, gaps, searches."""

from __future__ import annotations

import random

import pytest

from qedfs.errors import BadOverlay
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Run
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import SPAN, Built, empty, filled, many_tables

CLUSTER = 4096


async def opened(built: Built, *, writable: bool = False) -> Overlay:
    return await open_storage(MemoryStorage(built.data, writable=writable))


class Growing(MemoryStorage):
    """A file that a mount writes to meanwhile: from the `nth` look at it on, it is `later`."""

    def __init__(self, data: bytes | bytearray, later: bytes | bytearray, nth: int) -> None:
        super().__init__(data, writable=False)
        self.locked = False
        self.looks_left = nth
        self._later = bytearray(later)

    def size(self) -> int:
        self._look()
        return super().size()

    def read(self, offset: int, view: memoryview) -> None:
        self._look()
        super().read(offset, view)

    def _look(self) -> None:
        self.looks_left -= 1
        if not self.looks_left:
            self.bytes = self._later


async def test_an_overlay_that_grows_while_it_is_opened_is_sound() -> None:
    """As it was before, or as it is afterwards."""
    mounted = MemoryStorage(empty().data)
    overlay = await open_storage(mounted)
    await overlay.adopt(0, bytearray(b"x" * CLUSTER), CLUSTER)
    await overlay.flush()
    found = []
    for nth in range(1, 100):
        storage = Growing(empty().data, mounted.bytes, nth)
        looked_at = await open_storage(storage)
        if storage.looks_left > 0:
            break
        await looked_at.count_missing()
        found.append(looked_at.missing)
    assert len(found) > 3
    assert {found[0], found[-1]} == {255, 256}


async def test_runs_are_split_by_state_and_joined_by_place() -> None:
    built = filled({0: b"a", 1: b"b", 3: ZERO, 4: ZERO, 7: b"c", 6: b"d"})
    data = built.header.area_bytes + 2 * CLUSTER
    overlay = await opened(built)

    assert await overlay.map(0, 8 * CLUSTER) == [
        Run(data, 0, 2 * CLUSTER),
        Run(MISSING, 2 * CLUSTER, CLUSTER),
        Run(ZERO, 3 * CLUSTER, 2 * CLUSTER),
        Run(MISSING, 5 * CLUSTER, CLUSTER),
        Run(data + 3 * CLUSTER, 6 * CLUSTER, CLUSTER),
        Run(data + 2 * CLUSTER, 7 * CLUSTER, CLUSTER),
    ]


@pytest.mark.parametrize("state", [MISSING, ZERO])
async def test_a_data_cluster_is_no_part_of_the_run_before_it(state: int) -> None:
    """The place of the data cluster equals the length of the missing run before it (4 clusters, offset 0x4000)."""
    built = filled({4: b"data", **(dict.fromkeys(range(4), ZERO) if state else {})})
    place = built.header.area_bytes + 2 * CLUSTER
    assert place == 4 * CLUSTER
    overlay = await opened(built)
    skipped = 1 if state else 0  # entry 1: the sum is one more than the size

    assert await overlay.map(skipped, 5 * CLUSTER - skipped) == [
        Run(state, skipped, 4 * CLUSTER - skipped),
        Run(place, 4 * CLUSTER, CLUSTER),
    ]


async def test_a_request_inside_a_cluster_is_clipped() -> None:
    built = filled({0: b"a", 1: ZERO})
    overlay = await opened(built)
    assert await overlay.map(100, 50) == [Run(built.header.area_bytes + 2 * CLUSTER + 100, 100, 50)]
    assert await overlay.map(CLUSTER + 1, 2) == [Run(ZERO, CLUSTER + 1, 2)]
    assert await overlay.map(5 * CLUSTER + 1, 2) == [Run(MISSING, 5 * CLUSTER + 1, 2)]


@pytest.mark.parametrize("seed", range(3))
async def test_the_runs_of_a_request_are_those_of_its_clusters(seed: int) -> None:
    rng = random.Random(seed)
    numbers = sorted(
        range(1024), key=lambda number: (number // 64, rng.random() if number // 64 % 3 == seed else number)
    )
    state = {number: rng.choice((b"data", b"data", ZERO, MISSING)) for number in range(0, 1024, 9)}
    overlay = await opened(filled({number: state.get(number, b"data") for number in numbers}, image_size=2 * SPAN))
    await overlay.load(0, overlay.image_size)
    for _ in range(30):
        pos = rng.randrange(overlay.image_size)
        end = min(overlay.image_size, pos + rng.choice((1, CLUSTER, 9 * CLUSTER, 600 * CLUSTER)))
        expected: list[Run] = []
        for start in range(pos - pos % CLUSTER, end, CLUSTER):
            at, size = max(pos, start), min(end, start + CLUSTER) - max(pos, start)
            (one,) = await overlay.map(at, size)
            last = expected[-1] if expected else None
            if last is not None and one.offset == last.offset + (last.size if last.offset > ZERO else 0):
                expected[-1] = last._replace(size=last.size + size)
            else:
                expected.append(one)
        assert await overlay.map(pos, end - pos) == expected


async def test_bytes_in_one_piece_have_one_place() -> None:
    """`data_offset` says what `map` says of a request that is a single data run, and 0 of any other."""
    states: dict[int, bytes | int] = {
        0: b"a",
        1: b"b",
        2: b"c",
        4: ZERO,
        5: ZERO,
        9: b"d",
        7: b"e",
        8: b"f",
        11: b"g",
        10: b"h",
    }
    overlay = await opened(filled(states))
    ends = [cluster * CLUSTER + inside for cluster in range(13) for inside in (0, 512, CLUSTER - 512)]
    found = 0
    for pos in ends:
        for end in ends:
            if pos < end:
                runs = await overlay.map(pos, end - pos)
                place = runs[0].offset if len(runs) == 1 and runs[0].offset > ZERO else 0
                assert overlay.clusters.data_offset(pos, end - pos) == place, (pos, end)
                found += place != 0
    assert found > 50


async def test_bytes_of_two_slices_have_no_one_place() -> None:
    """Such a request goes the longer way."""
    overlay = await opened(filled({511: b"a", 512: b"b"}, image_size=2 * SPAN))
    pos = SPAN - CLUSTER
    assert len(await overlay.map(pos, 2 * CLUSTER)) == 1
    assert overlay.clusters.data_offset(pos, 2 * CLUSTER) == 0


async def test_a_row_of_clusters_past_the_end_of_the_file_is_refused() -> None:
    end = len(filled({0: b"a"}).data)  # cluster 0 ends here, so that the next entry continues it
    states: list[dict[int, bytes | int]] = [{0: b"a", 1: end}, {0: 1 << 40, 1: (1 << 40) + CLUSTER}]
    for bad in states:
        overlay = await opened(filled(bad))
        await overlay.load(0, 2 * CLUSTER)
        with pytest.raises(BadOverlay, match="which is not a valid place"):
            overlay.read_now(0, 2 * CLUSTER) or await overlay.map(0, 2 * CLUSTER)


async def test_missing_clusters_are_found() -> None:
    overlay = await opened(filled({0: b"a", 1: ZERO, 3: b"b"}, image_size=6 * CLUSTER + 512))
    assert await overlay.clusters.next_missing(0, 8) == (2, 1)
    assert await overlay.clusters.next_missing(3, 8) == (4, 3)
    assert await overlay.clusters.next_missing(3, 2) == (4, 2)
    assert await overlay.clusters.next_missing(7, 2) is None


async def test_a_stretch_without_table_is_missing() -> None:
    overlay = await opened(empty(image_size=8 << 20))
    assert await overlay.clusters.next_missing(3, 10_000) == (3, 512 - 3)
    await overlay.count_missing()
    assert overlay.missing == 2048


@pytest.mark.parametrize("entry", [2, 0x200, 0x1000, 0x1200, 1 << 40, (1 << 64) - 4096])
async def test_a_bad_entry_is_refused_and_the_rest_is_served(entry: int) -> None:
    overlay = await opened(filled({0: entry, 1: b"x"}))
    with pytest.raises(BadOverlay, match="cluster 0 points to"):
        await overlay.map(0, 512)
    with pytest.raises(BadOverlay, match="cluster 0 points to"):
        overlay.read_now(0, 512)
    assert len(await overlay.map(CLUSTER, CLUSTER)) == 1


async def test_a_write_over_a_bad_entry_takes_no_place() -> None:
    overlay = await opened(filled({2: 0x1200}, image_size=4 << 20), writable=True)
    end = overlay.tables.file_end
    for _ in range(3):
        with pytest.raises(BadOverlay, match="cluster 2 points to 0x1200"):
            await overlay.write(0, b"a" * 3 * CLUSTER, no_fill)
    assert overlay.tables.file_end == end
    assert not overlay.commit_pending


async def test_a_gap_ends_where_something_was_written_since_it_was_seen() -> None:
    """Four tables without entries, so holes of the file; one gets an entry, is committed, and leaves the cache."""
    built = filled({index * 512: MISSING for index in range(4)}, image_size=4 * SPAN)
    overlay = await opened(built, writable=True)
    clusters = overlay.clusters
    overlay.tables._cache_slices = 1
    assert [await clusters.gap(index * 512 + 5) for index in range(4)] == [512 - 5] * 4
    await overlay.adopt(SPAN + 3 * CLUSTER, bytearray(b"x" * CLUSTER), CLUSTER)
    assert await clusters.gap(512) == 0
    await overlay.commit()
    for index in (0, 2):
        await overlay.map(index * SPAN, 512)
    assert not clusters.is_loaded(SPAN, 512)
    assert await clusters.gap(512) == 0
    await overlay.count_missing()
    assert overlay.missing == 4 * 512 - 1


async def test_a_gap_over_a_bad_table_is_refused() -> None:
    built = many_tables(2)
    built.put_u64(built.header.l1_table_offset + 8, 0x1000)
    with pytest.raises(BadOverlay, match="L2 table at 0x1000"):
        await (await opened(built)).clusters.gap(512)


async def test_zeros_of_the_source_are_set_where_a_cluster_is_missing() -> None:
    """Over several slices and tables, beside data, zeros and what a write has claimed."""
    size = 3 * 512 * CLUSTER
    overlay = await opened(filled({5: b"a", 6: ZERO, 511: b"b", 1030: b"c"}, image_size=size), writable=True)
    await overlay.count_missing()
    before = overlay.missing
    assert before == 3 * 512 - 4
    with overlay._pending.allocating([0, 700], ()):
        await overlay.adopt_zeros(0, 1025)
    entries = [overlay.clusters.entry(cluster) for cluster in range(3 * 512)]
    missing = [cluster for cluster, entry in enumerate(entries) if entry == MISSING]
    assert missing == [0, 700, *(cluster for cluster in range(1025, 3 * 512) if cluster != 1030)]
    assert [cluster for cluster, entry in enumerate(entries) if entry > ZERO] == [5, 511, 1030]
    assert overlay.missing == len(missing)
    await overlay.flush()
    again = await open_storage(overlay.storage)
    await again.clusters.load(0, size)
    assert [again.clusters.entry(cluster) for cluster in range(3 * 512)] == entries
    await again.count_missing()
    assert again.missing == len(missing)


async def test_many_entries_are_set_as_one_by_one() -> None:
    """In whatever slices they are: what is missing, how much, and what a commit writes are the same."""
    source = random.Random(3)
    clusters = sorted(source.sample(range(3 * SPAN // CLUSTER), 200))
    entries = [(cluster, source.choice((ZERO, 0x10000 + number * CLUSTER))) for number, cluster in enumerate(clusters)]
    maps = []
    for together in (False, True):
        overlay = await opened(many_tables(3), writable=True)
        found = overlay.clusters
        await found.load(0, 3 * SPAN)
        await overlay.count_missing()
        if together:
            found.set_all(entries)
        else:
            for entry in entries:
                found.set(*entry)
        tables = overlay.committer._tables
        count = 3 * SPAN // CLUSTER
        maps.append((overlay.missing, found.missing_of(0, count), tables.dirty, [found.entry(n) for n in range(count)]))
        one_by_one = [number for number in range(count) if found.entry(number) == MISSING]
        assert found.missing_of(0, count) == one_by_one
        assert found.missing_of(7, count - 9) == [number for number in one_by_one if 7 <= number < count - 2]
    assert maps[0] == maps[1]
    assert maps[0][2]
