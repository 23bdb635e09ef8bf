"""What `qedfs doctor URL` finds out of real servers, and that it asks for no more than it needs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from qedfs.cli.doctor import server_checks
from qedfs.cli.doctor.finding import Finding, Verdict
from qedfs.cli.doctor.server_checks import MOST_BYTES, MOST_SECONDS, PART_BYTES, Facts
from qedfs.source.base import Identity
from qedfs.source.nbd.protocol import Export, Negotiated
from qedfs.source.url import parse_location
from tests.fakes.source import FakeSource
from tests.harness.images import random_image
from tests.harness.mounts import qedfs
from tests.harness.process import free_port
from tests.harness.require import require
from tests.harness.servers import black_hole, nbdkit, nginx, qemu_nbd
from tests.harness.tls import Certificate, certificate

MIB = 1 << 20


def ask(url: str, *options: str, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Exit code, the checks of the server by name, and what is known of the source."""
    done = qedfs("doctor", url, "--json", *options, check=False, env=env)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    names = [one["check"] for one in found["checks"]]
    checks = found["checks"][names.index("server") :]
    assert found["ok"] is (done.returncode == 0)
    return done.returncode, {one["check"]: one for one in checks}, found["source"]


def trusting(credentials: Certificate) -> dict[str, str]:
    return {"SSL_CERT_FILE": str(credentials.ca), "CURL_CA_BUNDLE": ""}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return random_image(tmp_path / "disk.raw", 2 * MIB, seed=3)


def test_a_raw_disk_on_a_web_server(disk: Path) -> None:
    with nginx(disk.parent) as server:
        code, checks, source = ask(f"{server.url}/disk.raw")
    assert code == 0
    assert {one["verdict"] for one in checks.values()} == {"ok"}
    assert checks["ranges"]["found"] == "the server sends the range that was asked for, without content encoding"
    assert checks["format"]["found"] == "raw, 2.00 MiB"
    assert (source["url"], source["redirected_to"]) == (f"{server.url}/disk.raw", None)
    assert (source["size"], source["disk_size"], source["format"]) == (2 * MIB, 2 * MIB, "raw")
    assert source["etag"].startswith('"')
    assert source["last_modified"].endswith(" GMT")
    assert source["round_trip_seconds"] > 0
    assert source["bytes_per_second"] > 0


def test_a_qcow2_image_behind_a_redirect(disk: Path) -> None:
    image = disk.with_suffix(".qcow2")
    words = [require("qemu-img"), "convert", "-c", "-O", "qcow2", str(disk), str(image)]
    subprocess.run(words, check=True, capture_output=True)
    with nginx(disk.parent, server="rewrite ^/latest$ /disk.qcow2 redirect;") as server:
        code, checks, source = ask(f"{server.url}/latest")
    assert code == 0
    assert checks["server"]["found"].endswith(f", redirects to {server.url}/disk.qcow2")
    assert source["redirected_to"] == f"{server.url}/disk.qcow2"
    assert (source["format"], source["compression"], source["disk_size"]) == ("qcow2", "zlib", 2 * MIB)
    assert source["size"] == image.stat().st_size


def test_a_server_that_tells_little_of_the_version(disk: Path) -> None:
    with nginx(disk.parent, location="etag off; add_header Last-Modified '';") as server:
        code, checks, source = ask(f"{server.url}/disk.raw")
    assert code == 0
    assert (checks["version"]["verdict"], source["etag"], source["last_modified"]) == ("warn", None, None)
    assert checks["version"]["way_out"] == "name the version (mount --identity NAME)"


@pytest.mark.parametrize(
    ("name", "location", "check", "text"),
    [
        ("none", "", "server", "has no such file (404)"),
        ("disk.raw", "max_ranges 0;", "server", "ignores range requests"),
        ("disk.xz", "", "format", "unpack it first (xz -d)"),
    ],
)
def test_a_server_or_a_file_of_no_use(disk: Path, name: str, location: str, check: str, text: str) -> None:
    disk.with_suffix(".xz").write_bytes(b"\xfd7zXZ\0" + bytes(MIB))
    with nginx(disk.parent, location=location) as server:
        code, checks, _ = ask(f"{server.url}/{name}")
    assert (code, checks[check]["verdict"]) == (4, "fail")
    assert text in checks[check]["found"]


