"""Power cuts by replay: no flushed byte is lost, no other byte is altered, every state opens and can be worked on.

`contrib/powercut` runs the same for as long as one likes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.errors import QedfsError
from qedfs.format.header import BACKING_FILE, HEADER_BYTES, decode_header
from qedfs.overlay.open import open_storage
from tests.fakes.storage import Lost, Marked, RecordingStorage, Resized, Written
from tests.harness.sample import sample
from tests.model import SectorModel
from tests.overlay.cuts import Disk, Piece, Truncation
from tests.overlay.examine import Broken, examine
from tests.overlay.guest import no_fill
from tests.overlay.images import empty
from tests.overlay.mutants import MOVES, MUTANTS, Mutant, mutated
from tests.overlay.powercut import Failure, Tally, replay, reproduce
from tests.overlay.runs import run_seed
from tests.overlay.scenario import DROPPING, MOVING, History, Scenario

pytestmark = pytest.mark.sweep

STATES_PER_SEED = 160
MUTANT_SEEDS = 600
MUTANT_STATES = 400
CHEAP_BYTES = 200_000  # of image or table: scenarios below it are replayed at 1,500 states a second


def check_states(first: int) -> None:
    """No state of two scenarios breaks a promise."""
    tallies = [replay(seed, most=STATES_PER_SEED, per_position=1, twice=100) for seed in (first, first + 1)]
    failures = [failure for tally in tallies for failure in tally.failures]
    assert not failures, "\n".join(map(str, failures[:5]))
    assert sum(tally.states for tally in tallies) > STATES_PER_SEED


@pytest.mark.parametrize("first", range(0, sample(4, whole=64), 2))
def test_every_state_after_a_power_cut_is_legal(first: int) -> None:
    check_states(first)


@pytest.mark.parametrize("first", range(MOVING, MOVING + sample(2, whole=64), 2))
def test_every_state_is_legal_while_data_is_moved(first: int) -> None:
    check_states(first)


@pytest.mark.parametrize("first", range(DROPPING, DROPPING + sample(2, whole=64), 2))
def test_every_state_is_legal_while_what_the_backing_has_is_dropped(first: int) -> None:
    check_states(first)


def cheap_seeds(mutant: Mutant) -> Iterator[int]:
    """Seeds of small scenarios that have what the rule needs, from that on at which the search begins."""
    start = MOVING if mutant in MOVES else 0
    for scenario in map(Scenario.draw, range(start + mutant.first, start + MUTANT_SEEDS)):
        size = max(scenario.geometry.image_size, scenario.geometry.table_bytes * 8)
        if size < CHEAP_BYTES and (not mutant.needs or getattr(scenario, mutant.needs)):
            yield scenario.seed


@pytest.mark.parametrize("mutant", MUTANTS + MOVES, ids=lambda mutant: mutant.rule)
def test_each_rule_is_necessary(mutant: Mutant) -> None:
    """Without the rule some state after a power cut breaks a promise; with it, as many states keep them all."""
    with mutated(mutant):
        found = next(tallies_with_failures(mutant), None)
    assert found is not None, f"nothing breaks without it: {mutant.rule}"
    assert replay(found.failures[0].seed, most=found.states).failures == []


def tallies_with_failures(mutant: Mutant) -> Iterator[Tally]:
    """What a search of the seeds of a mutant finds, each up to its first failure."""
    tallies = (replay(seed, most=MUTANT_STATES, stop=True) for seed in cheap_seeds(mutant))
    return (tally for tally in tallies if tally.failures)


def test_a_seed_repeats_its_history() -> None:
    first, second = run_seed(5), run_seed(5)
    # Session ids are random, and so are the bytes of the records that hold them.
    assert shape(first) == shape(second)
    assert len(first.storage.log) > 50


def shape(history: History) -> list[object]:
    return [(entry.offset, len(entry.data)) if isinstance(entry, Written) else entry for entry in history.storage.log]


def test_a_failing_state_is_kept_and_reproduced(tmp_path: Path) -> None:
    mutant = MUTANTS[0]
    with mutated(mutant):
        tally = next(tallies_with_failures(mutant))
        [failure] = tally.failures
        loaded = Failure.load(failure.save(tmp_path))
        assert loaded == failure
        assert reproduce(loaded) is not None
    # The cut is one of the history without the barrier; with it, the log has other positions.
    assert replay(loaded.seed, most=tally.states).failures == []


async def streamed_to_the_end() -> tuple[History, int]:
    """An overlay whose last clusters come in just before the detach; the position of the header without backing."""
    built = empty(cluster_size=4096, image_size=64 * 4096, backing=b"base.raw")
    backing = random.Random(1).randbytes(64 * 4096)
    scenario = Scenario(0, built.header.geometry, backing, False, True, False, 0, 0)
    storage = RecordingStorage(built.data)
    history = History(scenario, storage, SectorModel(backing))
    overlay = await open_storage(storage)
    for pos in range(0, len(backing), 8 * 4096):
        await overlay.adopt(pos, bytearray(backing[pos : pos + 8 * 4096]), 8 * 4096)
    await overlay.detach()
    history.detached_at = len(storage.log)
    storage.mark("complete")
    headers = [i for i, e in enumerate(storage.log) if isinstance(e, Written) and e.offset == 0]
    return history, next(i for i in headers if not backed(storage, i))


def backed(storage: RecordingStorage, index: int) -> bool:
    entry = storage.log[index]
    assert isinstance(entry, Written)
    assert len(entry.data) == HEADER_BYTES
    return bool(decode_header(entry.data, len(storage.bytes)).features & BACKING_FILE)


async def test_the_end_of_the_stream_loses_nothing() -> None:
    """The header without backing may be durable alone: no entry may be pending then.

    QEMU 7.2 writes the last L2 sectors and this header behind the same flush; the state in which only the header has
    reached the disk reads as zeros where the backing had bytes (`test_losses.py` shows it).
    """
    history, header_at = await streamed_to_the_end()
    storage = history.storage
    disk = Disk(storage.start, storage.log)
    disk.advance(header_at + 1)
    assert disk.pending() == [header_at]
    for position in range(header_at + 1, len(storage.log) + 1):
        alone = Truncation(position, (Piece(header_at, 0, HEADER_BYTES),), len(storage.bytes), garbage=False)
        disk.advance(position)
        await examine(disk.build(alone), history, position, random.Random(position))
    assert storage.log[-1] == Marked("complete")


async def test_the_end_of_the_stream_without_its_barrier_does() -> None:
    """The exact state that QEMU can leave, made by taking the barrier away: the examination must see it."""
    with mutated(next(mutant for mutant in MUTANTS if mutant.rule.startswith("detach: a barrier before"))):
        history, header_at = await streamed_to_the_end()
    disk = Disk(history.storage.start, history.storage.log)
    disk.advance(header_at + 1)
    assert len(disk.pending()) > 1
    alone = Truncation(header_at + 1, (Piece(header_at, 0, HEADER_BYTES),), len(history.storage.bytes), garbage=False)
    with pytest.raises(Broken, match="that nobody wrote differs from the backing"):
        await examine(disk.build(alone), history, header_at + 1, random.Random(1))


# The model of the disk itself.


def disk_of(*entries: Written | Resized, barrier_after: int = 0) -> tuple[RecordingStorage, Disk]:
    storage = RecordingStorage(bytes(1024))
    for number, entry in enumerate(entries):
        if isinstance(entry, Written):
            storage.write(entry.offset, [entry.data])
        else:
            storage.resize(entry.size)
        if number + 1 == barrier_after:
            storage.barrier()
    disk = Disk(storage.start, storage.log)
    disk.advance(len(storage.log))
    return storage, disk


def test_what_a_barrier_covers_is_in_every_state() -> None:
    storage, disk = disk_of(Written(0, b"a" * 512), Written(512, b"b" * 512), barrier_after=1)
    assert disk.pending() == [len(storage.log) - 1]
    contents = {bytes(disk.build(cut)) for cut in disk.cuts(100, random.Random(1))}
    assert contents == {b"a" * 512 + bytes(512), b"a" * 512 + b"b" * 512}


def test_two_writes_have_all_four_orders_and_each_its_tears() -> None:
    _, disk = disk_of(Written(0, b"a" * 1024), Written(512, b"b" * 512))
    contents = {bytes(disk.build(cut)) for cut in disk.cuts(1000, random.Random(1))}
    a, b, zero = b"a" * 512, b"b" * 512, bytes(512)
    assert contents == {zero + zero, a + a, zero + b, a + b, a + zero, zero + a}


def test_a_file_grows_wholly_in_part_or_not_at_all_over_zeros_or_garbage() -> None:
    _, disk = disk_of(Resized(4096))
    rng = random.Random(1)
    grown = {(cut.size, cut.garbage) for _ in range(200) for cut in disk.cuts(10, rng)}
    assert {(1024, False), (4096, False), (4096, True), (2048, True)} <= grown
    assert disk.build(Truncation(1, (), 4096, garbage=False)) == bytes(4096)
    assert any(disk.build(Truncation(1, (), 4096, garbage=True))[1024:])
    assert not any(disk.build(Truncation(1, (Piece(0, 0, 0),), 1024, garbage=True)))


def test_a_page_that_the_disk_did_not_take_is_in_no_state_until_it_is_written_again() -> None:
    storage = RecordingStorage(bytes(8192))
    storage.write(0, [b"a" * 8192])
    storage.lose_at(1, random.Random(1), lambda: None)
    with pytest.raises(QedfsError, match="cannot sync"):
        storage.barrier()
    lost = next(entry for entry in storage.log if isinstance(entry, Lost))
    storage.barrier()  # it says that all is well
    place = lost.pages[0][0]
    assert all(not any(state[place : place + 4096]) for state in all_states(storage))
    storage.write(place, [b"b" * 512])
    storage.barrier()
    assert all(state[place : place + 512] == b"b" * 512 for state in all_states(storage))


def all_states(storage: RecordingStorage) -> set[bytes]:
    disk = Disk(storage.start, storage.log)
    disk.advance(len(storage.log))
    return {bytes(disk.build(cut)) for cut in disk.cuts(100, random.Random(1))} or {bytes(disk._durable)}


async def test_a_write_beside_a_barrier_is_not_covered_by_it() -> None:
    storage = RecordingStorage(bytes(1024))

    def write_once() -> None:
        if storage.log:  # the barrier has begun
            storage.before_step = None
            storage.write(0, [b"a" * 512])

    storage.before_step = write_once
    await storage.in_thread(storage.barrier)
    disk = Disk(storage.start, storage.log)
    disk.advance(len(storage.log))
    assert len(storage.log) == 3
    assert disk.pending() == [1]


async def flushed_in_place() -> tuple[History, int]:
    """A write to a cluster that has a place, flushed the long way; the position at which the flush has returned.

    `flush_now` sees to nearly all such flushes, unless another barrier runs: random histories hardly ever come here.
    """
    built = empty(cluster_size=4096, image_size=64 * 4096, backing=b"base.raw")
    backing = random.Random(1).randbytes(64 * 4096)
    storage = RecordingStorage(built.data)
    history = History(
        Scenario(0, built.header.geometry, backing, False, False, False, 0, 0), storage, SectorModel(backing)
    )
    overlay = await open_storage(storage)
    await overlay.adopt(0, bytearray(backing[:4096]), 4096)
    await overlay.flush()
    data = random.Random(2).randbytes(512)
    version = history.model.begin(len(storage.log), 0, data)
    await overlay.write(0, data, no_fill)
    history.model.returned(version)
    since = history.model.flushing()
    await overlay.flush()
    history.model.flushed(since, len(storage.log))
    return history, len(storage.log)


async def examine_with_nothing_pending(history: History, position: int) -> None:
    """The state in which the disk has only what a barrier has covered."""
    disk = Disk(history.storage.start, history.storage.log)
    disk.advance(position)
    least = Truncation(position, (), len(history.storage.bytes), garbage=False)
    await examine(disk.build(least), history, position, random.Random(position))


async def test_a_flush_has_a_barrier_also_where_no_entry_is_new() -> None:
    await examine_with_nothing_pending(*await flushed_in_place())
    without = Mutant(
        "flush: a barrier also where no entry is new",
        "commit:Committer._write",
        "if durable:",
        "if durable and (group.dirty or group.tables):",
    )
    with mutated(without):
        history, position = await flushed_in_place()
    with pytest.raises(Broken, match="a write has survived"):  # so says the model, but the file has nothing of it
        await examine_with_nothing_pending(history, position)
