"""Metrics of a real mount: what a scrape gets, that it agrees with `status`, and what bad clients get."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from qedfs.control.monitoring.metrics import STATES
from qedfs.control.monitoring.metrics_address import Address
from qedfs.control.monitoring.metrics_host import is_ours
from qedfs.control.monitoring.metrics_server import MAX_CLIENTS, serve_metrics
from qedfs.fetch.latency import BOUNDS
from qedfs.image.condition import Cause
from tests.control.support import FakeMount
from tests.fakes.http_server import FakeHttpServer
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import free_port, wait_for
from tests.harness.require import require
from tests.mount.support import MIB, create, origin

SIZE = 8 * MIB
DASHBOARD = Path(__file__).parents[2] / "contrib" / "grafana-qedfs.json"

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


class Scraped:
    """A mount that serves its metrics at a TCP port."""

    def __init__(self, mount: Mount, address: tuple[str, int], url: str) -> None:
        self.mount = mount
        self.address = address
        self.url = url  # of the source

    def scrape(self) -> str:
        answer = _exchange(self.address, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
        assert f"Content-Length: {len(body)}".encode() in head
        return body.decode()

    def samples(self) -> Samples:
        return _samples(self.scrape())


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """Two overlays over one source and a broken one."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "overlays").mkdir()
    with origin(folder, SIZE) as source:
        create(folder / "overlays" / "one.qed", source.url)
        create(folder / "overlays" / "two.qed", source.url, "--cluster-size", "4K")
        (folder / "overlays" / "broken.qed").write_bytes(b"no overlay" * 100)
        with _mounted(folder / "overlays", folder / "mnt", source.url, "--no-stream") as found:
            yield found


@contextlib.contextmanager
def _mounted(source: Path, mountpoint: Path, url: str, *options: str) -> Iterator[Scraped]:
    port = free_port()
    with mounted(source, mountpoint, *options, "--metrics", str(port)) as mount:
        wait_for(lambda: f"metrics at 127.0.0.1:{port}" in mount.output(), "the metrics")
        yield Scraped(mount, ("127.0.0.1", port), url)


def test_a_mount_that_serves_imports_nothing_any_more(tmp_path: Path) -> None:
    """An upgrade of the package may replace the files at any moment, and must leave mounts alone."""
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        port = str(free_port())
        environment = {"PYTHONPROFILEIMPORTTIME": "1"}
        options = ("--no-stream", "--metrics", port)
        with mounted(overlay, tmp_path / "mnt", *options, env=environment, own_interpreter=True) as mount:
            wait_for(lambda: f"metrics at 127.0.0.1:{port}" in mount.output(), "the metrics")
            before = mount.output()
            assert "import time:" in before
            with mount.path("disk.raw").open("r+b") as image:
                image.write(b"written")
                os.fsync(image.fileno())
                image.seek(MIB)
                image.read(200_000)
            mount.status()
            Scraped(mount, ("127.0.0.1", int(port)), source.url).scrape()
            qedfs("stream", "start", mount.mountpoint)
            mount.wait()
            qedfs("umount", mount.mountpoint)
            mount.wait_exit()
            assert "import time:" not in mount.output().removeprefix(before)


def test_the_figures_agree_with_status(scraped: Scraped) -> None:
    with scraped.mount.path("one.raw").open("r+b") as image:
        image.write(b"written")
        os.fsync(image.fileno())
        image.seek(MIB)
        image.read(200_000)
    qedfs("stream", "step", scraped.mount.mountpoint, "one.raw")
    status, samples = scraped.mount.status(), scraped.samples()
    assert samples["qedfs_limit_total_bytes_per_second", ()] == status["limit_total"]
    assert samples["qedfs_background_fetched_bytes_total", ()] == status["fetched_in_background"]
    for image in status["images"]:
        name = (("image", image["name"]),)
        for state in STATES:
            expected = 1.0 if state == image["state"] else 0.0
            assert samples["qedfs_image_state", (*name, ("state", state))] == expected
        for wrong in Cause:
            expected = 1.0 if wrong in {trouble["cause"] for trouble in image["condition"]} else 0.0
            assert samples["qedfs_image_trouble", (("cause", wrong), *name)] == expected
        if image["state"] == "broken":
            assert ("qedfs_image_size_bytes", name) not in samples
            continue
        assert samples["qedfs_image_size_bytes", name] == image["total"] == SIZE
        for metric, key in (("populated_bytes", "populated"), ("disk_usage_bytes", "disk_usage")):
            assert samples[f"qedfs_image_{metric}", name] == image[key]
        for counter in ("read", "written", "missed"):
            assert samples[f"qedfs_image_{counter}_bytes_total", name] == image["counters"][counter]
        for cause, counter in (("reader", "kept_asked"), ("stream", "kept_stream")):
            sample = samples["qedfs_image_kept_bytes_total", (("cause", cause), *name)]
            assert sample == image["counters"][counter]
    one = (("image", "one.raw"),)
    assert samples["qedfs_image_written_bytes_total", one] == len(b"written")
    assert samples["qedfs_image_barriers_total", one] >= 1
    assert samples["qedfs_image_kept_bytes_total", (("cause", "reader"), *one)] >= 200_000


