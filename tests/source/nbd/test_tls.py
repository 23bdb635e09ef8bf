"""nbds over real servers: the certificate and the name are verified, and there is no way around TLS."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trio

from qedfs.errors import SourceError, SourceUnreachable
from qedfs.source.nbd.client import NbdSource
from qedfs.source.url import parse_location
from tests.harness.servers import Server, nbdkit, qemu_nbd
from tests.harness.tls import Certificate, certificate
from tests.source.nbd.support import ANY_SOCKET, MiB, opened, read, sparse_content

CONTENT = sparse_content(4 * MiB)

Start = Callable[[Path, Certificate, bool], AbstractContextManager[Server]]
SERVERS: dict[str, Start] = {
    "nbdkit": lambda file, tls, tcp: nbdkit("file", file, tls=tls, tcp=tcp),
    "qemu-nbd": lambda file, tls, tcp: qemu_nbd(file, tls=tls, tcp=tcp),
}


@pytest.fixture(params=SERVERS)
def start(request: pytest.FixtureRequest) -> Start:
    return SERVERS[request.param]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


async def _error(url: str) -> SourceError:
    async with trio.open_nursery() as nursery:
        with pytest.raises(SourceError) as caught:
            await NbdSource.open(parse_location(url), ANY_SOCKET, nursery)
    return caught.value


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
async def test_reads_under_tls(
    start: Start, tls: Certificate, file: Path, tcp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.ca))
    with start(file, tls, tcp) as server:
        async with opened(server.url) as source:

            async def one(pos: int, size: int) -> None:
                assert await read(source, pos, size, urgent=size < 10) == CONTENT[pos : pos + size]

            async with trio.open_nursery() as nursery:
                for number in range(24):
                    nursery.start_soon(one, number * 100_001, 7 if number % 3 else 1_000_000)
            extents = await source.extents(0, len(CONTENT))
            assert extents is not None
            assert sum(extent.size for extent in extents) > 0
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read, source, 0, len(CONTENT))
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            await one(17, 100_000)


async def test_an_unknown_authority_is_not_trusted(start: Start, tls: Certificate, file: Path) -> None:
    with start(file, tls, True) as server:
        error = await _error(server.url)
    assert "certificate is not trusted" in str(error)
    assert not isinstance(error, SourceUnreachable)


async def test_another_name_is_not_trusted(
    start: Start, tls: Certificate, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.ca))
    with start(file, tls, False) as server:
        error = await _error(f"nbds+unix://other.example/?socket={server.address}")
    assert "certificate is not trusted" in str(error)
    assert "other.example" in str(error)


async def test_plain_nbd_to_a_server_that_requires_tls_says_how(start: Start, tls: Certificate, file: Path) -> None:
    with start(file, tls, True) as server:
        error = await _error(server.url.replace("nbds://", "nbd://"))
    assert "requires TLS; name it with nbds:// instead of nbd://" in str(error)
    assert not isinstance(error, SourceUnreachable)


async def test_nbds_to_a_server_without_tls_is_refused(file: Path) -> None:
    for server_of in (nbdkit("file", file, tcp=True), qemu_nbd(file, tcp=True)):
        with server_of as server:
            error = await _error(server.url.replace("nbd://", "nbds://"))
        assert "does not offer TLS" in str(error)
