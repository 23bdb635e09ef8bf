"""The port `Source` of qedfs/source/base.py, kept by every source over every server that we know.

A new kind of source, or another server for one, is a line in KINDS and a function in backings.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfs.errors import SourceChanged, SourceUnreachable
from qedfs.source.base import Sameness, Source
from tests.fakes.nbd_behaviours import WELL_BEHAVED
from tests.harness.hang import HANG_SECONDS
from tests.harness.servers import nbdkit, qemu_nbd, qsd
from tests.harness.tls import Certificate
from tests.source.backings import (
    Backing,
    MiB,
    Serve,
    Surroundings,
    fake_http,
    fake_nbd,
    in_memory,
    local_file,
    qcow2_over,
    qed_over,
    real_nbd,
    real_nginx,
)

SECTOR = 512


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of source over one kind of server, and what that server cannot do."""

    serve: Serve
    holes: bool = True  # it tells them
    versions: bool = True  # it tells two files of the same size apart, whatever was read of them
    server: bool = True  # there is one that may go away
    whole_sectors: bool = False  # it has no other sizes


def http(serve: Serve) -> Kind:
    return Kind(serve, holes=False)


def nbd(serve: Serve, *, holes: bool = True) -> Kind:
    return Kind(serve, holes=holes, versions=False, whole_sectors=True)


def qcow2(inner: Serve, *, versions: bool = True, server: bool = True, compress: bool = False) -> Kind:
    return Kind(qcow2_over(inner, compress=compress), versions=versions, server=server, whole_sectors=True)


def qed(inner: Serve, *, versions: bool = True, server: bool = True) -> Kind:
    return Kind(qed_over(inner), versions=versions, server=server, whole_sectors=True)


BLOCKS_OF_512 = ("blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=64K")

KINDS: dict[str, Kind] = {
    "memory": Kind(in_memory),
    "local": Kind(local_file, server=False),
    "http-fake": http(fake_http()),
    "http-fake-tls": http(fake_http(tls=True)),
    "http-nginx": http(real_nginx()),
    "http-nginx-tls": http(real_nginx(tls=True)),
    "nbdkit-unix": nbd(real_nbd(lambda file: nbdkit("file", file))),
    "nbdkit-tcp": nbd(real_nbd(lambda file: nbdkit("file", file, tcp=True))),
    # It still answers, but "data, all of it".
    "nbdkit-noextents": nbd(real_nbd(lambda file: nbdkit("file", file, filters=["noextents"])), holes=False),
    "nbdkit-no-structured-replies": nbd(real_nbd(lambda file: nbdkit("--no-sr", "file", file)), holes=False),
    "nbdkit-blocks-of-512": nbd(
        real_nbd(
            lambda file: nbdkit(
                "file", file, *BLOCKS_OF_512, "blocksize-error-policy=error", filters=["blocksize-policy"]
            )
        )
    ),
    "nbdkit-one-connection": nbd(real_nbd(lambda file: nbdkit("file", file, filters=["multi-conn"]))),
    "qemu-nbd-unix": nbd(real_nbd(lambda file: qemu_nbd(file))),
    "qemu-nbd-tcp": nbd(real_nbd(lambda file: qemu_nbd(file, tcp=True, export="disk"))),
    "qemu-nbd-alone": nbd(real_nbd(lambda file: qemu_nbd(file, shared=1))),
    "qsd": nbd(real_nbd(lambda file: qsd(file))),
    **{
        f"nbd-fake-{name}": nbd(
            fake_nbd(each), holes=name not in {"simple-replies", "extents-unsupported", "no-context"}
        )
        for name, each in WELL_BEHAVED.items()
        if not each.silent
    },
    "qcow2-memory": qcow2(in_memory),
    "qcow2-memory-compressed": qcow2(in_memory, compress=True),
    "qcow2-local": qcow2(local_file, server=False),
    "qcow2-http-fake": qcow2(fake_http()),
    "qcow2-http-nginx": qcow2(real_nginx()),
    "qcow2-nbdkit": qcow2(real_nbd(lambda file: nbdkit("file", file)), versions=False),
    "qcow2-qemu-nbd": qcow2(real_nbd(lambda file: qemu_nbd(file)), versions=False),
    "qcow2-qsd": qcow2(real_nbd(lambda file: qsd(file)), versions=False),
    "qcow2-nbd-fake": qcow2(fake_nbd(WELL_BEHAVED["correct"]), versions=False),
    "qed-memory": qed(in_memory),
    "qed-local": qed(local_file, server=False),
    "qed-http-fake": qed(fake_http()),
    "qed-http-nginx": qed(real_nginx()),
    "qed-nbdkit": qed(real_nbd(lambda file: nbdkit("file", file)), versions=False),
    "qed-qemu-nbd": qed(real_nbd(lambda file: qemu_nbd(file)), versions=False),
    "qed-nbd-fake": qed(fake_nbd(WELL_BEHAVED["correct"]), versions=False),
}
# Each of them differs in one layer only from kinds that run by default: the transport, or the source below qcow2.
WITH_SLOW = {"nbdkit-tcp", "http-fake-tls", "qcow2-http-fake", "qcow2-qemu-nbd", "qcow2-qsd", "qcow2-nbd-fake"}
WITH_SLOW |= {"qed-http-fake", "qed-qemu-nbd", "qed-nbd-fake"}
HOLE = range(MiB, 3 * MiB)