def test_a_server_that_never_answers_costs_the_time_that_is_given() -> None:
    with black_hole() as url:
        code, checks, _ = ask(url, "--timeout", "0.2s")
    assert code == 7
    assert checks["server"]["found"] == "not all is known after 0.2 s"


@pytest.mark.parametrize("scheme", ["http", "nbd"])
def test_a_server_that_refuses_is_not_taken_for_a_slow_one(scheme: str) -> None:
    code, checks, _ = ask(f"{scheme}://127.0.0.1:{free_port()}/disk.raw", "--timeout", "1s")
    assert code == 4
    assert "connection refused" in checks["server"]["found"].lower()
    assert "--timeout" not in str(checks["server"])


def test_an_address_that_nothing_may_lead_to() -> None:
    code, checks, _ = ask("http://169.254.169.254/latest")
    assert (code, checks["server"]["verdict"]) == (9, "fail")


def test_no_secret_is_shown(disk: Path) -> None:
    proxy = {"http_proxy": "http://me:sesame2@127.0.0.1:1/", "no_proxy": "127.0.0.1"}
    with nginx(disk.parent) as server:
        url = server.url.replace("//", "//me:sesame1@") + "/disk.raw?signature=sesame3"
        shown = qedfs("doctor", url, env=proxy).stdout + qedfs("doctor", url, "--json", env=proxy).stdout
        through = {"http_proxy": proxy["http_proxy"], "no_proxy": ""}
        failed = qedfs("doctor", url, "--timeout", "1s", check=False, env=through)
    assert f"{server.url}/disk.raw?signature=..." in shown
    assert "sesame" not in shown + failed.stdout + failed.stderr


@pytest.mark.parametrize(
    "name", ["http://me:sesame@proxy:1/", "me:sesame@proxy:1", "my_name:sesame@proxy:1", "1:sesame@proxy:1"]
)
def test_the_password_of_a_proxy_is_not_shown(name: str) -> None:
    shown = server_checks.proxy(parse_location("http://host.example/x"), {"http_proxy": name})
    assert shown.removeprefix("http://").rstrip("/") == "proxy:1"


def test_the_certificate_of_a_web_server(disk: Path) -> None:
    credentials = certificate(disk.parent)
    with nginx(disk.parent, https=credentials) as server:
        code, checks, _ = ask(f"{server.url}/disk.raw")
        assert code == 4
        assert "unable to get local issuer certificate" in checks["server"]["found"]
        code, checks, _ = ask(f"{server.url}/disk.raw", env=trusting(credentials))
    assert code == 0
    assert checks["TLS"]["found"].startswith("the server's certificate is valid (")


def test_an_nbd_export() -> None:
    with nbdkit("memory", "4M", export="disk", filters=["blocksize-policy"], tcp=True) as server:
        code, checks, source = ask(server.url)
    assert code == 0
    assert checks["NBD export"]["found"].startswith("'disk', 4194304 bytes; flags: send-flush, send-fua")
    assert checks["NBD holes"]["verdict"] == "ok"
    assert checks["version"]["way_out"] == "name the version (qemu-nbd -D NAME, or mount --identity NAME)"
    assert "ranges" not in checks
    assert (source["size"], source["format"]) == (4 * MIB, "raw")


def test_an_nbd_server_with_tls(disk: Path) -> None:
    credentials = certificate(disk.parent)
    with qemu_nbd(disk, export="e", tcp=True, tls=credentials) as server:
        code, checks, _ = ask(server.url, env=trusting(credentials))
    assert code == 0
    assert checks["TLS"]["found"] == "the server's certificate is valid"
    assert checks["NBD block sizes"]["found"].startswith("minimum 1, preferred ")
    assert "read-only" in checks["NBD export"]["found"]


