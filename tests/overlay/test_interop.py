"""QEMU and qedfs read and write each other's overlays, in turn, and keep out of each other's way."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest
import trio

from qedfs.errors import InUse
from qedfs.format.header import UNTOUCHED, Header, decode_header
from qedfs.format.record import Pin, digest
from qedfs.overlay.check import check
from qedfs.overlay.create import create_overlay
from qedfs.overlay.fill import Fill
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from qedfs.overlay.storage import FileStorage
from tests.overlay.conftest import Qemu
from tests.overlay.examine import examine
from tests.overlay.powercut import states
from tests.overlay.runs import run_seed
from tests.overlay.scenario import read_all

# What QEMU 7.2 opens: table sizes from 2 (with 1 it creates what it cannot open), clusters up to 4 MiB at table size 2.
GEOMETRIES = [
    *((4096, table) for table in (2, 4, 8, 16)),
    *((8192, 2), (16384, 4), (65536, 2), (65536, 4), (65536, 16), (1 << 20, 2), (1 << 21, 4), (1 << 22, 2)),
]
SIZE = (1 << 20) + 4096 + 512  # a partial last cluster in every geometry, and longer than the backing
PIN = Pin(digest("base.raw"), 1 << 20, '"e"')


def expected_of(base: bytes, size: int = SIZE) -> bytearray:
    return bytearray(base[:size].ljust(size, b"\0"))


async def content(path: str, base: bytes, *, writable: bool = False) -> bytes:
    overlay = await open_overlay(path, writable=writable)
    try:
        return bytes(await read_all(overlay, bytes(expected_of(base, overlay.image_size))))
    finally:
        await overlay.close()


def fill_from(overlay: Overlay, base: bytes) -> Fill:
    async def fill(cluster: int) -> bytes:
        size = overlay.cluster_size
        # Junk behind the image's end, as a source that is longer would give.
        return bytes(expected_of(base))[cluster * size : (cluster + 1) * size].ljust(size, b"J")

    return fill


async def half_fill(path: str, base: bytes, rng: random.Random) -> bytearray:
    """Write, adopt and adopt zeros at random through qedfs; returns what the image must read as."""
    overlay = await open_overlay(path, writable=True)
    size, expected = overlay.cluster_size, expected_of(base)
    for _ in range(8):
        pos = rng.randrange(0, SIZE - 512, 512)
        data = rng.randbytes(min(rng.choice((512, 5120, 70000)), SIZE - pos))
        await overlay.write(pos, data, fill_from(overlay, base))
        expected[pos : pos + len(data)] = data
    for cluster in rng.sample(range(overlay.geometry.clusters), min(6, overlay.geometry.clusters)):
        fetched = bytearray(expected_of(base)[cluster * size : (cluster + 2) * size])
        await overlay.adopt(cluster * size, fetched, len(fetched))
    await overlay.close()
    return expected


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
async def test_an_overlay_that_qemu_made_is_read_right(
    qemu: Qemu, base: bytes, cluster_size: int, table_size: int
) -> None:
    path = qemu.make("a.qed", SIZE, cluster_size=cluster_size, table_size=table_size)
    writes = ["write -P 0x11 0 1024", "write -P 0x22 70000 6000", "write -z 131072 65536", "write -P 0x33 1052672 512"]
    qemu.io("a.qed", *writes)
    assert await content(path, base) == qemu.raw("a.qed")
    storage = FileStorage.open(path, writable=False)
    report = check(storage, read_header(storage)[0])
    storage.close()
    assert (report.corruptions, report.leaks) == (0, 0)


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
async def test_an_overlay_that_we_filled_is_read_right_by_qemu(
    qemu: Qemu, base: bytes, cluster_size: int, table_size: int
) -> None:
    path = str(qemu.folder / "a.qed")
    create_overlay(path, image_size=SIZE, backing="base.raw", cluster_size=cluster_size, table_size=table_size)
    expected = await half_fill(path, base, random.Random(cluster_size + table_size))
    assert qemu.raw("a.qed") == expected
    assert "leaks" not in qemu.check("a.qed")
    assert await content(path, base) == expected


async def test_zero_clusters_hide_the_backing_for_both(qemu: Qemu, base: bytes) -> None:
    path = qemu.make("a.qed", SIZE)
    overlay = await open_overlay(path, writable=True)
    await overlay.adopt_zeros(2, 3)
    await overlay.close()
    qemu.io("a.qed", "read -P 0 131072 196608")
    assert qemu.check("a.qed").get("allocated-clusters", 0) == 0

    # A partial write to a zero cluster leaves zeros around it; QEMU 7.2 itself would bring the backing back.
    overlay = await open_overlay(path, writable=True)
    await overlay.write(131072 + 4096, b"\x44" * 512, fill_from(overlay, base))
    await overlay.close()
    qemu.io("a.qed", "read -P 0 131072 4096", "read -P 0x44 135168 512", "read -P 0 135680 60928")


async def test_twenty_times_back_and_forth(qemu: Qemu, base: bytes) -> None:
    path = qemu.make("a.qed", SIZE, cluster_size=4096, table_size=2)
    rng = random.Random(3)
    expected = expected_of(base)
    for turn in range(20):
        overlay = await open_overlay(path, writable=True)
        assert await read_all(overlay, bytes(expected_of(base))) == expected
        ours = rng.randrange(0, SIZE - 9000, 512)
        await overlay.write(ours, bytes([turn + 1]) * 9000, fill_from(overlay, base))
        expected[ours : ours + 9000] = bytes([turn + 1]) * 9000
        first = rng.randrange(overlay.geometry.clusters - 4)
        await overlay.adopt(first * 4096, bytearray(expected_of(base)[first * 4096 :][: 4 * 4096]), 4 * 4096)
        await overlay.close()

        pos = rng.randrange(0, SIZE - 9000, 512)
        qemu.io("a.qed", f"read -P {turn + 1} {ours} 9000", f"write -P {turn + 101} {pos} 9000")
        expected[pos : pos + 9000] = bytes([turn + 101]) * 9000
    assert qemu.raw("a.qed") == expected
    assert "leaks" not in qemu.check("a.qed")


async def test_a_detached_overlay_stands_alone_for_qemu(qemu: Qemu, base: bytes) -> None:
    path = qemu.make("a.qed", SIZE)
    overlay = await open_overlay(path, writable=True)
    data = bytearray(expected_of(base))
    await overlay.adopt(0, data, SIZE)
    await overlay.detach()
    await overlay.close()
    (qemu.folder / "base.raw").unlink()
    assert qemu.raw("a.qed") == expected_of(base)
    assert "backing" not in qemu.run("qemu-img", "info", "a.qed")
    # QEMU grows it; what was behind the image's end reads as zeros.
    qemu.run("qemu-img", "resize", "-q", "a.qed", str(SIZE + 65536))
    qemu.io("a.qed", f"read -P 0 {SIZE} 65536")


async def test_who_has_it_open_keeps_the_other_out(qemu: Qemu, base: bytes) -> None:
    path = qemu.make("a.qed", SIZE)
    overlay = await open_overlay(path, writable=True)
    assert "Failed to get" in qemu.io("a.qed", "read 0 512", fails=True)
    assert "Failed to get" in qemu.io("a.qed", "read 0 512", read_only=True, fails=True)
    await overlay.close()

    reader = await open_overlay(path, writable=False)
    qemu.io("a.qed", "read 0 512", read_only=True)
    assert "Failed to get" in qemu.io("a.qed", "write 0 512", fails=True)
    await reader.close()

    with qemu.holding("a.qed"):
        for writable in (True, False):
            with pytest.raises(InUse, match="is in use by another program"):
                await open_overlay(path, writable=writable)
    assert await content(path, base) == expected_of(base)


def header_of(path: str) -> Header:
    data = Path(path).read_bytes()
    return decode_header(data[:64], len(data))


def set_features(path: str, *, compat: int, autoclear: int) -> None:
    header = dataclasses.replace(header_of(path), compat_features=compat, autoclear_features=autoclear)
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, header.encode(), 0)
    os.close(fd)


async def test_foreign_bits_are_kept_and_cleared_as_qemu_does(qemu: Qemu, base: bytes) -> None:
    path = qemu.make("a.qed", SIZE)
    set_features(path, compat=0x30, autoclear=0x5)
    assert await content(path, base) == expected_of(base)
    assert (header_of(path).compat_features, header_of(path).autoclear_features) == (0x30, 0x5)
    await content(path, base, writable=True)
    assert (header_of(path).compat_features, header_of(path).autoclear_features) == (0x30, UNTOUCHED)


@pytest.mark.expect_log("another program has written to it after a mount of it was killed; the writes that only")
async def test_a_write_by_qemu_voids_the_journal_and_keeps_the_pin(qemu: Qemu, base: bytes, tmp_path: Path) -> None:
    """A killed session's journal must not be replayed over what QEMU wrote to the file since."""
    journals = tmp_path / "journals"
    journals.mkdir()
    path = qemu.make("a.qed", SIZE)
    overlay = await open_overlay(path, writable=True, journal_folder=journals)
    await overlay.change_record(lambda record: dataclasses.replace(record, pin=PIN))
    await overlay.write(0, b"k" * 65536, fill_from(overlay, base))
    overlay.storage.close()  # as SIGKILL leaves it: entries in the journal only
    assert list(journals.iterdir())

    qemu.io("a.qed", "write -P 0x77 0 65536", "write -P 0x78 65536 65536")
    assert header_of(path).autoclear_features == 0
    again = await open_overlay(path, writable=True, journal_folder=journals)
    assert again.record.pin == PIN
    expected = expected_of(base)
    expected[:131072] = b"\x77" * 65536 + b"\x78" * 65536
    assert await read_all(again, bytes(expected_of(base))) == expected
    await again.close()
    assert qemu.raw("a.qed") == expected