def params(may: Callable[[Kind], bool] = lambda _: True) -> list[Any]:
    """The names of these kinds."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=[slow] * (name in WITH_SLOW)) for name, kind in KINDS.items() if may(kind)]


@functools.cache
def make_content(size: int) -> bytes:
    """Random hex digits, which deflate makes smaller, and a hole that every server can describe."""
    content = bytearray(random.Random(1).randbytes(size // 2 + 1).hex().encode()[:size])
    content[HOLE.start : HOLE.stop] = bytes(len(HOLE))
    return bytes(content)


def another_version(content: bytes) -> bytes:
    """Other bytes of the same size, with the same holes."""
    return content.translate(bytes(-byte % 256 for byte in range(256)))


@pytest.fixture(params=params())
async def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def only(may: Callable[[Kind], bool]) -> pytest.MarkDecorator:
    """Run a test for these kinds."""
    return pytest.mark.parametrize("kind", params(may), indirect=True)


@pytest.fixture
async def content(kind: Kind) -> bytes:
    # QEMU rounds sizes that are no whole sectors.
    return make_content(5 * MiB + 3 * SECTOR + (0 if kind.whole_sectors else 3))


@pytest.fixture
async def around(tmp_path: Path, credentials: Certificate, monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    monkeypatch.setenv("SSL_CERT_FILE", str(credentials.ca))
    folder = tmp_path / "served"
    folder.mkdir()
    return Surroundings(folder, credentials)


@pytest.fixture
async def backing(kind: Kind, content: bytes, around: Surroundings) -> AsyncIterator[Backing]:
    async with kind.serve(content, around) as backing:
        yield backing


@pytest.fixture
async def source(backing: Backing) -> AsyncIterator[Source]:
    async with opened(backing) as source:
        yield source


@asynccontextmanager
async def opened(backing: Backing) -> AsyncIterator[Source]:
    """Open a source. That its nursery ends after `aclose` is part of what every test asserts."""
    async with trio.open_nursery() as nursery:
        try:
            source = await backing.open(nursery)
        except BaseException:
            nursery.cancel_scope.cancel()
            raise
        try:
            yield source
        finally:
            await source.aclose()


@asynccontextmanager
async def reopened(backing: Backing) -> AsyncIterator[Source]:
    """Open a source of a server that was restarted: that is repeated as long as it may help, as reads are."""
    async with trio.open_nursery() as nursery:
        with trio.fail_after(HANG_SECONDS):
            while True:
                try:
                    source = await backing.open(nursery)
                    break
                except SourceUnreachable:
                    await trio.sleep(0.01)
                except BaseException:
                    nursery.cancel_scope.cancel()
                    raise
        try:
            yield source
        finally:
            await source.aclose()


async def read(source: Source, pos: int, size: int, *, urgent: bool = False) -> bytes:
    # Not zeros: what is meant to be zero has to be written.
    buffer = bytearray(b"\xa5" * size)
    await source.read(pos, memoryview(buffer), urgent=urgent)
    return bytes(buffer)


# What it is.


async def test_the_identity_names_the_size_and_the_place_and_stays(
    backing: Backing, source: Source, content: bytes
) -> None:
    first = source.identity
    assert first.size == len(content)
    assert first.name == backing.place
    await read(source, 0, 1000)
    assert first.compare(source.identity).sameness in {Sameness.SAME, Sameness.PRESUMED}
    await source.aclose()  # some servers take one client
    async with opened(backing) as again:
        assert first.compare(again.identity).sameness in {Sameness.SAME, Sameness.PRESUMED}


@only(lambda kind: kind.versions)
async def test_the_same_file_is_surely_the_same(backing: Backing, source: Source) -> None:
    await source.aclose()
    async with opened(backing) as again:
        assert source.identity.compare(again.identity).sameness is Sameness.SAME


# Reading.


async def test_reads_return_the_bytes_asked_for(source: Source, content: bytes) -> None:
    size, before = len(content), source.received
    ranges = [(0, 0), (0, 1), (0, 4096), (size - 1, 1), (size - 777, 777), (size, 0), (511, 2), (MiB - 5, 10)]
    ranges += [(4095, 65538), (0, 3 * MiB + 1), (3 * MiB - 3, MiB), (0, size)]
    for pos, count in ranges:
        for urgent in (False, True):
            assert await read(source, pos, count, urgent=urgent) == content[pos : pos + count], (pos, count)
    assert source.received > before


async def test_any_contiguous_view_is_filled(source: Source, content: bytes) -> None:
    words = memoryview(bytearray(4096)).cast("Q")
    await source.read(512, words)
    assert words.tobytes() == content[512 : 512 + 4096]


async def test_a_range_outside_is_the_callers_mistake(source: Source, content: bytes) -> None:
    for pos, size in [(-1, 2), (-3, 1), (len(content), 1), (len(content) - 1, 2), (len(content) + 1, 0)]:
        buffer = bytearray(size)
        with pytest.raises(ValueError, match="is not inside"):
            await source.read(pos, memoryview(buffer))
        with pytest.raises(ValueError, match="is not inside"):
            await source.extents(pos, size)
        assert not any(buffer)


async def test_many_reads_at_once_do_not_mix(source: Source, content: bytes) -> None:
    rng = random.Random(2)

    async def one(pos: int, size: int, urgent: bool) -> None:
        assert await read(source, pos, size, urgent=urgent) == content[pos : pos + size]

    async with trio.open_nursery() as nursery:
        for number in range(64):
            pos = rng.randrange(len(content) - 1)
            size = rng.randrange(1, min(len(content) - pos, 200_000) + 1)
            nursery.start_soon(one, pos, size, number % 4 == 0)


async def test_a_cancelled_read_leaves_buffer_and_source_alone(source: Source, content: bytes) -> None:
    for _ in range(5):
        buffer = bytearray(4 * MiB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.read, 0, memoryview(buffer))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        before = bytes(buffer)
        for urgent in (False, True):
            assert await read(source, 100, 100, urgent=urgent) == content[100:200]
        assert buffer == before


async def test_cancelling_some_reads_spares_the_others(source: Source, content: bytes) -> None:
    for seconds in (0, 0.0005, 0.002):
        right: list[bool] = []

        async def check(pos: int, right: list[bool] = right) -> None:
            right.append(await read(source, pos, 100_000) == content[pos : pos + 100_000])

        async with trio.open_nursery() as kept, trio.open_nursery() as cancelled:
            for pos in range(8):
                kept.start_soon(check, pos)
                cancelled.start_soon(read, source, pos, 900_000)
            await trio.sleep(seconds)
            cancelled.cancel_scope.cancel()
        assert right == [True] * 8


# Holes.


async def test_extents_cover_the_range_in_order_and_call_no_data_a_hole(
    kind: Kind, source: Source, content: bytes
) -> None:
    size = len(content)
    for start, count in [(0, size), (MiB + 1, 2 * MiB), (3 * MiB - 700, 1001), (size - 9, 9), (MiB, 2 * MiB)]:
        end, at, zeros = start + count, start, 0
        while at < end and (extents := await source.extents(at, end - at)) is not None:
            assert extents
            for extent in extents:
                assert extent.pos == at
                assert extent.size > 0
                at += extent.size
                if extent.zero:
                    assert not any(content[extent.pos : at])
                    zeros += extent.size
        assert at == end or (at == start and not kind.holes)
        # The hole ends at page boundaries, so that all servers find it exactly.
        assert zeros == (len(range(max(start, HOLE.start), min(end, HOLE.stop))) if kind.holes else 0)
    assert not await source.extents(5, 0)


# What may happen to the server and its file.


async def error_of(source: Source, pos: int) -> Exception | None:
    """What a read ends with that is repeated as long as that may help."""
    with trio.fail_after(HANG_SECONDS):
        while True:
            try:
                await read(source, pos, 10)
            except SourceUnreachable:
                await trio.sleep(0.01)
            except Exception as exc:
                return exc
            else:
                return None


async def test_a_file_replaced_by_one_of_the_same_size(
    kind: Kind, backing: Backing, source: Source, content: bytes
) -> None:
    """Where the server tells no version, what was read before is compared."""
    assert await read(source, 0, 100_000) == content[:100_000]
    backing.replace(another_version(content))
    for _ in range(2):
        assert isinstance(await error_of(source, 10), SourceChanged)
    await source.aclose()
    async with reopened(backing) as again:
        expected = Sameness.CHANGED if kind.versions else Sameness.PRESUMED
        assert source.identity.compare(again.identity).sameness is expected
        assert await read(again, 0, 1000) == another_version(content)[:1000]


async def test_a_file_replaced_by_a_shorter_one(backing: Backing, source: Source, content: bytes) -> None:
    backing.replace(content[: 4 * MiB])
    assert isinstance(await error_of(source, 5 * MiB), SourceChanged)
    await source.aclose()
    async with reopened(backing) as again:
        assert again.identity.size == 4 * MiB
        assert source.identity.compare(again.identity).sameness is Sameness.CHANGED


@only(lambda kind: kind.server)
async def test_a_server_that_goes_away_may_come_back(backing: Backing, source: Source) -> None:
    """So the error is the one that says: try again."""
    backing.vanish()
    for urgent in (False, True):
        with pytest.raises(SourceUnreachable):
            await read(source, 4 * MiB, 1000, urgent=urgent)


async def test_an_empty_file(kind: Kind, around: Surroundings) -> None:
    async with kind.serve(b"", around) as backing, opened(backing) as source:
        assert source.identity.size == 0
        await source.read(0, memoryview(bytearray()))
        assert not await source.extents(0, 0)


# The end.


async def test_closing_ends_the_reads_in_flight(source: Source, content: bytes) -> None:
    ended = 0

    async def reader(urgent: bool) -> None:
        nonlocal ended
        with contextlib.suppress(SourceUnreachable):
            assert await read(source, 0, 4 * MiB, urgent=urgent) == content[: 4 * MiB]
        ended += 1

    async with trio.open_nursery() as nursery:
        for urgent in (False, True):
            nursery.start_soon(reader, urgent)
        await wait_all_tasks_blocked()
        await source.aclose()
    assert ended == 2


async def test_nothing_is_read_after_the_end(kind: Kind, source: Source) -> None:
    for _ in range(2):
        await source.aclose()
        with pytest.raises(SourceUnreachable, match="closed"):
            await read(source, 4 * MiB, 1)
        if kind.holes:
            with pytest.raises(SourceUnreachable, match="closed"):
                await source.extents(4 * MiB, 1)


async def test_no_task_and_no_descriptor_is_left(kind: Kind, content: bytes, around: Surroundings) -> None:
    before = open_descriptors()
    async with kind.serve(content, around) as backing, trio.open_nursery() as nursery:
        source = await backing.open(nursery)
        async with trio.open_nursery() as readers:
            for pos in range(8):
                readers.start_soon(read, source, pos, MiB)
            await wait_all_tasks_blocked()
            readers.cancel_scope.cancel()
        await read(source, 0, MiB, urgent=True)
        await source.extents(0, MiB)
        await source.aclose()
        await wait_all_tasks_blocked()
        assert not nursery.child_tasks
    # A look-up of a path that a cancelled reader began ends in its own thread, which closes what it found.
    with trio.move_on_after(HANG_SECONDS):
        while open_descriptors() != before:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert open_descriptors() == before
    assert source.identity.size == len(content), "it was not the garbage collector that closed them"


def open_descriptors() -> dict[str, str]:
    """What each open descriptor of this process leads to; without the one that lists them."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found