def test_a_local_file(disk: Path) -> None:
    code, checks, source = ask(str(disk))
    assert code == 0
    assert "TLS" not in checks
    assert (source["format"], source["size"]) == ("raw", 2 * MIB)


def nbd(**told: Any) -> dict[str, Finding]:
    announced = Negotiated(**{"size": MIB, "flags": Export(0), "structured": False, "context": None, **told})
    return {finding.check: finding for finding in server_checks.nbd("e", announced)}


def test_an_nbd_server_that_cannot_tell_holes() -> None:
    assert nbd()["NBD holes"].verdict is Verdict.WARN
    assert "no structured replies" in nbd()["NBD holes"].found
    assert "no block status" in nbd(structured=True)["NBD holes"].found
    assert nbd(structured=True, context=1)["NBD holes"].verdict is Verdict.OK
    assert nbd(block_sizes=(1, 4096, 2**32 - 1))["NBD block sizes"].found == "minimum 1, preferred 4096, maximum none"
    assert nbd(flags=Export(1 | 2 | 1 << 14))["NBD export"].found.endswith("flags: read-only")


@pytest.mark.parametrize(
    ("identity", "verdict", "text"),
    [
        (Identity(1, '"v1"', digest="sha-256:00"), Verdict.OK, "always noticed"),
        (Identity(1, '"v1"'), Verdict.OK, "if the server changes the tag"),
        (Identity(1, None, "Sun, 06 Nov 1994 08:49:37 GMT"), Verdict.OK, "if the date differs"),
        (Identity(1, 'W/"v1"'), Verdict.WARN, 'only the weak tag W/"v1"'),
        (Identity(1), Verdict.WARN, "the size alone"),
    ],
)
def test_how_another_version_would_be_noticed(identity: Identity, verdict: Verdict, text: str) -> None:
    found = server_checks.version("http", identity)
    assert found.verdict is verdict
    assert text in found.found


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://host/", "none: whoever is between"),
        ("nbds://host/", "the server's certificate is valid"),
        ("nbds://host/?tls-psk-file=/keys", "the server has the pre-shared key"),
    ],
)
def test_how_the_connection_is_secured(url: str, text: str) -> None:
    assert server_checks.tls(parse_location(url)).startswith(text)


async def test_no_more_is_downloaded_than_said(autojump_clock: MockClock) -> None:
    source, facts = FakeSource(bytes(MOST_BYTES + 8 * PART_BYTES), round_trip=0.05), Facts("http://fake/")
    found: list[Finding] = []
    await server_checks.measure(source, facts, found.append)
    large = [size for _, size, _ in source.reads if size == PART_BYTES]
    assert sum(large) == MOST_BYTES
    assert source.received < MOST_BYTES + 100_000
    assert source.most_in_flight == server_checks.TRANSFERS
    assert facts.round_trip_seconds == pytest.approx(0.05)
    assert facts.bytes_per_second == pytest.approx(server_checks.TRANSFERS * PART_BYTES / 0.05)
    assert [one.check for one in found] == ["reads", "round trip", "rate"]


async def test_a_slow_server_is_not_asked_for_long(autojump_clock: MockClock) -> None:
    source, facts, began = FakeSource(bytes(MOST_BYTES), round_trip=2.0), Facts("http://fake/"), trio.current_time()
    await server_checks.measure(source, facts, lambda _: None)
    assert trio.current_time() - began == pytest.approx(6 * 2.0 + MOST_SECONDS)
    assert source.received < 5 * MIB
    assert facts.bytes_per_second == pytest.approx(4 * PART_BYTES / MOST_SECONDS)


@pytest.mark.parametrize("size", [0, 1, 511, 513])
async def test_small_files_are_read_too(size: int, autojump_clock: MockClock) -> None:
    source, facts = FakeSource(os.urandom(size)), Facts("http://fake/")
    await server_checks.measure(source, facts, lambda _: None)
    assert all(pos + length <= size for pos, length, _ in source.reads)
    assert (facts.round_trip_seconds is None) is (size == 0)
    assert facts.bytes_per_second is None