def test_two_queues_for_one_source_are_one_series(scraped: Scraped) -> None:
    for name in ("one.raw", "two.raw"):
        with scraped.mount.path(name).open("rb") as image:
            image.seek(4 * MIB)
            image.read(4096)
    status, samples = scraped.mount.status(), scraped.samples()
    source = (("source", scraped.url),)
    (entry,) = status["sources"]
    assert entry["backing"] == scraped.url
    assert samples["qedfs_source_fetched_bytes_total", source] == entry["fetched"] > 0
    assert samples["qedfs_source_window_bytes", source] == entry["window"]
    assert samples["qedfs_source_up", source] == 1
    assert 0 < samples["qedfs_source_round_trip_seconds", source] < 5
    assert samples["qedfs_source_requests_in_flight", source] == samples["qedfs_source_waiting_readers", source] == 0


def test_the_figures_agree_after_a_stream_with_retries(tmp_path: Path) -> None:
    with FakeHttpServer(random.Random(5).randbytes(SIZE)) as server:
        overlay = create(tmp_path / "disk.qed", server.url())
        server.queue += ["status-503", "wrong-start", "ok"]
        server.queue += ["reset", "status-429", "garbage", "short-body", "status-500"]
        with _mounted(overlay, tmp_path / "mnt", server.url()) as found:
            found.mount.wait()
            status, samples = found.mount.status(), found.samples()
    assert not server.queue
    source = ("source", server.url())
    (entry,) = status["sources"]
    expected = {"connect": 0, "timeout": 0, "cut": 2, "server": 3, "answer": 2, "other": 0}
    assert entry["retries_by_reason"] == expected
    assert entry["retries"] == sum(expected.values())
    for reason, count in expected.items():
        assert samples["qedfs_source_retries_total", (("reason", reason), source)] == count
    assert samples["qedfs_source_fetched_bytes_total", (source,)] == entry["fetched"] == SIZE
    assert samples["qedfs_source_window_bytes", (source,)] == entry["window"]
    assert samples["qedfs_source_up", (source,)] == (entry["error"] is None) == 1
    (image,) = status["images"]
    name = ("image", "disk.raw")
    assert samples["qedfs_image_state", (name, ("state", "complete"))] == 1
    assert samples["qedfs_image_populated_bytes", (name,)] == image["populated"] == SIZE
    kept = samples["qedfs_image_kept_bytes_total", (("cause", "stream"), name)]
    assert kept == image["counters"]["kept_stream"] == SIZE


def test_the_waits_are_a_histogram(scraped: Scraped) -> None:
    with scraped.mount.path("one.raw").open("rb") as image:
        image.seek(6 * MIB)
        image.read(1)
    samples = scraped.samples()
    bounds = [*map(str, BOUNDS), "+Inf"]
    counts = [samples["qedfs_source_wait_seconds_bucket", (("le", bound), ("source", scraped.url))] for bound in bounds]
    assert counts == sorted(counts)
    assert counts[-1] == samples["qedfs_source_wait_seconds_count", (("source", scraped.url),)] >= 1
    assert 0 < samples["qedfs_source_wait_seconds_sum", (("source", scraped.url),)] < 30 * counts[-1]


def test_curl_gets_them(scraped: Scraped) -> None:
    url = f"http://127.0.0.1:{scraped.address[1]}/metrics"
    done = subprocess.run(
        [require("curl"), "-sSf", url], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    assert f'qedfs_info{{mountpoint="{scraped.mount.mountpoint}"' in done.stdout


def test_every_metric_of_the_dashboard_exists(scraped: Scraped) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= 8
    named = {name for expression in expressions for name in re.findall(r"qedfs_\w+", expression)}
    variables = {name for entry in dashboard["templating"]["list"] for name in re.findall(r"qedfs_\w+", entry["query"])}
    samples = scraped.samples()
    assert named | variables <= {name for name, _ in samples}
    labels = {label for _, pairs in samples for label, _ in pairs} | {"instance", "job"}  # Prometheus adds these
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            used = {name for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in group.split(", ")}
            used |= set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            used |= set(re.findall(r"[{,](\w+)=", target["expr"]))
            assert used <= labels, target["expr"]


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", b"200"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"\xff\xfe\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 8166, b"431"),
    ],
)
def test_what_other_requests_get(scraped: Scraped, request_text: bytes, status: bytes) -> None:
    assert _exchange(scraped.address, request_text).split(b" ", 2)[1] == status


def test_clients_that_say_nothing_do_not_use_it_up(scraped: Scraped) -> None:
    silent = [socket.create_connection(scraped.address, timeout=HANG_SECONDS) for _ in range(MAX_CLIENTS)]
    try:
        silent[0].sendall(b"GET /metr")
        # One too many is hung up on; its request may have been on the way.
        with pytest.raises((AssertionError, OSError)):
            scraped.scrape()
    finally:
        for client in silent:
            client.close()
    wait_for(lambda: _works(scraped), "an answer after the silent ones have left")


