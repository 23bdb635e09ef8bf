"""Malformed overlays: an error of ours or an answer, nothing else. `contrib/fuzz` runs the same for longer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.cli.commands.map import whole_map
from qedfs.format.header import NEED_CHECK
from qedfs.format.tables import MISSING
from qedfs.overlay.check import check
from qedfs.overlay.clustermap import Run
from qedfs.overlay.open import open_overlay
from qedfs.overlay.session import read_header
from tests.harness.sample import sample
from tests.overlay.images import empty
from tests.overlay.malformed import Malformed, generate, judge, named
from tests.overlay.work import at_most

pytestmark = pytest.mark.sweep

RANDOM_CASES = sample(50, whole=400)


@pytest.fixture
def path() -> Iterator[Path]:
    # A tmpfs takes files of any length.
    path = Path("/dev/shm", f"qedfs-malformed-{random.randrange(1 << 60):x}.qed")
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.expect_log("the space of discarded clusters is not given back")
async def test_named_cases(path: Path) -> None:
    verdicts = {case.name: await judge(case, path) for case in named()}
    assert len(verdicts) > 200
    refused = [name for name, verdict in verdicts.items() if verdict.error]
    assert 50 < len(refused) < len(verdicts) - 50


TABLES = 131071
STEPS = 3 * TABLES  # slice by slice, a walk would read 2^21 of them


def terabyte_of_holes(features: int = 0) -> Malformed:
    """64 KiB clusters, tables of 1 MiB: as many of them as L1 has room for, and nothing in any of them."""
    built = empty(cluster_size=1 << 16, table_size=16, image_size=TABLES << 33)
    for number in range(TABLES):
        built.put_u64(built.header.l1_table_offset + 8 * number, len(built.data) + (number << 20))
    built.replace(features=built.header.features | features)
    return Malformed("holes", bytes(built.data), 1 << 40)


async def test_a_terabyte_of_holes_costs_nothing(path: Path) -> None:
    terabyte_of_holes().put(path)
    overlay = await open_overlay(str(path), writable=False)
    with at_most(STEPS):
        report = check(overlay.storage, read_header(overlay.storage)[0])
    assert (report.tables, report.corruptions, report.allocated) == (TABLES, 0, 0)
    with at_most(STEPS):
        await overlay.count_missing()
    assert overlay.missing == overlay.geometry.clusters
    with at_most(STEPS):
        assert [run async for run in whole_map(overlay)] == [Run(MISSING, 0, overlay.image_size)]
    overlay.storage.close()


async def test_a_terabyte_of_holes_is_repaired_at_once(path: Path) -> None:
    case = terabyte_of_holes(NEED_CHECK)
    case._replace(data=case.data + b"\2").put(path)  # the first table has an entry that points nowhere
    with at_most(STEPS):
        overlay = await open_overlay(str(path), writable=True)
    assert (await overlay.map(0, 1 << 20)) == [Run(MISSING, 0, 1 << 20)]
    overlay.storage.close()


async def test_a_table_of_holes_and_entries_is_seen_whole(path: Path) -> None:
    """Entries at the edges of holes, of chunks and of slices: 16 clusters of 1 MiB, all but three of 16 MiB a hole."""
    built = empty(cluster_size=1 << 20, table_size=16, image_size=1 << 41)
    table = len(built.data)
    built.put_u64(built.header.l1_table_offset, table)
    entries = built.header.geometry.entries
    filled_in = (0, 511, 512, 8191, 8192, 100_000, entries - 1)
    with path.open("wb") as file:
        file.write(built.data)
        for number, cluster in enumerate(filled_in):
            file.seek(table + 8 * cluster)
            file.write((table + (16 + number << 20)).to_bytes(8, "little"))
        file.truncate(table + (32 << 20))
    overlay = await open_overlay(str(path), writable=False)
    assert check(overlay.storage, read_header(overlay.storage)[0]).allocated == len(filled_in)
    await overlay.count_missing()
    assert overlay.missing == entries - len(filled_in)
    runs = [run async for run in whole_map(overlay)]
    assert sum(run.size for run in runs) == overlay.image_size
    data = [cluster for run in runs if run.offset for cluster in range(run.pos >> 20, run.pos + run.size >> 20)]
    assert data == list(filled_in)
    overlay.storage.close()


async def test_random_cases(path: Path) -> None:
    rng = random.Random(20101)
    verdicts = [await judge(generate(rng), path) for _ in range(RANDOM_CASES)]
    assert RANDOM_CASES / 10 < sum(bool(verdict.error) for verdict in verdicts) < RANDOM_CASES * 0.9
