"""The end of a stream, by QEMU and by qedfs: power cuts at every position of what each has written.

`contrib/powercut --qemu` does the same with a larger image.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.images import Check
from tests.overlay.conftest import Qemu
from tests.overlay.cuts import Disk, Truncation
from tests.overlay.losses import Stretch, describe, differing, replay_stream
from tests.overlay.mutants import MUTANTS, mutated
from tests.overlay.streamed import Workload, by_qedfs, by_qemu, qemu_version, workload

SIZE = 1 << 20
QEMU_CHUNK = 512 << 10  # what QEMU's stream copies at once


@pytest.fixture
def work(qemu: Qemu) -> Workload:
    return workload(SIZE)


def test_the_log_of_qemus_stream_tells_all_that_was_written(work: Workload) -> None:
    storage = by_qemu(work).storage
    position = len(storage.log)
    disk = Disk(storage.start, storage.log)
    disk.advance(position)
    assert disk.pending() == []
    assert disk.build(Truncation(position, (), len(storage.bytes), garbage=False)) == storage.bytes


def test_qemu_drops_the_backing_before_the_last_data_is_durable(work: Workload, tmp_path: Path) -> None:
    history = by_qemu(work)
    tally = replay_stream(history, tmp_path)
    assert tally.broken == []
    if qemu_version()[:2] != (7, 2):
        return  # Which clusters a cut loses is known of 7.2 only.
    (loss,) = tally.losses
    assert loss.lost == (Stretch(SIZE - QEMU_CHUNK, QEMU_CHUNK),)
    assert loss.zeros
    # The tables are sound, so nothing tells the user: the clusters are merely leaked.
    assert loss.checked == Check(corruptions=0, leaks=QEMU_CHUNK // 65536)
    assert describe(history, loss.cut).endswith(" missing, the header written")


def test_the_same_stream_by_qedfs_loses_nothing(work: Workload, tmp_path: Path) -> None:
    tally = replay_stream(by_qedfs(work), tmp_path)
    assert (tally.losses, tally.broken) == ([], [])
    assert tally.states > 30


def test_without_its_barrier_the_stream_of_qedfs_loses_too(work: Workload, tmp_path: Path) -> None:
    with mutated(next(mutant for mutant in MUTANTS if mutant.rule.startswith("detach: a barrier before"))):
        history = by_qedfs(work)
    assert replay_stream(history, tmp_path, only_losses=True).losses


def test_stretches_that_differ() -> None:
    one = bytes(4096)
    other = bytearray(one)
    other[512] = other[1535] = other[4095] = 1
    assert list(differing(one, one)) == []
    assert list(differing(one, bytes(other))) == [Stretch(512, 1024), Stretch(3584, 512)]
