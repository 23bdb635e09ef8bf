"""The harness keeps its own promises: servers serve and end, the guest boots, a noisy log fails its test."""

from __future__ import annotations

import argparse
import os
import runpy
import socket
import subprocess
from pathlib import Path

import pytest

from tests.harness import guest
from tests.harness.images import first_difference, qemu_check, qemu_create, qemu_io, qemu_same, random_image
from tests.harness.process import Died, wait_for
from tests.harness.require import require
from tests.harness.servers import WAN, Server, nbdkit, nginx, qemu_nbd, qsd, wan
from tests.harness.tls import certificate

pytest_plugins = ["pytester"]


def curl(url: str, *options: str | Path) -> bytes:
    return subprocess.run([require("curl"), "-sS", *options, url], check=True, capture_output=True).stdout


def nbd_size(server: Server, query: str = "") -> int:
    argv = [require("nbdinfo"), "--size", server.url + query]
    return int(subprocess.run(argv, check=True, capture_output=True).stdout)


def test_nginx_notes_ranges_and_bytes_sent(tmp_path: Path) -> None:
    image = random_image(tmp_path / "disk", 300_000)
    with nginx(tmp_path) as server:
        assert curl(server.url + "/disk", "-r", "100-199") == image.read_bytes()[100:200]
        wait_for(lambda: len(server.requests()) == 1, "line in the log")
        assert server.ranges() == ["bytes=100-199"]
        server.restart()
        curl(server.url + "/disk", "-o", tmp_path / "copy")
        wait_for(lambda: server.body_bytes() == 300_100, "line in the log")
        server.forget()
        assert server.requests() == []
    assert first_difference(image, tmp_path / "copy") is None


@pytest.mark.parametrize("http2", [False, True])
def test_nginx_speaks_tls(tmp_path: Path, http2: bool) -> None:
    credentials = certificate(tmp_path)
    with nginx(tmp_path, https=credentials, http2=http2) as server:
        spoken = curl(
            server.url + "/ca-cert.pem", "--cacert", credentials.ca, "-o", os.devnull, "-w", "%{http_version}"
        )
    assert spoken == (b"2" if http2 else b"1.1")


@pytest.mark.parametrize("tcp", [False, True])
def test_nbd_servers_come_back_after_a_kill(tmp_path: Path, tcp: bool) -> None:
    image = random_image(tmp_path / "disk", 1 << 20)
    for serving in (nbdkit("file", image, tcp=tcp), qemu_nbd(image, tcp=tcp, export="x"), qsd(image, tcp=tcp)):
        with serving as server:
            server.kill()
            server.restart()
            assert nbd_size(server) == 1 << 20
        assert server.returncode is not None


def test_nbd_servers_speak_tls(tmp_path: Path) -> None:
    credentials = certificate(tmp_path)
    image = random_image(tmp_path / "disk", 1 << 20)
    for serving in (nbdkit("file", image, tcp=True, tls=credentials), qemu_nbd(image, tcp=True, tls=credentials)):
        with serving as server:
            assert nbd_size(server, f"?tls-certificates={tmp_path}") == 1 << 20


def test_a_server_ends_with_a_failing_test(tmp_path: Path) -> None:
    with pytest.raises(KeyError), nbdkit("memory", "1M") as server:
        raise KeyError
    assert server.returncode is not None
    assert not server.folder.exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(Died, match="No such file"), nbdkit("file", tmp_path / "missing"):
        pass


def test_qemu_helpers_tell_good_from_bad(tmp_path: Path) -> None:
    image = random_image(tmp_path / "disk", 1 << 20)
    overlay = qemu_create(tmp_path / "disk.qed", image, cluster_size="4k")
    assert qemu_same(overlay, image)
    qemu_io(overlay, "write -P 7 4k 4k", "read -P 7 4k 4k")
    assert not qemu_same(overlay, image)
    assert qemu_check(overlay) == (0, 0)
    with pytest.raises(RuntimeError, match="Pattern verification failed"):
        qemu_io(overlay, "read -P 8 4k 4k")


def test_the_link_carries_both_ways(tmp_path: Path) -> None:
    with nbdkit("memory", "1M", tcp=True) as server, wan(server, rtt_ms=40) as far:
        assert isinstance(far.address, tuple)
        with socket.create_connection(far.address) as client:
            greeting = client.recv(18, socket.MSG_WAITALL)
            # Flags, then NBD_OPT_ABORT (2), which is acknowledged.
            client.sendall(bytes(4) + b"IHAVEOPT" + bytes((0, 0, 0, 2)) + bytes(4))
            assert len(client.recv(20, socket.MSG_WAITALL)) == 20
    assert greeting.startswith(b"NBDMAGIC")


def test_the_link_holds_bytes_back_for_half_a_round_trip() -> None:
    program = runpy.run_path(str(WAN))
    settings = argparse.Namespace(to="", listen=0, rtt_ms=40, rate_mbit=8, up_mbit=None, window_mib=1, handshake=False)
    link = program["Link"](settings)
    with link.listener, link.epoll, socket.socket() as one:
        end = program["End"](one, 1 << 20)
        link.up.accept(end, memoryview(b"request"), 7.0)
        assert list(link.up.arrivals(7.0199)) == []
        assert list(link.up.arrivals(7.0201)) == [end]
        # Towards the client, a megabyte a second: 32 KiB leave at once, the next after 33 ms.
        link.down.accept(end, memoryview(bytes(64 << 10)), 8.0)
        link.down.send(8.0)
        assert list(link.down.arrivals(8.0199)) == []
        arrived = len(end.arrived)
        assert list(link.down.arrivals(8.06)) == [end]
        assert len(end.arrived) - arrived == 1


@pytest.mark.slow  # the guest of tests/mount/test_guest.py does the same over a mount
def test_guest_checks_its_disk_and_writes_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    random_image(folder / "data", 1 << 20)
    disk = guest.guest_disk(tmp_path / "disk", 32 << 20, folder)
    console = guest.boot(f"file={disk},format=raw")
    assert guest.VERIFIED in console
    assert guest.read_back(disk) == guest.WRITTEN


def test_guest_notices_a_wrong_byte(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    data = random_image(folder / "data", 1 << 20).read_bytes()
    disk = guest.guest_disk(tmp_path / "disk", 32 << 20, folder)
    content = bytearray(disk.read_bytes())
    content[content.index(data[:4096]) + 1] ^= 1
    disk.write_bytes(content)
    with pytest.raises(RuntimeError, match=f"{guest.FAILED}: checksums"):
        guest.boot(f"file={disk},format=raw")


def test_a_noisy_log_fails_the_test_that_did_not_announce_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile(
        """
        import logging, pytest

        def test_noisy():
            logging.getLogger("x").warning("disk %d is odd", 3)

        def test_quiet():
            logging.getLogger("x").info("all is well")

        @pytest.mark.expect_log("disk . is odd")
        def test_marked():
            logging.getLogger("x").warning("disk 3 is odd")

        def test_announced(expect_log):
            expect_log("is odd$")
            logging.getLogger("x").warning("disk 3 is odd")

        def test_other_announced(expect_log):
            expect_log("is even")
            logging.getLogger("x").warning("disk 3 is odd")

        def test_caplog(caplog):
            logging.getLogger("x").warning("disk 3 is odd")

        @pytest.mark.slow
        def test_slow():
            assert False
        """
    )
    result = pytester.runpytest_subprocess("-o", "markers=slow")
    result.assert_outcomes(passed=6, errors=2, deselected=1)
    result.stdout.fnmatch_lines(["*ERROR*test_noisy*", "*ERROR*test_other_announced*"])
