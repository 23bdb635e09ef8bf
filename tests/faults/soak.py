"""A long life of one mount: many images, readers and writers with an oracle, servers that restart, overlays that come
and go; and samples of what the process holds.

Knows the mount from outside only: files, `/proc` and the status.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from qedfs.overlay.create import create_overlay
from tests.harness.images import qemu_check, random_image
from tests.harness.mounts import Mount, mounted
from tests.harness.process import wait_for
from tests.harness.servers import Server, nbdkit, nginx
from tests.mount.support import read_direct

IMAGE_SIZE = 16 << 20
SAMPLE_SECONDS = 2.0
RESTART_SECONDS = 20.0
PAUSE_SECONDS = 0.02  # between two operations of one image: load, but not all of the machine
WRITE_PATIENCE_SECONDS = 120.0
RSS_GROWTH = 1.05
WOBBLE = 4  # descriptors, threads or tasks
_DUMP = "asked by SIGUSR1:"


class Sample(NamedTuple):
    """What the process held at one moment."""

    seconds: float
    fds: int
    threads: int
    tasks: int
    rss: int


class Trend(NamedTuple):
    """One quantity after the warm-up: its usual value in the first and last third, and the slope of the line."""

    name: str
    first: float
    last: float
    per_hour: float
    grows: bool

    def __str__(self) -> str:
        verdict = "GROWS" if self.grows else "flat"
        return f"{self.name:8} {self.first:12.0f} -> {self.last:12.0f}   {self.per_hour:+14.1f} an hour   {verdict}"


class Life(NamedTuple):
    """One mount from start to end."""

    samples: list[Sample]
    log_lines: int


class Totals:
    """What all images did, counted by their threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reads = self.writes = self.failed = self.completed = self.restarts = 0

    def add(self, name: str) -> None:
        """One more."""
        with self._lock:
            setattr(self, name, getattr(self, name) + 1)


