"""One overlay, streamed to its end by QEMU and by qedfs, each time with a log of every write to its file.

Owns the two ways to run and record a stream. Must not know what is done with the logs.

QEMU's storage daemon runs `block-stream` with its own filter `blklogwrites` between QED and the file. On our side the
image and its stream job run as in a mount, over a recording file and a source in memory.
"""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import trio.testing

from qedfs.control.qmp.client import Client
from qedfs.format.header import HEADER_BYTES, decode_header
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.fakes.storage import RecordingStorage
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_create, random_image
from tests.harness.process import Child, Died, listening
from tests.harness.require import require
from tests.model import SectorModel
from tests.overlay.scenario import BACKING_NAME, History, Scenario, repeatable
from tests.overlay.writelog import read_log
from tests.served import served

CLUSTER_SIZE = 65536


class Workload(NamedTuple):
    """What both stream: an empty overlay as QEMU makes it, and its backing, which has no cluster of zeros."""

    overlay: bytes
    backing: bytes


def workload(size: int, seed: int = 0) -> Workload:
    """An image of `size` bytes in clusters of 64 KiB."""
    with _folder() as folder:
        backing = random_image(folder / BACKING_NAME, size, seed=seed)
        overlay = qemu_create(folder / "disk.qed", BACKING_NAME, cluster_size=str(CLUSTER_SIZE))
        return Workload(overlay.read_bytes(), backing.read_bytes())


def qemu_version() -> tuple[int, ...]:
    """The version of QEMU's storage daemon: (7, 2, 22)."""
    text = subprocess.run([require("qemu-storage-daemon"), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", text.stdout)
    assert found is not None, text.stdout
    return tuple(map(int, found.groups()))


def by_qemu(work: Workload) -> History:
    """The stream of QEMU; the last entry of the log is the barrier before it says that the job is complete."""
    with _folder() as folder:
        (folder / BACKING_NAME).write_bytes(work.backing)
        (folder / "disk.qed").write_bytes(work.overlay)
        (folder / "log").touch()
        _block_stream(folder)
        storage = RecordingStorage(work.overlay)
        storage.log.extend(read_log((folder / "log").read_bytes()))
        storage.bytes = bytearray((folder / "disk.qed").read_bytes())
    history = _history(work, storage)
    history.detached_at = len(storage.log)
    return history


def by_qedfs(work: Workload, seed: int = 0) -> History:
    """The stream of qedfs; the seed decides where its worker threads and its event loop take turns."""
    history = _history(work, RecordingStorage(work.overlay, seed=seed))
    with repeatable(seed):
        trio.run(_stream, history, clock=trio.testing.MockClock(autojump_threshold=0))
    return history


async def _stream(history: History) -> None:
    storage = history.storage
    async with served(FakeSource(history.scenario.backing), storage=storage) as image:
        await StreamJob(image).run()
        history.detached_at = len(storage.log)


def _history(work: Workload, storage: RecordingStorage) -> History:
    geometry = decode_header(work.overlay[:HEADER_BYTES], len(work.overlay)).geometry
    scenario = Scenario(
        *(0, geometry, work.backing), dirty=False, detach=True, journal=False, full_disk=0, full_disk_wrote=0
    )
    return History(scenario, storage, SectorModel(scenario.base))


def _block_stream(folder: Path) -> None:
    """Let QEMU stream `disk.qed` and log its writes to `log`."""
    monitor = folder / "qmp"
    nodes = (
        f"driver=file,node-name=base,filename={folder / BACKING_NAME},read-only=on",
        f"driver=file,node-name=file,filename={folder / 'disk.qed'}",
        f"driver=file,node-name=log,filename={folder / 'log'}",
        "driver=blklogwrites,node-name=logged,file=file,log=log",
        "driver=qed,node-name=disk,file=logged,backing=base",
    )
    argv = [require("qemu-storage-daemon"), "--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off"]
    argv += ["--monitor", "chardev=qmp", *(word for node in nodes for word in ("--blockdev", node))]
    daemon = Child(argv, folder / "output")
    try:
        daemon.wait_until(lambda: listening(monitor), "a monitor")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(monitor))
            _run_job(Client(connection))
    finally:
        daemon.stop()


def _run_job(client: Client) -> None:
    client.execute("qmp_capabilities")
    client.execute("block-stream", device="disk", job_id="stream")
    while (event := client.event(HANG_SECONDS)) is not None:
        if event["event"] == "BLOCK_JOB_COMPLETED":
            if "error" in event["data"]:
                raise Died(f"block-stream: {event['data']['error']}")
            return
    raise Died(f"block-stream has told nothing for {HANG_SECONDS} s")


@contextmanager
def _folder() -> Iterator[Path]:
    # Short: a Unix socket's path is at most 107 bytes long. In memory: what is measured is order, not speed.
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="qedfs-") as name:
        yield Path(name)