def _told(mount: Mount) -> bool:
    return "metrics at" in mount.output()


def test_a_unix_socket_is_private_and_replaced_after_a_crash(tmp_path: Path) -> None:
    with origin(tmp_path, MIB) as source:
        overlay, path = create(tmp_path / "disk.qed", source.url), Path(f"/tmp/qedfs-test-{os.getpid()}.sock")
        try:
            for end in ("kill", "unmount"):
                with mounted(overlay, tmp_path / "mnt", "--metrics", f"unix:{path}") as mount:
                    wait_for(partial(_told, mount), "the metrics")
                    assert stat.S_IMODE(path.stat().st_mode) == 0o600
                    assert b"qedfs_image_populated_bytes" in _exchange(path, b"GET /metrics HTTP/1.1\r\n\r\n")
                    getattr(mount, end)()
                assert path.exists() == (end == "kill")
        finally:
            path.unlink(missing_ok=True)


async def test_a_unix_socket_that_another_mount_has_put_in_its_place_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_metrics, Address(path=path), FakeMount(tmp_path, nursery))
        path.unlink()
        await trio.sleep(0.02)  # the time of making counts in ticks of the kernel's clock
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
        nursery.cancel_scope.cancel()
    assert path.is_socket()


def test_an_address_in_use_is_told_and_nothing_stays_mounted(tmp_path: Path) -> None:
    with origin(tmp_path, MIB) as source, socket.create_server(("127.0.0.1", 0)) as other:
        create(tmp_path / "disk.qed", source.url)
        (tmp_path / "mnt").mkdir()
        where = f"127.0.0.1:{other.getsockname()[1]}"
        words = (tmp_path / "disk.qed", tmp_path / "mnt", "--daemon", "--metrics", where)
        done = qedfs("mount", *words, check=False)
        assert done.returncode == 8
        assert f"{where}: cannot listen there" in done.stderr
        assert not os.path.ismount(tmp_path / "mnt")


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['prometheus_client'] = None; from qedfs.cli.main import main; main()"
    words = [sys.executable, "-c", hide, "mount", "--metrics", "9188", str(tmp_path / "disk.qed"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 2
    assert "install it: apt install python3-prometheus-client, or pipx inject qedfs" in done.stderr


def _samples(text: str) -> Samples:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def _exchange(address: tuple[str, int] | Path, request: bytes) -> bytes:
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(address) if isinstance(address, Path) else address)
        client.sendall(request)
        answer = b""
        while more := client.recv(1 << 16):
            answer += more
        return answer


def _works(scraped: Scraped) -> bool:
    try:
        return bool(scraped.samples())
    except (AssertionError, OSError):
        return False


@pytest.mark.parametrize(
    ("field", "bound", "ours"),
    [
        *(
            (name, "127.0.0.1", True)
            for name in ("127.0.0.1", "127.0.0.1:9188", "localhost", "LocalHost.:1", "a.localhost")
        ),
        *((name, "127.0.0.1", True) for name in ("[::1]:9188", "127.9.9.9")),
        *(
            (name, "127.0.0.1", False)
            for name in ("evil.example", "evil.example:9188", "vm1", "10.0.0.1", "2130706433")
        ),
        *(
            (name, "127.0.0.1", False)
            for name in ("", ":9188", "localhost.evil.example", "127.0.0.1.evil.example", "a b:c")
        ),
        *((name, "::1", True) for name in ("[::1]", "[0:0:0:0:0:0:0:1]:80", "localhost")),
        *((name, "localhost", ours) for name, ours in (("localhost:1", True), ("vm1", False), ("127.0.0.1", True))),
        *((name, "10.0.0.1", True) for name in ("10.0.0.1:9188", "vm1", "VM1.lan:9188", "localhost", "127.0.0.1")),
        *((name, "10.0.0.1", False) for name in ("10.0.0.2", "evil.example", "vm12", "vm1evil.example")),
        *((name, "0.0.0.0", True) for name in ("10.0.0.2", "[fe80::1]", "vm1.lan")),
        *((name, "::", True) for name in ("10.0.0.2", "[2001:db8::1]:9188")),
        ("evil.example", "::", False),
        *(
            (name, "metrics.lan", ours)
            for name, ours in (("metrics.lan:1", True), ("vm1", True), ("evil.example", False))
        ),
    ],
)
def test_only_names_of_this_server_are_answered(field: str, bound: str, ours: bool) -> None:
    assert is_ours(field, bound, "vm1") is ours


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n", b"421 Misdirected Request"),
        (b"GET /metrics HTTP/1.1\r\nhOST:\t127.0.0.1:1 \r\n", b"200 OK"),
        (b"GET /metrics HTTP/1.1\r\n", b"200 OK"),  # no browser
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", b"400 Bad Request"),
        (b"GET /metrics HTTP/1.0\r\n", b"200 OK"),
    ],
)
def test_a_page_that_rebinds_its_name_reads_no_metrics(scraped: Scraped, lines: bytes, status: bytes) -> None:
    answer = _exchange(scraped.address, lines + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert (b"qedfs_" in answer) is (status == b"200 OK")