class _Image:
    """One image: its overlay, what it has to hold, and the thread that uses it."""

    def __init__(self, overlay: Path, url: str, content: bytes, seed: int) -> None:
        self.overlay = overlay
        self.wrong: str | None = None
        self._url = url
        self._content = content
        self._random = random.Random(seed)
        self._expected = bytearray()
        self.renew()

    def renew(self) -> None:
        """Begin again with an empty overlay."""
        create_overlay(str(self.overlay), image_size=IMAGE_SIZE, backing=self._url)
        self._expected = bytearray(self._content)

    def use(self, mountpoint: Path, totals: Totals, stop: threading.Event) -> None:
        """Read and write until told to stop; a complete image is compared whole, removed, and begun again."""
        path = mountpoint / f"{self.overlay.stem}.raw"
        try:
            while not stop.is_set():
                wait_for(lambda: path.exists() or stop.is_set(), f"{path}", WRITE_PATIENCE_SECONDS)
                if not stop.is_set() and self._until_complete(path, totals, stop):
                    totals.add("completed")
                    self.overlay.unlink()
                    wait_for(lambda: not path.exists(), f"the end of {path}", WRITE_PATIENCE_SECONDS)
                    self.renew()
        except (AssertionError, OSError, TimeoutError) as exc:
            self.wrong = f"{path.name}: {exc!r}"

    def _until_complete(self, path: Path, totals: Totals, stop: threading.Event) -> bool:
        deadline = time.monotonic() + self._random.uniform(15, 45)
        with path.open("r+b", buffering=0) as image:
            while not stop.wait(PAUSE_SECONDS):
                self._read(image.fileno(), path, totals)
                if self._random.random() < 0.4:
                    self._write(image.fileno(), totals, stop)
                if time.monotonic() > deadline and self._is_complete():
                    for pos in range(0, IMAGE_SIZE, 1 << 20):
                        self._compare(pos, os.pread(image.fileno(), 1 << 20, pos))
                    return True
        return False

    def _is_complete(self) -> bool:
        # The flag of the backing in the header: no question to the mount, which other tests ask.
        return self.overlay.read_bytes()[16] & 1 == 0

    def _read(self, fd: int, path: Path, totals: Totals) -> None:
        size = self._random.choice((4096, 65536, 262144))
        pos = self._random.randrange((IMAGE_SIZE - size) // 4096) * 4096
        try:
            found = read_direct(path, pos, size) if self._random.random() < 0.5 else os.pread(fd, size, pos)
        except OSError:
            totals.add("failed")
            return
        self._compare(pos, found)
        totals.add("reads")

    def _write(self, fd: int, totals: Totals, stop: threading.Event) -> None:
        """A write that fails because the source is away is tried again: then it is known what is there."""
        data = self._random.randbytes(self._random.choice((1, 512, 4096, 70000)))
        pos = self._random.randrange(IMAGE_SIZE - len(data))
        deadline = time.monotonic() + WRITE_PATIENCE_SECONDS
        while True:
            try:
                assert os.pwrite(fd, data, pos) == len(data)
                break
            except OSError:
                totals.add("failed")
                if time.monotonic() > deadline:
                    raise
                stop.wait(PAUSE_SECONDS)
        self._expected[pos : pos + len(data)] = data
        totals.add("writes")
        if self._random.random() < 0.1:
            os.fsync(fd)

    def _compare(self, pos: int, found: bytes) -> None:
        if found != self._expected[pos : pos + len(found)]:
            raise AssertionError(f"wrong bytes in the {len(found)} at {pos}")


class Soak:
    """The servers and images of one run."""

    def __init__(self, folder: Path, servers: Sequence[Server], images: int, seed: int) -> None:
        self.totals = Totals()
        self._folder = folder
        self._servers = servers
        self._overlays = folder / "overlays"
        self._overlays.mkdir()
        self._images = []
        content = (folder / "disk").read_bytes()
        for number in range(images):
            server = servers[number % len(servers)]
            url = f"{server.url}/disk?{number}" if server.scheme == "http" else server.url
            self._images.append(_Image(self._overlays / f"{number}.qed", url, content, seed + number))

    def live(self, seconds: float, say: Callable[[str], None]) -> Life:
        """One mount for so long. Raises AssertionError if an image was wrong or the mount did not end well."""
        stop = threading.Event()
        samples: list[Sample] = []
        options = ("--source-timeout", "5s", "--limit", "512K")
        with mounted(self._overlays, self._folder / "mnt", *options) as mount:
            threads = [
                threading.Thread(target=image.use, args=(mount.mountpoint, self.totals, stop)) for image in self._images
            ]
            for thread in threads:
                thread.start()
            try:
                self._watch(mount, seconds, samples, say)
            finally:
                stop.set()
                for thread in threads:
                    thread.join(WRITE_PATIENCE_SECONDS)
            code = mount.unmount()
            log = mount.output()
        wrong = [image.wrong for image in self._images if image.wrong]
        if wrong or code or "internal error" in log:
            raise AssertionError(f"{wrong}, exit code {code}\n{log[-3000:]}")
        for image in self._images:
            if image.overlay.exists() and qemu_check(image.overlay).corruptions:
                raise AssertionError(f"qemu-img check finds corruptions in {image.overlay.name}")
        return Life(samples, _lines(log))

    def _watch(self, mount: Mount, seconds: float, samples: list[Sample], say: Callable[[str], None]) -> None:
        started = time.monotonic()
        restarted = started
        while (now := time.monotonic()) < started + seconds:
            samples.append(_sample(mount, now - started))
            if now - restarted > RESTART_SECONDS:
                restarted = now
                server = self._servers[self.totals.restarts % len(self._servers)]
                server.kill()
                time.sleep(1)
                server.restart()
                self.totals.add("restarts")
            if any(image.wrong for image in self._images):
                return
            if len(samples) % 30 == 0:
                say(f"{samples[-1]}")
            time.sleep(SAMPLE_SECONDS)


@contextlib.contextmanager
def soak(folder: Path, images: int, seed: int) -> Iterator[Soak]:
    """Two web servers and two NBD servers of one file, and a soak over them."""
    random_image(folder / "disk", IMAGE_SIZE, seed=seed)
    with (
        nginx(folder) as first,
        nginx(folder, location="keepalive_requests 20;") as second,
        nbdkit("file", folder / "disk", tcp=True) as third,
        nbdkit("file", folder / "disk", tcp=True) as fourth,
    ):
        yield Soak(folder, (first, third, second, fourth), images, seed)


def _sample(mount: Mount, seconds: float) -> Sample:
    status = Path(f"/proc/{mount.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    kib = int(fields["VmRSS"].split()[0])
    return Sample(seconds, len(os.listdir(f"/proc/{mount.pid}/fd")), int(fields["Threads"]), _tasks(mount), kib * 1024)


def _lines(log: str) -> int:
    """Lines of the log, but for the answers to SIGUSR1."""
    return sum(_DUMP not in line and not line.startswith("  ") for line in log.splitlines())


def _tasks(mount: Mount) -> int:
    """How many tasks the mount has: at SIGUSR1 it names them in its log."""
    before = mount.output().count(_DUMP)
    os.kill(mount.pid, signal.SIGUSR1)
    wait_for(lambda: mount.output().count(_DUMP) > before, "the tasks")
    dump = mount.output().rpartition(_DUMP)[2]
    return sum(int(count or 1) for count in re.findall(r"^  task .*?(?: \(x (\d+)\))? (?:at|in) ", dump, re.MULTILINE))


def trends(samples: Sequence[Sample], warm_up_seconds: float) -> list[Trend]:
    """Whether anything grows after the warm-up: descriptors, threads and tasks by more than a wobble, memory by 5 %."""
    warm = [sample for sample in samples if sample.seconds >= warm_up_seconds]
    third = max(1, len(warm) // 3)
    found = []
    for name in ("fds", "threads", "tasks", "rss"):
        values = [getattr(sample, name) for sample in warm]
        # The floor: what a burst needs, and what is on the way from the servers, comes and goes; a leak does not.
        first, last = float(min(values[:third])), float(min(values[-third:]))
        # Worker threads come and go with the load, and an image that is just opened or closed has its descriptors.
        allowed = first * RSS_GROWTH if name == "rss" else first + WOBBLE
        slope = statistics.linear_regression([sample.seconds for sample in warm], values).slope
        found.append(Trend(name, first, last, slope * 3600, last > allowed))
    return found
