"""An overlay is a disk: whatever is done to it, it reads as a plain array of bytes would.

The operations come one after the other here, at any byte; what runs at once is the matter of the scenarios, whose
readers are checked while writers, adopters and flushes run beside them.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qedfs.format.geometry import Geometry
from qedfs.overlay.check import check
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from qedfs.overlay.table_slices import SLICE_ENTRIES
from tests.fakes.storage import MemoryStorage
from tests.harness.sample import sample
from tests.overlay.mutants import Mutant, mutated
from tests.overlay.runs import run_seed
from tests.overlay.scenario import fresh_image, read_all

pytestmark = pytest.mark.sweep

SIZES = (4096 * 3, 4096 * 9 + 512, (2 << 20) + 8192 + 1536)
places = st.integers(0, (1 << 24) - 1)
operations = st.one_of(
    st.tuples(st.just("write"), places, st.integers(1, 20000)),
    st.tuples(st.just("write"), places, st.sampled_from((1, 511, 4096, 8192))),
    st.tuples(st.just("adopt"), places, st.integers(1, 4) | st.integers(40, 200)),
    st.tuples(st.just("adopt_zeros"), places, st.integers(1, 4) | st.integers(40, 200)),
    st.tuples(st.just("discard"), places, st.integers(1, 4) | st.integers(40, 200)),
    st.tuples(st.sampled_from(("flush", "commit", "reopen", "kill", "detach", "read_only")), places, st.just(0)),
)


class Machine:
    """One overlay and the bytes that it should hold."""

    def __init__(self, image_size: int, backing_size: int, journals: Path | None, seed: int) -> None:
        rng = random.Random(seed)
        backing = b"".join(rng.choice((bytes(4096), rng.randbytes(4096))) for _ in range(backing_size // 4096 + 1))
        self.base = backing[: min(backing_size, image_size)].ljust(image_size, b"\0")
        self.expected = bytearray(self.base)
        self._journals = journals
        self._storage = MemoryStorage(fresh_image(Geometry(4096, 1, image_size)), name="disk")
        self._stamp = 0
        self.overlay: Overlay

    async def open(self) -> None:
        self.overlay = await open_storage(self._storage, journal_folder=self._journals)
        self.overlay.tables._cache_slices = 2

    async def step(self, name: str, place: int, count: int) -> None:
        await getattr(self, name)(place, count)
        assert await read_all(self.overlay, self.base) == self.expected

    async def fill(self, cluster: int) -> bytes:
        return self.base[cluster * 4096 : (cluster + 1) * 4096].ljust(4096, b"J")

    async def write(self, place: int, count: int) -> None:
        pos = place % len(self.base)
        self._stamp += 1
        data = (self._stamp.to_bytes(3, "little") * (count // 3 + 1))[: min(count, len(self.base) - pos)]
        self.expected[pos : pos + len(data)] = data
        await self.overlay.write(pos, data, self.fill)

    def _clusters(self, place: int, count: int) -> tuple[int, int]:
        first = place % self.overlay.geometry.clusters
        return first, min(count, self.overlay.geometry.clusters - first)

    async def adopt(self, place: int, count: int) -> None:
        first, count = self._clusters(place, count)
        if self.overlay.backing is not None:
            fetched = bytearray(self.base[first * 4096 : (first + count) * 4096])
            await self.overlay.adopt(first * 4096, fetched, len(fetched))

    async def adopt_zeros(self, place: int, count: int) -> None:
        first, count = self._clusters(place, count)
        if not any(self.base[first * 4096 : (first + count) * 4096]):
            await self.overlay.adopt_zeros(first, count)

    async def discard(self, place: int, count: int) -> None:
        first, count = self._clusters(place, count)
        self.expected[first * 4096 : (first + count) * 4096] = bytes(
            min(count * 4096, len(self.expected) - first * 4096)
        )
        await self.overlay.discard(first, count)

    async def flush(self, _place: int, _count: int) -> None:
        await self.overlay.flush()

    async def commit(self, _place: int, _count: int) -> None:
        await self.overlay.commit()

    async def reopen(self, _place: int, _count: int) -> None:
        await self.overlay.close()
        await self.kill(0, 0)
        assert check(self._storage, read_header(self._storage)[0]).corruptions == 0

    async def kill(self, _place: int, _count: int) -> None:
        self._storage = MemoryStorage(self._storage.bytes, name="disk")
        await self.open()

    async def read_only(self, _place: int, _count: int) -> None:
        """A second opening sees what is committed."""
        await self.overlay.commit()
        other = await open_storage(MemoryStorage(self._storage.bytes, writable=False))
        assert await read_all(other, self.base) == self.expected

    async def detach(self, _place: int, _count: int) -> None:
        cluster = 0
        while (found := await self.overlay.clusters.next_missing(cluster, 64)) is not None:
            await self.adopt(*found)
            cluster = found[0] + found[1]
        if await self.overlay.clusters.next_missing(0, 1) is None:
            await self.overlay.detach()


@settings(max_examples=sample(25, whole=150))
@given(
    st.sampled_from(SIZES),
    st.sampled_from((0, 4096, 30_000, 3 << 20)),
    st.booleans(),
    st.sampled_from((SLICE_ENTRIES, 64)),
    st.lists(operations, min_size=1, max_size=25),
)
def test_it_reads_as_an_array_would(
    image_size: int, backing_size: int, journal: bool, slice_entries: int, steps: list[tuple[Any, int, int]]
) -> None:
    """With whole tables in memory, and with eight slices to a table and two of them in memory."""

    async def main(folder: Path | None) -> None:
        machine = Machine(image_size, backing_size, folder, len(steps))
        await machine.open()
        for step in steps:
            await machine.step(*step)

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("qedfs.overlay.table_slices.SLICE_ENTRIES", slice_entries)
        trio.run(main, Path(folder) if journal else None)


@pytest.mark.parametrize("first", range(0, sample(25, whole=400), 25))
def test_readers_beside_writers_see_no_undone_write(first: int) -> None:
    """Guest bytes win over adopted ones in every interleaving."""
    for seed in range(first, first + 25):
        history = run_seed(seed)
        assert history.misreads == []
        assert len(history.storage.log) > 20


RULES = (
    Mutant(
        "an adoption leaves claimed clusters alone",
        "adoption:Adoption._sort_out",
        " if cluster not in claimed",
        "",
        first=849,
    ),
    Mutant(
        "an adoption leaves clusters alone that have something",
        "adoption:Adoption._sort_out",
        "self._map.missing_of(first, count)",
        "range(first, first + count)",
    ),
    Mutant(
        "a write waits for a claim to end",
        "pending:PendingAllocations._claim_in",
        "if not self._pending:",
        "if True:",
        first=6,
    ),
    Mutant(
        "a discard waits for a claim to end",
        "discard:Discards._discard_some",
        "await self._pending.settle(pos, size)",
        "await self._map.load(pos, size)",
        first=22,
    ),
    Mutant(
        "the space of a discarded cluster is used after all reads and writes that may refer to it",
        "freed:FreedClusters._next",
        " or self._durable[0][0] > self.accesses.oldest",
        "",
        first=1582,
    ),
    Mutant(
        "a discard that a failed barrier has taken back is an error",
        "discard:Discards.discard",
        "self._barriers.check_writable()",
        "pass",
        first=567,
    ),
)


@pytest.mark.parametrize("mutant", RULES, ids=lambda mutant: mutant.rule)
def test_each_rule_is_necessary(mutant: Mutant) -> None:
    def breaks(seed: int) -> bool:
        try:
            history = run_seed(seed)
            faults = trio.run(final_fault, history)
        except (Exception, BaseExceptionGroup):
            return True
        return faults is not None or history.misreads != []

    async def final_fault(history: Any) -> str | None:
        overlay = await open_storage(MemoryStorage(history.storage.bytes))
        content = await read_all(overlay, history.scenario.base)
        fault: str | None = history.model.fault(content, len(history.storage.log))
        return fault

    with mutated(mutant):
        seeds = range(mutant.first, mutant.first + 400)
        assert any(map(breaks, seeds)), f"nothing breaks without it: {mutant.rule}"
