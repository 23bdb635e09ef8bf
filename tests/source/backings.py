"""Backings for the contract test of sources: one content behind every kind of server, and what can become of it there.

Owns how a kind is served and opened. Must not know what a source promises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path

import trio

from qedfs.errors import SourceChanged, SourceUnreachable
from qedfs.source.base import Source
from qedfs.source.http import HttpSource
from qedfs.source.local import LocalSource
from qedfs.source.nbd import NbdSource
from qedfs.source.policy import Policy
from qedfs.source.qcow2 import Qcow2Source
from qedfs.source.qed import QedSource
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.fakes.nbd_server import Behaviour, FakeNbd
from tests.fakes.source import FakeSource
from tests.harness.servers import Server, nginx
from tests.harness.tls import Certificate
from tests.source.nbd.support import serving
from tests.source.qcow2.support import convert
from tests.source.qed.support import qed_of

MiB = 1 << 20
LONG_AGO = 1_600_000_000  # so that no second write falls into the same tick of the clock


def _nothing() -> None:
    """A backing without a server has none that could go away."""


@dataclasses.dataclass
class Backing:
    """One content that is served now."""

    place: str  # what the identity's name says of it
    open: Callable[[trio.Nursery], Awaitable[Source]]
    replace: Callable[[bytes], None]  # put another version in the place of the content
    vanish: Callable[[], None] = _nothing  # the server goes away


@dataclasses.dataclass
class Surroundings:
    """What serving may need of the test: an empty folder, and the certificate that the test trusts."""

    folder: Path
    certificate: Certificate


Serve = Callable[[bytes, Surroundings], AbstractAsyncContextManager[Backing]]


@contextlib.asynccontextmanager
async def in_memory(content: bytes, _: Surroundings) -> AsyncIterator[Backing]:
    """The fake that the tests of everything above a source stand on."""
    source = FakeSource(content, round_trip=0.001)
    source.holes = [(MiB, 2 * MiB)]

    async def opens(_: trio.Nursery) -> Source:
        source.is_closed = False
        return source

    def replace(other: bytes) -> None:
        nonlocal source
        source.fail = SourceChanged("another version")
        source = FakeSource(other, etag='"v2"')

    def vanish() -> None:
        source.fail = SourceUnreachable("away")

    yield Backing("http://fake/", opens, replace, vanish)


@contextlib.asynccontextmanager
async def local_file(content: bytes, around: Surroundings) -> AsyncIterator[Backing]:
    path = around.folder / "disk"
    write_sparse(path, content)

    async def opens(_: trio.Nursery) -> Source:
        return await LocalSource.open(parse_location(str(path)), Policy((str(around.folder),)))

    def replace(other: bytes) -> None:
        # Into the same file, which is open: a new one of that name would not be the source's any more.
        with path.open("r+b") as file:
            file.write(other)
            file.truncate()

    yield Backing(str(path), opens, replace)


def fake_http(*, tls: bool = False) -> Serve:
    @contextlib.asynccontextmanager
    async def serve(content: bytes, around: Surroundings) -> AsyncIterator[Backing]:
        context = server_context(around.certificate) if tls else None
        with FakeHttpServer(content, tls=context) as fake:

            def replace(other: bytes) -> None:
                fake.content, fake.etag = other, '"version-2"'

            yield Backing(fake.url(), _http(fake.url()), replace, fake.close)

    return serve


def real_nginx(*, tls: bool = False) -> Serve:
    @contextlib.asynccontextmanager
    async def serve(content: bytes, around: Surroundings) -> AsyncIterator[Backing]:
        path = around.folder / "disk.raw"
        path.write_bytes(content)

        def replace(other: bytes) -> None:
            beside = path.with_suffix(".new")
            beside.write_bytes(other)
            os.utime(beside, (LONG_AGO, LONG_AGO))  # older than the file that it replaces
            beside.replace(path)

        with nginx(around.folder, https=around.certificate if tls else None) as running:
            url = f"{running.url}/disk.raw"
            yield Backing(url, _http(url), replace, running.kill)

    return serve


def fake_nbd(behaviour: Behaviour) -> Serve:
    @contextlib.asynccontextmanager
    async def serve(content: bytes, _: Surroundings) -> AsyncIterator[Backing]:
        fake = FakeNbd(content, behaviour)
        any_number = dataclasses.replace(behaviour, first_connections_only=sys.maxsize)  # after the first source

        def replace(other: bytes) -> None:
            fake.content = other
            fake.behaviour = any_number
            fake.hang_up()

        async def opens(nursery: trio.Nursery) -> Source:
            if fake.connections:
                fake.behaviour = any_number
            return await _nbd(url)(nursery)

        def vanish() -> None:
            fake.behaviour = dataclasses.replace(any_number, greeting=b"", hangs_up=True)
            fake.hang_up()

        async with serving(fake) as url:
            yield Backing(url, opens, replace, vanish)

    return serve


def real_nbd(start: Callable[[Path], AbstractContextManager[Server]]) -> Serve:
    @contextlib.asynccontextmanager
    async def serve(content: bytes, around: Surroundings) -> AsyncIterator[Backing]:
        path = around.folder / "disk"
        write_sparse(path, content)
        with start(path) as running:

            def replace(other: bytes) -> None:
                # QEMU learns the size of an export when it starts.
                running.kill()
                write_sparse(path, other)
                running.restart()

            yield Backing(running.url, _nbd(running.url), replace, running.kill)

    return serve


def qcow2_over(inner: Serve, *, compress: bool = False) -> Serve:
    """The content as the disk of a qcow2 image, which `inner` serves."""

    @contextlib.asynccontextmanager
    async def serve(content: bytes, around: Surroundings) -> AsyncIterator[Backing]:
        async with inner(_image_of(content, compress), around) as file:

            async def opens(nursery: trio.Nursery) -> Source:
                return await Qcow2Source.open(await file.open(nursery), file.place)

            yield Backing(file.place, opens, lambda disk: file.replace(_image_of(disk, compress)), file.vanish)

    return serve


def qed_over(inner: Serve) -> Serve:
    """The content as the disk of a QED image, which `inner` serves."""

    @contextlib.asynccontextmanager
    async def serve(content: bytes, around: Surroundings) -> AsyncIterator[Backing]:
        async with inner(qed_of(content), around) as file:

            async def opens(nursery: trio.Nursery) -> Source:
                return await QedSource.open(await file.open(nursery), file.place)

            yield Backing(file.place, opens, lambda disk: file.replace(qed_of(disk)), file.vanish)

    return serve


@functools.cache
def _image_of(disk: bytes, compress: bool) -> bytes:
    """The bytes of a qcow2 image; making one takes longer than most tests of it."""
    with tempfile.TemporaryDirectory(prefix="qedfs-") as folder:
        raw = Path(folder) / "raw"
        raw.write_bytes(disk)
        return convert(raw, raw.with_name("image"), compress=compress)


def write_sparse(path: Path, content: bytes) -> None:
    """Write a file whose holes are the MiBs of zeros."""
    with path.open("wb") as file:
        for pos in range(0, len(content), MiB):
            if any(content[pos : pos + MiB]):
                file.seek(pos)
                file.write(content[pos : pos + MiB])
        file.truncate(len(content))
    os.utime(path, (LONG_AGO, LONG_AGO))


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """What a fake server shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    return context


def _http(url: str) -> Callable[[trio.Nursery], Awaitable[Source]]:
    async def opens(nursery: trio.Nursery) -> Source:
        return await HttpSource.open(parse_location(url), Policy(), nursery)

    return opens


def _nbd(url: str) -> Callable[[trio.Nursery], Awaitable[Source]]:
    async def opens(nursery: trio.Nursery) -> Source:
        return await NbdSource.open(parse_location(url), Policy(("/",)), nursery)

    return opens
