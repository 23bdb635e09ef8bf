"""Images that QEMU made read as QEMU reads them, byte for byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qedfs.errors import SourceError
from qedfs.source.qcow2 import Qcow2Source
from qedfs.source.qcow2.inflate import inflater
from tests.source.qcow2.support import KiB, MemorySource, MiB, convert, opened, qemu_img, qemu_io, read

SIZE = 5 * MiB + 3 * 512


def mixed_disk(size: int = SIZE) -> bytes:
    """Holes, zeros, text and noise, in stretches of all lengths."""
    source = random.Random(5)
    disk = bytearray()
    while len(disk) < size:
        length = 512 * source.choice([1, 3, 8, 100, 500, 3000])
        kind = source.randrange(4)
        if kind == 0:
            disk += bytes(length)
        elif kind == 1:
            disk += source.randbytes(length)
        else:
            disk += (source.randbytes(40) * (length // 40 + 1))[:length]
    return bytes(disk[:size])


async def assert_same(image: bytes, disk: bytes, *, step: int = MiB) -> None:
    """The whole disk in steps, then ranges here and there, then what the extents say."""
    source, _ = await opened(image)
    assert source.identity.size == len(disk)
    for pos in range(0, len(disk), step):
        size = min(step, len(disk) - pos)
        assert await read(source, pos, size) == disk[pos : pos + size], pos
    rng = random.Random(len(image))
    for _ in range(100):
        pos = rng.randrange(len(disk))
        size = rng.randrange(1, min(len(disk) - pos, rng.choice([600, 9000, 200_000])) + 1)
        assert await read(source, pos, size, urgent=bool(size & 1)) == disk[pos : pos + size], (pos, size)
    at = 0
    while at < len(disk):
        for extent in await source.extents(at, len(disk) - at) or ():
            assert extent.pos == at
            assert extent.size > 0
            at += extent.size
            assert not extent.zero or not any(disk[extent.pos : at])
    assert at == len(disk)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    content = mixed_disk()
    path = tmp_path_factory.mktemp("qcow2") / "disk.raw"
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 1 * KiB, 4 * KiB, 64 * KiB, 256 * KiB, 2 * MiB])
async def test_converted_image(
    tmp_path: Path, disk: tuple[Path, bytes], cluster_size: int, compat: str, compress: bool
) -> None:
    raw, content = disk
    image = convert(raw, tmp_path / "disk.qcow2", f"cluster_size={cluster_size}", f"compat={compat}", compress=compress)
    await assert_same(image, content)
    if cluster_size >= 4 * KiB:
        await assert_same(image, content, step=64 * KiB)


async def test_zstd(tmp_path: Path, disk: tuple[Path, bytes]) -> None:
    raw, content = disk
    await assert_same(convert(raw, tmp_path / "disk.qcow2", "compression_type=zstd", compress=True), content)


async def test_zstd_without_a_module_for_it(
    tmp_path: Path, disk: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = convert(disk[0], tmp_path / "disk.qcow2", "compression_type=zstd", compress=True)
    monkeypatch.setattr("importlib.import_module", _no_module)
    with pytest.raises(SourceError, match=r"disk\.qcow2 is compressed with zstd; install the Python module zstandard"):
        await opened(image)
    assert inflater(0) is not None


def _no_module(name: str) -> None:
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
async def test_empty_image(tmp_path: Path, preallocation: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"preallocation={preallocation}", path, str(3 * MiB + 512))
    await assert_same(path.read_bytes(), bytes(3 * MiB + 512))


async def test_image_of_no_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "0")
    source, _ = await opened(path.read_bytes())
    assert source.identity.size == 0
    await source.read(0, memoryview(bytearray()))
    assert await source.extents(0, 0) == []


async def test_zero_clusters_with_and_without_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "2M")
    # The first write -z keeps the cluster allocated under its zero flag, the one with -u does not.
    qemu_io(
        path, "write -P 7 0 1M", "write -z 64k 64k", "write -z -u 192k 128k", "write -z 1M 512k", "discard 512k 64k"
    )
    raw = tmp_path / "disk.raw"
    qemu_img("convert", "-O", "raw", path, raw)
    await assert_same(path.read_bytes(), raw.read_bytes())


async def test_image_that_a_guest_has_used(tmp_path: Path) -> None:
    """Compressed clusters, some overwritten, and a snapshot, which keeps clusters that the disk no longer has."""
    raw, path = tmp_path / "in.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(mixed_disk(2 * MiB))
    convert(raw, path, compress=True)
    rng = random.Random(2)
    qemu_io(path, *(f"write -P {n + 1} {512 * rng.randrange(3000)} {512 * rng.randrange(1, 300)}" for n in range(20)))
    qemu_img("snapshot", "-c", "before", path)
    qemu_io(path, "write -P 99 300k 100k", "write -z 1M 64k")
    qemu_img("convert", "-O", "raw", path, raw)
    await assert_same(path.read_bytes(), raw.read_bytes())


async def test_last_cluster_of_the_file_is_cut_short(tmp_path: Path) -> None:
    raw, path, out = tmp_path / "in.raw", tmp_path / "disk.qcow2", tmp_path / "out.raw"
    raw.write_bytes(random.Random(1).randbytes(3 * MiB))
    image = convert(raw, path, "cluster_size=2M")
    path.write_bytes(image[: -3 * MiB // 2])
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, out)
    await assert_same(path.read_bytes(), out.read_bytes())


async def test_large_disk_with_little_in_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    here = 3 << 40
    qemu_img("create", "-f", "qcow2", path, "4T")
    qemu_io(path, f"write -P 5 {here} 64k")
    source, inner = await opened(path.read_bytes())
    assert await read(source, here - 100, 200) == bytes(100) + b"\5" * 100
    assert await read(source, (4 << 40) - 4096, 4096) == bytes(4096)
    inner.reads.clear()
    at, steps = 0, 0
    while at < 4 << 40:
        extents = await source.extents(at, (4 << 40) - at) or ()
        assert [extent.zero for extent in extents if extent.pos <= here < extent.pos + extent.size] in ([], [False])
        at, steps = extents[-1].pos + extents[-1].size, steps + 1
    assert steps < 10
    assert inner.reads == [], "the one table is in memory, and nothing else needs a look"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["backing_file=/etc/passwd", "backing_fmt=raw"], "has a backing file of its own, which is never followed"),
        (["data_file={}/data.raw"], "keeps its data in an external file, which is never followed"),
        (["extended_l2=on"], r"has subclusters \(extended_l2\), which are not supported"),
        (
            ["encrypt.format=aes", "encrypt.key-secret=s"],
            "is encrypted, which is not supported",
        ),
    ],
)
async def test_image_that_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    path = tmp_path / "disk.qcow2"
    told = ",".join(options).format(tmp_path)
    qemu_img("create", "-u", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", told, path, "1M")
    inner = MemorySource(path.read_bytes())
    with pytest.raises(SourceError, match=f"^backing disk.qcow2 {message}"):
        await Qcow2Source.open(inner, "disk.qcow2")
    assert not inner.closed, "the caller has it still"
