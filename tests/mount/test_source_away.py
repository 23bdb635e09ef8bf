"""A source that goes away under a mount: readers that wait for it, what ends their waits, and the others meanwhile.

The deadline of the source is two seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qedfs.control.qmp.client import Client
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import random_image, sparse_image
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.servers import Server, nbdkit

from .support import CLUSTER_SIZE, MIB, create, read_direct
from .test_blast_radius import readers

SIZE = 16 * MIB
READ = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 65536)
try:
    os.preadv(fd, [buffer], int(sys.argv[2]))
    print(buffer[:].hex())
except OSError as exc:
    print(f"errno {exc.errno}")
"""


@contextmanager
def away(folder: Path, *options: str) -> Iterator[tuple[Mount, Server, bytes]]:
    """A mount whose source has answered once and was killed; the server, and the bytes of the image."""
    raw = random_image(folder / "disk", SIZE)
    with nbdkit("file", raw, tcp=True) as server:
        create(folder / "disk.qed", server.url)
        with mounted(folder / "disk.qed", folder / "mnt", "--no-stream", "--source-timeout", "2s", *options) as mount:
            read_direct(mount.path("disk.raw"), 0, 4096)
            server.kill()
            yield mount, server, raw.read_bytes()


@contextmanager
def reader(mount: Mount, pos: int) -> Iterator[subprocess.Popen[str]]:
    """A process that reads one cluster past the page cache; killed at the end."""
    words = [sys.executable, "-c", READ, str(mount.path("disk.raw")), str(pos)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=HANG_SECONDS)


def stalled(mount: Mount) -> int:
    count: int = mount.image("disk.raw")["stalled"]
    return count


def test_a_reader_waits_until_the_server_is_back(tmp_path: Path) -> None:
    with away(tmp_path, "--on-source-error", "wait") as (mount, server, data), reader(mount, 4 * MIB) as process:
        wait_for(lambda: stalled(mount) == 1, "a reader that waits")
        assert process.poll() is None
        image = mount.image("disk.raw")
        assert (image["on_source_error"], image["wait_bound_seconds"]) == ("wait", None)
        server.restart()
        out, _ = process.communicate(timeout=HANG_SECONDS)
        assert bytes.fromhex(out) == data[4 * MIB : 4 * MIB + CLUSTER_SIZE]
        assert stalled(mount) == 0


def test_an_outage_is_told_once_and_its_end_once(tmp_path: Path) -> None:
    with (
        away(tmp_path, "--on-source-error", "wait") as (mount, server, _),
        Client.connect(str(mount.mountpoint)) as client,
    ):
        with reader(mount, 4 * MIB) as process:
            wait_for(lambda: "source away" in (mount.image("disk.raw")["error"] or ""), "the trouble")
            image = mount.image("disk.raw")
            assert image["error"].startswith("source away since ")
            assert mount.status()["sources"][0]["away_since"] == image["condition"][0]["since"]
            server.restart()
            process.communicate(timeout=HANG_SECONDS)
        wait_for(lambda: mount.image("disk.raw")["error"] is None, "the end of the trouble")
        names = []
        while "X_QEDFS_SOURCE_BACK" not in names:
            event = client.event(HANG_SECONDS)
            assert event is not None
            names += [event["event"]] if event["event"].startswith("X_QEDFS") else []
        assert names == ["X_QEDFS_SOURCE_AWAY", "X_QEDFS_SOURCE_BACK"]


def test_the_rule_is_changed_while_readers_wait_and_outlives_a_kill(tmp_path: Path) -> None:
    with away(tmp_path) as (mount, server, data):
        place = mount.mountpoint
        done = qedfs("source", "on-error", place, "disk", "wait", "--json")
        assert json.loads(done.stdout)["images"][0]["on_source_error"] == "wait"
        with reader(mount, MIB) as process:
            wait_for(lambda: stalled(mount) == 1, "a reader that waits")
            qedfs("source", "on-error", place, "eio")
            out, _ = process.communicate(timeout=HANG_SECONDS)
            assert out == "errno 5\n"
        qedfs("source", "on-error", place, "wait:1h")
        mount.kill()
        with mounted(tmp_path / "disk.qed", place, "--no-stream", "--source-timeout", "2s") as again:
            image = again.image("disk.raw")
            assert (image["on_source_error"], image["wait_bound_seconds"]) == ("wait", 3600)
            with reader(again, MIB) as process:
                wait_for(lambda: stalled(again) == 1, "a reader that waits")
                server.restart()
                out, _ = process.communicate(timeout=HANG_SECONDS)
                assert bytes.fromhex(out) == data[MIB : MIB + CLUSTER_SIZE]


@pytest.mark.parametrize("how", ["killed reader", "killed writer", "SIGTERM", "quit", "lazy unmount"])
def test_what_ends_a_wait(tmp_path: Path, how: str) -> None:
    with away(tmp_path, "--on-source-error", "wait") as (mount, _, _):
        image = mount.path("disk.raw")
        words = ["dd", f"if={image}", "of=/dev/null", "bs=64k", "skip=9", "iflag=direct"]
        if how == "killed writer":
            words = ["dd", "if=/dev/zero", f"of={image}", "bs=512", "count=1", "seek=9999", "conv=notrunc"]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: stalled(mount) >= 1, "a request that waits")
            if how == "SIGTERM":
                os.kill(mount.pid, signal.SIGTERM)
            elif how == "quit":
                with Client.connect(str(mount.mountpoint)) as client:
                    client.execute("quit")
            elif how == "lazy unmount":
                subprocess.run(["umount", "-l", mount.mountpoint], check=True)
                process.kill()
            else:
                process.kill()
            process.wait(HANG_SECONDS)
            if how.startswith("killed"):
                wait_for(lambda: stalled(mount) == 0, "the end of the wait")
                assert mount.unmount() == 0
            else:
                assert mount.wait_exit() == 0
        finally:
            process.kill()
            process.wait(HANG_SECONDS)


def test_an_image_whose_readers_wait_costs_the_other_image_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    raw = sparse_image(tmp_path / "disk", 256 * MIB)  # nobody gets to read it
    good = random_image(tmp_path / "good", MIB)
    with nbdkit("file", raw, tcp=True) as server, nbdkit("file", good, tcp=True) as other:
        create(folder / "bad.qed", server.url)
        create(folder / "good.qed", other.url)
        options = ("--no-stream", "--source-timeout", "2s", "--on-source-error", "wait")
        with mounted(folder, tmp_path / "mnt", *options) as mount:
            server.kill()
            with readers(mount.path("bad.raw"), 1000):
                wait_for(lambda: mount.image("bad.raw")["stalled"] == 1000, "all readers to wait")
                assert read_direct(mount.path("good.raw"), 0, MIB) == good.read_bytes()
                assert mount.image("good.raw")["stalled"] == 0
                before = _processor_seconds(mount.pid)
                tries = _retries(mount, server.url)
                wait_for(lambda: _retries(mount, server.url) >= tries + 6, "six more tries of the source")
                # More tries than one attempt to connect makes, and 5 s lie between two of these: a thousand requests
                # that polled would take all of that time.
                assert _processor_seconds(mount.pid) - before < 2


def _retries(mount: Mount, url: str) -> int:
    count: int = next(one["retries"] for one in mount.status()["sources"] if one["backing"] == url)
    return count


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
