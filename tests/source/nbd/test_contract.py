"""The port `Source`, kept by the NBD source over every server we know: the fake one, nbdkit, QEMU's two."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trio

from qedfs.errors import SourceUnreachable
from qedfs.source.nbd.client import NbdSource
from tests.fakes.nbd_behaviours import WELL_BEHAVED
from tests.fakes.nbd_server import FakeNbd
from tests.harness.servers import Server, nbdkit, qemu_nbd, qsd
from tests.source.nbd.support import MiB, opened, read, serving, sparse_content

# A multiple of a sector, not of a page: QEMU rounds other sizes up.
CONTENT = sparse_content(5 * MiB + 3 * 512)

Start = Callable[[Path], AbstractContextManager[Server]]
REAL: dict[str, Start] = {
    "nbdkit-file-unix": lambda file: nbdkit("file", file),
    "nbdkit-file-tcp": lambda file: nbdkit("file", file, tcp=True),
    "nbdkit-noextents": lambda file: nbdkit("file", file, filters=["noextents"]),
    "nbdkit-no-structured-replies": lambda file: nbdkit("--no-sr", "file", file),
    "nbdkit-blocks-of-512": lambda file: nbdkit(
        "file",
        file,
        *("blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"),
        filters=["blocksize-policy"],
    ),
    "nbdkit-one-connection": lambda file: nbdkit("file", file, filters=["multi-conn"]),
    "qemu-nbd-unix": lambda file: qemu_nbd(file),
    "qemu-nbd-tcp": lambda file: qemu_nbd(file, tcp=True, export="disk"),
    "qemu-nbd-alone": lambda file: qemu_nbd(file, shared=1),
    "qsd": lambda file: qsd(file),
}
WITHOUT_EXTENTS = {"nbdkit-noextents", "nbdkit-no-structured-replies"}
FAKES = {name: each for name, each in WELL_BEHAVED.items() if not each.silent}
NO_CONTEXT = {"simple-replies", "extents-unsupported", "no-context"}


@pytest.fixture(params=[*REAL, *(f"fake-{name}" for name in FAKES)])
async def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def source(kind: str, tmp_path: Path) -> AsyncIterator[NbdSource]:
    if kind.startswith("fake-"):
        fake = FakeNbd(CONTENT, FAKES[kind.removeprefix("fake-")])
        async with serving(fake) as url, opened(url) as source:
            yield source
        return
    file = tmp_path / "disk"
    with file.open("wb") as out:
        out.write(CONTENT[:MiB])
        out.seek(3 * MiB)
        out.write(CONTENT[3 * MiB :])
    with REAL[kind](file) as server:
        async with opened(server.url) as source:
            yield source


async def test_identity_names_the_size(source: NbdSource) -> None:
    assert source.identity.size == len(CONTENT)
    assert source.identity.name.startswith("nbd")
    assert source.parallel >= 32


async def test_reads_return_the_bytes_asked_for(source: NbdSource) -> None:
    size = len(CONTENT)
    ranges = [(0, 1), (0, 4096), (size - 1, 1), (size - 777, 777), (511, 2), (MiB - 5, 10), (4095, 65538)]
    ranges += [(0, 3 * MiB + 1), (3 * MiB - 3, MiB)]
    for pos, count in ranges:
        assert await read(source, pos, count) == CONTENT[pos : pos + count], (pos, count)
        assert await read(source, pos, count, urgent=True) == CONTENT[pos : pos + count], (pos, count)


async def test_many_reads_at_once_do_not_mix(source: NbdSource) -> None:
    rng = random.Random(2)

    async def one(pos: int, size: int, urgent: bool) -> None:
        assert await read(source, pos, size, urgent=urgent) == CONTENT[pos : pos + size]

    async with trio.open_nursery() as nursery:
        for number in range(64):
            pos = rng.randrange(len(CONTENT) - 1)
            size = rng.randrange(1, min(len(CONTENT) - pos, 200_000) + 1)
            nursery.start_soon(one, pos, size, number % 4 == 0)


async def test_any_contiguous_view_is_filled(source: NbdSource) -> None:
    words = memoryview(bytearray(4096)).cast("Q")
    await source.read(512, words)
    assert words.tobytes() == CONTENT[512 : 512 + 4096]
    await source.read(0, memoryview(bytearray(0)))


async def test_a_range_outside_is_the_callers_mistake(source: NbdSource) -> None:
    for pos, size in [(-1, 2), (len(CONTENT), 1), (len(CONTENT) - 1, 2)]:
        with pytest.raises(ValueError, match="is not inside"):
            await source.read(pos, memoryview(bytearray(size)))
        with pytest.raises(ValueError, match="is not inside"):
            await source.extents(pos, size)


async def test_extents_tell_the_holes_and_nothing_wrong(source: NbdSource, kind: str) -> None:
    if kind in WITHOUT_EXTENTS or kind.removeprefix("fake-") in NO_CONTEXT:
        described = await source.extents(0, len(CONTENT))
        # nbdkit without extents still answers: "data, all of it".
        assert described is None or not any(extent.zero for extent in described)
        return
    for start, size in [(0, len(CONTENT)), (MiB + 1, 2 * MiB), (3 * MiB - 700, 1001), (len(CONTENT) - 9, 9)]:
        end, at, zeros = start + size, start, 0
        while at < end:
            extents = await source.extents(at, end - at)
            assert extents
            for extent in extents:
                assert extent.pos == at
                assert extent.size > 0
                at += extent.size
                if extent.zero:
                    assert not any(CONTENT[extent.pos : at])
                    zeros += extent.size
        assert at == end
        hole = max(0, min(end, 3 * MiB) - max(start, MiB))
        assert zeros == hole, "the hole ends at page boundaries, so all servers find it exactly"
    assert await source.extents(5, 0) == []


async def test_a_cancelled_read_leaves_buffer_and_source_alone(source: NbdSource) -> None:
    for _ in range(5):
        buffer = bytearray(4 * MiB)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.read, 0, memoryview(buffer))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        before = bytes(buffer)
        assert await read(source, 100, 100) == CONTENT[100:200]
        assert await read(source, 100, 100, urgent=True) == CONTENT[100:200]
        assert buffer == before


async def test_nothing_is_read_after_the_end(source: NbdSource) -> None:
    await source.aclose()
    with pytest.raises(SourceUnreachable, match="closed"):
        await read(source, 0, 1)
    with pytest.raises(SourceUnreachable, match="closed"):
        await source.extents(0, 1)
    await source.aclose()
