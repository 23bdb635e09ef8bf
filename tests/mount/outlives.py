"""A mount with a holder under load, whose servers are killed or replaced, and what has to be true of its images then.

The load: fio writes and verifies one image with checksums and flushes, a writer with a seed of its own writes to a
second one and reads back, and a third one streams; when that is complete it is compared, removed, and begun again. None
of them may see an error or a wrong byte, whatever happens to the servers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import first_difference, qemu_check
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require

from .support import MIB, Origin, Writer, create, make_hole, opened, origin


class Broken(AssertionError):
    """A promise did not hold."""


def servers(holder: int) -> list[int]:
    """The servers that a holder has started and that live."""
    try:
        return [int(pid) for pid in Path(f"/proc/{holder}/task/{holder}/children").read_text().split()]
    except OSError:
        return []


def kill_server(mount: Mount, number: int = signal.SIGKILL) -> int:
    """A signal to the server, or to one that is about to take over. Returns its pid; 0 if there is none."""
    for pid in servers(mount.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return pid
    return 0


class Load:
    """The load on one mount. `failures`: what must not have happened."""

    def __init__(self, folder: Path, source: Origin, mount: Mount, seed: int) -> None:
        self.failures: list[str] = []
        self.writes = 0  # by the writer
        self.runs = 0  # of fio
        self.streamed = 0  # images that became complete
        self._folder = folder
        self._source = source
        self._mount = mount
        self._stop = threading.Event()
        self._size = source.raw.stat().st_size
        self._writer = Writer(self._size, seed=seed)
        self._expected = bytearray(source.data())
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,)) for work in (self._fio, self._write, self._stream)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the load, and compares what the writer has written."""
        self._stop.set()
        for thread in self._threads:
            thread.join(HANG_SECONDS)
            if thread.is_alive():
                raise Broken("the load does not end: a request was never answered")

    def _guarded(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as exc:
            self.failures.append(f"{type(exc).__name__}: {exc}")

    def _fio(self) -> None:
        image = self._mount.path("fio.raw")
        for number in itertools.count():
            if self._stop.is_set():
                return
            argv = [require("fio"), "--name=mixed", f"--filename={image}", f"--size={self._size}"]
            argv += ["--rw=randrw", "--bsrange=4k-128k", "--ba=4k", "--ioengine=libaio", "--iodepth=16"]
            argv += ["--allow_file_create=0", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]
            argv += [f"--randseed={number}", "--fsync=64", "--fallocate=none", "--overwrite=1"]
            argv += [f"--direct={number % 2}", "--io_size=8m", "--output-format=terse"]
            done = subprocess.run(
                argv, capture_output=True, text=True, check=False, cwd=self._folder, stdin=subprocess.DEVNULL
            )
            if done.returncode:
                raise Broken(f"fio: {done.stdout}{done.stderr}")
            self.runs += 1

    def _write(self) -> None:
        source = random.Random(7)
        with opened(self._mount.path("model.raw")) as fd:
            for number in itertools.count():
                if self._stop.is_set():
                    break
                time.sleep(0.001)  # the processors are the mount's
                pos, data = self._writer.next()
                if not any(data) and number % 2:
                    make_hole(fd, pos, len(data))
                elif (count := os.pwrite(fd, data, pos)) != len(data):
                    raise Broken(f"a write of {len(data)} bytes has written {count}")
                self._expected[pos : pos + len(data)] = data
                if number % 20 == 19:
                    os.fsync(fd)
                if number % 5 == 4:
                    at = source.randrange(self._size - 65536)
                    os.posix_fadvise(fd, at, 65536, os.POSIX_FADV_DONTNEED)
                    if os.pread(fd, 65536, at) != self._expected[at : at + 65536]:
                        raise Broken(f"write {number}: the image differs from the model between {at} and {at + 65536}")
                self.writes += 1
            os.fsync(fd)

    def _stream(self) -> None:
        for number in itertools.count():
            name = f"cold{number}"
            overlay = self._folder / "overlays" / f"{name}.qed"
            create(overlay, self._source.url)
            image = self._mount.path(f"{name}.raw")
            wait_for(image.exists, f"the image {name}")
            while not self._complete(image):
                if self._stop.is_set():
                    return
            if (at := first_difference(image, self._source.raw)) is not None:
                raise Broken(f"{name}: byte {at} is not that of the source")
            self.streamed += 1
            overlay.unlink()

    def _complete(self, image: Path) -> bool:
        done = qedfs("wait", self._mount.mountpoint, image.name, "--timeout", "0.5s", check=False)
        return done.returncode == 0

    def compare(self, overlays: Path) -> None:
        """After the mount has ended: the overlays are whole, and the writer's image is its model."""
        for overlay in sorted(overlays.glob("*.qed")):
            if qemu_check(overlay).corruptions:
                raise Broken(f"{overlay.name}: qemu-img check finds corruptions")
        with mounted(overlays / "model.qed", self._folder / "after", "--no-stream") as mount:
            model = self._folder / "model"
            model.write_bytes(self._expected)
            if (at := first_difference(mount.path("model.raw"), model)) is not None:
                raise Broken(f"model.raw: byte {at} is not what was written")


@contextlib.contextmanager
def loaded(
    folder: Path, *options: str, seed: int = 0, size: int = 32 * MIB, through: Sequence[str] = ()
) -> Iterator[tuple[Mount, Load]]:
    """A mount with a holder, and the load on it. At the end everything is compared; raises Broken.

    `through`: as for `mounted`.
    """
    overlays = folder / "overlays"
    overlays.mkdir()
    with origin(folder, size, seed=seed) as source:
        for name in ("fio", "model"):
            create(overlays / f"{name}.qed", source.url)
        with mounted(overlays, folder / "mnt", "--restart", "--limit", "2M", *options, through=through) as mount:
            wait_until_serving(mount)
            load = Load(folder, source, mount, seed)
            load.start()
            try:
                yield mount, load
                load.stop()
            except BaseException:
                mount.kill()  # or the threads would wait for ever
                raise
            if load.failures:
                raise Broken("; ".join(load.failures))
            if mount.unmount() != 0:
                raise Broken("the mount did not end well")
        load.compare(overlays)


def wait_until_serving(mount: Mount) -> None:
    """Waits for the moment from which on a dead server is replaced. The mount is there a little earlier."""
    wait_for(lambda: "serving " in mount.output(), "a mount that serves")


def paused_seconds(mount: Mount) -> list[float]:
    """How long the mount has answered nothing, for each time that a server has taken it over."""
    text = "it has answered nothing for "
    return [float(line.partition(text)[2].split()[0]) for line in mount.output().splitlines() if text in line]


def wait_for_takeover(mount: Mount, count: int) -> None:
    """Waits until so many servers have taken the mount over."""

    def over() -> bool:
        if mount.returncode is not None:
            raise Broken(f"the mount has ended: {mount.output()[-3000:]}")
        return len(paused_seconds(mount)) >= count

    wait_for(over, f"another server of the mount (log: {mount.output()[-3000:]})")
