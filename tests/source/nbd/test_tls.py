"""nbds over real servers: the certificate and the name are verified, and there is no way around TLS."""

from __future__ import annotations

import getpass
import ssl
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trio

from qedfs.errors import Refused, SourceError, SourceUnreachable, UsageError
from qedfs.source.credentials import NO_TLS_FILES, TlsFiles
from qedfs.source.nbd.client import NbdSource
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location
from tests.harness.require import require
from tests.harness.servers import Server, nbdkit, qemu_nbd
from tests.harness.tls import Certificate, certificate
from tests.source.nbd.support import ANY_SOCKET, MiB, opened, read, sparse_content

CONTENT = sparse_content(4 * MiB)

Start = Callable[[Path, Certificate, bool], AbstractContextManager[Server]]
SERVERS: dict[str, Start] = {
    "nbdkit": lambda file, tls, tcp: nbdkit("file", file, tls=tls, tcp=tcp),
    "qemu-nbd": lambda file, tls, tcp: qemu_nbd(file, tls=tls, tcp=tcp),
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CA of the machine that runs the tests."""
    for name in ("CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


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


async def _error(url: str, files: TlsFiles = NO_TLS_FILES) -> SourceError:
    async with trio.open_nursery() as nursery:
        with pytest.raises(SourceError) as caught:
            await NbdSource.open(parse_location(url), ANY_SOCKET, nursery, tls=files)
    return caught.value


async def _reads(url: str, files: TlsFiles = NO_TLS_FILES) -> None:
    async with trio.open_nursery() as nursery:
        source = await NbdSource.open(parse_location(url), ANY_SOCKET, nursery, tls=files)
        assert await read(source, 1000, 5000) == CONTENT[1000:6000]
        await source.aclose()


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
    assert "(an authority of your own: SSL_CERT_FILE, or `ca` in --credentials)" in str(error)
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


# Client certificates.


DEMANDING: dict[str, Start] = {
    "nbdkit": lambda file, tls, tcp: nbdkit("file", file, tls=tls, tcp=tcp, verify_peer=True),
    "qemu-nbd": lambda file, tls, tcp: qemu_nbd(file, tls=tls, tcp=tcp, verify_peer=True),
}


@pytest.mark.parametrize("kind", DEMANDING)
@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
async def test_a_client_certificate(
    tls: Certificate, file: Path, kind: str, tcp: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stranger = certificate(tmp_path_factory.mktemp("stranger"))
    with DEMANDING[kind](file, tls, tcp) as server:
        await _reads(server.url, TlsFiles(str(tls.ca), str(tls.client_cert), str(tls.client_key)))
        # As libnbd has it, with the names that QEMU looks for.
        separator = "&" if "?" in server.url else "?"
        await _reads(f"{server.url}{separator}tls-certificates={tls.folder}")
        for files in (
            TlsFiles(str(tls.ca)),
            TlsFiles(str(tls.ca), str(stranger.client_cert), str(stranger.client_key)),
        ):
            text = str(await _error(server.url, files))
            assert "it may want a client certificate or a pre-shared key that it knows (see --credentials)" in text


@pytest.mark.parametrize("name", ["CURL_CA_BUNDLE", "SSL_CERT_FILE"])
async def test_the_same_variables_as_for_https(
    tls: Certificate, file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nbdkit("file", file, tls=tls, tcp=True) as server:
        monkeypatch.setenv(name, str(tls.ca))
        await _reads(server.url)
        monkeypatch.setenv(name, str(file) + ".none")
        assert f"{file}.none: No such file or directory" in str(await _error(server.url))
        monkeypatch.setenv(name, str(file))
        assert f"the CA certificates in {file} cannot be used" in str(await _error(server.url))


async def test_a_key_that_cannot_be_used(tls: Certificate, file: Path) -> None:
    for key in (tls.ca, file):
        files = TlsFiles(str(tls.ca), str(tls.client_cert), str(key))
        error = await _error("nbds://127.0.0.1:1/", files)
        assert f"the client certificate in {tls.client_cert} or its key cannot be used" in str(error)


# Pre-shared keys.


@pytest.fixture
def psk(tmp_path: Path) -> Path:
    """A file as GnuTLS' psktool writes it, where QEMU looks for it."""
    folder = tmp_path / "psk"
    folder.mkdir()
    path = folder / "keys.psk"
    for user in ("somebody", "alice", getpass.getuser()):
        subprocess.run([require("psktool"), "-u", user, "-p", str(path)], check=True, capture_output=True)
    return path


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
async def test_a_pre_shared_key(file: Path, psk: Path, kind: str) -> None:
    """From Python 3.13 on; before, the message says so."""
    running = nbdkit("file", file, psk=psk, tcp=True) if kind == "nbdkit" else qemu_nbd(file, psk=psk, tcp=True)
    with running as server:
        named = f"{server.url}?tls-psk-file={psk}"
        if not hasattr(ssl.SSLContext, "set_psk_client_callback"):
            assert "pre-shared keys need Python 3.13 or newer" in str(await _error(named))
            return
        await _reads(named)
        await _reads(named.replace("nbds://", "nbds://alice@"))
        await _reads(server.url, TlsFiles(psk_file=str(psk), user="somebody"))
        other = psk.with_name("other.psk")
        other.write_text("alice:00112233445566778899aabbccddeeff\n")
        error = str(await _error(server.url, TlsFiles(psk_file=str(other), user="alice")))
        assert "a pre-shared key that it knows" in error


async def test_keys_that_cannot_be_used(psk: Path) -> None:
    for files, says in [
        (TlsFiles(psk_file=str(psk), user="bob"), f"{psk} has no key of the user bob"),
        (TlsFiles(psk_file=str(psk) + ".none"), "No such file or directory"),
    ]:
        assert says in str(await _error("nbds://127.0.0.1:1/", files))
    await trio.Path(psk).write_text("alice:canary\n")
    error = await _error("nbds://127.0.0.1:1/", TlsFiles(psk_file=str(psk), user="alice"))
    assert f"the key of alice in {psk} is not in hex" in str(error)
    assert "canary" not in repr(error)


def test_a_key_that_an_overlay_names_is_a_local_file() -> None:
    for name in ("tls-psk-file", "tls-certificates"):
        location = parse_location(f"nbds://alice@host/disk?{name}=/etc/keys/x")
        assert "alice" not in str(location) + repr(location)
        with pytest.raises(Refused, match="names the local file /etc/keys/x; --allow-backing /etc/keys/x"):
            Policy().check_location(location)
        with pytest.raises(Refused, match="outside every"):
            Policy(("/etc/keys",)).check_location(location)
        Policy(("/etc/keys", "nbds://host/disk")).check_location(location)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("tls-verify-peer=0", "tls-verify-peer= is not supported"),
        ("tls-psk-file=keys", "give tls-psk-file= as an absolute path"),
        ("tls-psk-file=", "give tls-psk-file= as an absolute path"),
        ("tls-psk-file=/a&tls-certificates=/b", "not both"),
    ],
)
def test_what_is_said_of_tls_is_never_passed_over(query: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_location(f"nbds://host/disk?{query}")
    assert parse_location("nbds://host/disk?unknown=1").export == "disk"


def test_without_tls_a_key_makes_no_sense() -> None:
    with pytest.raises(UsageError, match="is for nbds://, which uses TLS"):
        parse_location("nbd://host/disk?tls-psk-file=/a")