async def test_without_a_write_by_qemu_the_journal_is_replayed(qemu: Qemu, base: bytes, tmp_path: Path) -> None:
    journals = tmp_path / "journals"
    journals.mkdir()
    path = qemu.make("a.qed", SIZE)
    overlay = await open_overlay(path, writable=True, journal_folder=journals)
    await overlay.write(512, b"k" * 512, fill_from(overlay, base))
    overlay.storage.close()
    qemu.io("a.qed", "read 0 512", read_only=True)
    again = await open_overlay(path, writable=True, journal_folder=journals)
    await again.close()
    qemu.io("a.qed", f"read -P {ord('k')} 512 512")
    assert list(journals.iterdir()) == []


@pytest.mark.parametrize("seed", [7, 9, 10, 11])
async def test_qemu_agrees_on_states_after_a_power_cut(qemu: Qemu, seed: int) -> None:
    """A sample of the replayed states, small enough that QEMU's check counts no leaks that are not there."""
    history = await trio.to_thread.run_sync(run_seed, seed)
    scenario = history.scenario
    (qemu.folder / "base.raw").write_bytes(scenario.backing)
    rng = random.Random(seed)
    sample = [state for state in states(history, 1, rng) if rng.random() < 0.06]
    assert sample
    for cut, image in sample:
        await examine(image, history, cut.position, rng)
        (qemu.folder / "cut.qed").write_bytes(image)
        # Writable, so that QEMU repairs where NEED_CHECK says so.
        qemu.io("cut.qed", "read 0 512")
        qemu.check("cut.qed")
        assert history.model.fault(qemu.raw("cut.qed"), cut.position) is None
