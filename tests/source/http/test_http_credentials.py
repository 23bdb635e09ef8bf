"""Header fields and client certificates reach the place that they are for, and what is missing is said."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from qedfs.errors import SourceError
from qedfs.source.credentials import NO_CREDENTIALS, Credentials, Entry, TlsFiles, read_credentials
from qedfs.source.http.errors import said
from qedfs.source.open import remote_source
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource
from qedfs.source.tls_alerts import explain_alert
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.process import Child, free_port, listening
from tests.harness.require import require
from tests.harness.servers import Nginx, nginx
from tests.harness.tls import Certificate, certificate
from tests.source.http.conftest import CONTENT


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Of an authority that the server does not know."""
    return certificate(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(CONTENT)
    return tmp_path


@asynccontextmanager
async def remote(url: str, credentials: Credentials = NO_CREDENTIALS) -> AsyncIterator[RetryingSource]:
    async with trio.open_nursery() as nursery:
        source = remote_source(parse_location(url), Policy(), nursery, credentials=credentials, deadline_seconds=1)
        try:
            yield source
        finally:
            await source.aclose()


async def read(url: str, credentials: Credentials = NO_CREDENTIALS) -> None:
    async with remote(url, credentials) as source:
        for pos in (0, 1000):
            buffer = bytearray(9)
            await source.read(pos, memoryview(buffer), urgent=pos > 0)
            assert buffer == CONTENT[pos : pos + 9]


async def failure(url: str, credentials: Credentials = NO_CREDENTIALS) -> str:
    async with remote(url, credentials) as source:
        with pytest.raises(SourceError) as caught:
            await source.connect()
    return str(caught.value)


def shown(url: str, made: Certificate) -> Credentials:
    """The client's certificate, for places below the URL."""
    files = TlsFiles(ca=str(made.ca), certificate=str(made.client_cert), key=str(made.client_key))
    return Credentials((Entry(parse_location(url), tls=files),))


@contextmanager
def demanding(folder: Path, made: Certificate) -> Iterator[Nginx]:
    """An nginx that serves nobody without a certificate of ours."""
    with nginx(folder, https=made, server=f"ssl_client_certificate {made.ca}; ssl_verify_client on;") as server:
        yield server


async def test_header_fields_from_a_file(server: FakeHttpServer, other_server: FakeHttpServer, tmp_path: Path) -> None:
    """They go to the origin alone, though the file has some for the place of the redirect too: it was not named."""
    file = tmp_path / "credentials"
    file.touch(0o600)
    file.write_text(
        f'["{server.url("/")}"]\nheaders = {{ Authorization = "Bearer canary", PRIVATE-TOKEN = "canary" }}\n'
        f'["{other_server.url("/")}"]\nheaders = {{ X-Other = "canary" }}\n'
    )
    credentials = read_credentials(str(file))
    await read(server.url("/a/disk.raw"), credentials)
    for request in server.requests:
        assert (request.headers["authorization"], request.headers["private-token"]) == ("Bearer canary", "canary")
    server.behaviour, server.redirect_to = "redirect-302", other_server.url("/there")
    await read(server.url(), credentials)
    assert "canary" not in str(other_server.requests)
    await read(other_server.url(), credentials)
    assert other_server.requests[-1].headers["x-other"] == "canary"


async def test_a_client_certificate(folder: Path, credentials: Certificate, stranger: Certificate) -> None:
    with demanding(folder, credentials) as server:
        url = f"{server.url}/disk"
        await read(url, shown(server.url, credentials))
        assert "it may want a client certificate" in await failure(
            url, Credentials(_trust_only(server.url, credentials))
        )
        wrong = TlsFiles(str(credentials.ca), str(stranger.client_cert), str(stranger.client_key))
        entry = Entry(parse_location(server.url), tls=wrong)
        assert "may not accept our client certificate" in await failure(url, Credentials((entry,)))


def _trust_only(url: str, made: Certificate) -> tuple[Entry, ...]:
    return (Entry(parse_location(url), tls=TlsFiles(ca=str(made.ca))),)


async def test_the_certificate_stays_with_the_origin(
    folder: Path, credentials: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a redirect leads no certificate is shown, and the origin gets it again when it is asked anew."""
    monkeypatch.setenv("SSL_CERT_FILE", str(credentials.ca))
    with demanding(folder, credentials) as inner, nginx(folder, https=credentials) as open_to_all:
        location = f"return 302 {open_to_all.url}/disk;"
        with nginx(folder, https=credentials, location=location, server=_demand(credentials)) as origin:
            await read(f"{origin.url}/disk", shown(origin.url, credentials))
        with nginx(folder, https=credentials, location=f"return 302 {inner.url}/disk;") as origin:
            assert "may want a client certificate" in await failure(
                f"{origin.url}/disk", shown(origin.url, credentials)
            )


def _demand(made: Certificate) -> str:
    return f"ssl_client_certificate {made.ca}; ssl_verify_client on;"


@contextmanager
def strict(folder: Path, made: Certificate, version: str) -> Iterator[str]:
    """A server that says by a TLS alert what it wants (nginx says it by status 400)."""
    port = free_port()
    argv: list[str | Path] = [
        *(require("openssl"), "s_server", "-accept", f"127.0.0.1:{port}", "-WWW", version, "-Verify", "2"),
        *("-verify_return_error", "-CAfile", made.ca, "-cert", made.cert, "-key", made.key),
    ]
    child = Child(["env", "-C", str(folder), *map(str, argv)], folder / "output")
    try:
        child.wait_until(lambda: listening(("127.0.0.1", port)), "a listening socket")
        yield f"https://127.0.0.1:{port}/disk"
    finally:
        child.stop()


@pytest.mark.parametrize(("version", "wants"), [("-tls1_2", "may want"), ("-tls1_3", "wants")])
async def test_the_alert_is_put_into_words(
    folder: Path, credentials: Certificate, stranger: Certificate, version: str, wants: str
) -> None:
    with strict(folder, credentials, version) as url:
        trusting = Credentials(_trust_only(url, credentials))
        assert f"{wants} a client certificate (see --credentials)" in await failure(url, trusting)
        wrong = TlsFiles(str(credentials.ca), str(stranger.client_cert), str(stranger.client_key))
        text = await failure(url, Credentials((Entry(parse_location(url), tls=wrong),)))
        assert "the server does not accept our client certificate" in text


async def test_why_the_server_is_not_trusted(
    folder: Path, credentials: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nginx(folder, https=credentials) as server:
        text = await failure(f"{server.url}/disk")
        assert "unable to get local issuer certificate (an authority of your own: SSL_CERT_FILE" in text
        for name in ("CURL_CA_BUNDLE", "SSL_CERT_FILE"):
            monkeypatch.setenv(name, str(credentials.ca))
            await read(f"{server.url}/disk")
            monkeypatch.delenv(name)


@pytest.fixture
def locked(folder: Path, credentials: Certificate) -> Path:
    """The client's key, with a passphrase, which must not be asked for at the terminal."""
    path = folder / "locked.pem"
    argv = [require("openssl"), "ec", "-in", str(credentials.client_key), "-aes256", "-passout", "pass:x"]
    subprocess.run([*argv, "-out", str(path)], check=True, capture_output=True)
    return path


async def test_files_that_cannot_be_used(folder: Path, credentials: Certificate, locked: Path) -> None:
    url = "https://127.0.0.1:1/disk"
    for files, says in [
        (TlsFiles(ca=str(folder / "none")), f"{folder}/none: No such file or directory"),
        (TlsFiles(certificate=str(folder / "none")), f"{folder}/none: No such file or directory"),
    ]:
        assert says in await failure(url, Credentials((Entry(parse_location(url), tls=files),)))
    with nginx(folder, https=credentials) as server:
        for key in (str(locked), str(folder / "disk")):
            files = TlsFiles(str(credentials.ca), str(credentials.client_cert), key)
            text = await failure(f"{server.url}/disk", Credentials((Entry(parse_location(server.url), tls=files),)))
            assert "the client certificate or its key cannot be used" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("OpenSSL SSL_read: error:0A00045C:SSL routines::tlsv13 alert certificate required, errno 0", "wants a client"),
        ("TLS connect error: error:0A000415:SSL routines::sslv3 alert certificate expired", "expired"),
        ("SSL: no alternative certificate subject name matches target host name 'https://u:canary@h'", "not contain"),
        ("SSL certificate OpenSSL verify result: certificate has expired (10)", "certificate has expired"),
        ("Could not resolve host: canary", None),
        ("alert that nobody knows: canary", None),
    ],
)
def test_of_what_libcurl_says_only_known_words_are_used(text: str, words: str | None) -> None:
    found = said(text)
    assert (found is None) is (words is None)
    assert found is None or ((words or "") in found.words and "canary" not in found.words)
    assert explain_alert("TLSV1_ALERT_UNKNOWN_CA") is not None
