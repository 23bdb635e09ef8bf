"""One scripted session with a mounted image, and what the image may hold afterwards.

Knows the operations and their results, nothing of faults: whatever fails is remembered as something that may or may
not have happened, whatever succeeded has to be there.
"""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

from qedfs.control.qmp.client import Client
from qedfs.errors import QedfsError
from tests.harness.hang import HANG_SECONDS
from tests.harness.process import wait_for

CLUSTER_SIZE = 4096
# Just above what one L2 table of two 4 KiB clusters maps, so that there are two of them.
IMAGE_SIZE = (4 << 20) + (64 << 10)
BORDER = 4 << 20
ENDS = ("complete", "failed", "source-changed", "broken")  # states of a stream
_SECTOR = 512


class Wrong(AssertionError):
    """The image does not hold what it has to; the message says where."""


class Expectation:
    """The contents that the image may have: for every byte, that of one of these versions."""

    def __init__(self, content: bytes) -> None:
        self.versions = [bytearray(content)]
        self._synced = [bytearray(content)]  # as of the last fsync that returned

    def wrote(self, pos: int, data: bytes) -> None:
        """A write has returned."""
        for version in self.versions:
            version[pos : pos + len(data)] = data

    def may_have_written(self, pos: int, data: bytes) -> None:
        """A write has failed, or nobody knows."""
        version = bytearray(self.versions[-1])
        version[pos : pos + len(data)] = data
        self.versions.append(version)

    def synced(self) -> None:
        """An fsync has returned."""
        self._synced = [bytearray(version) for version in self.versions]

    def barrier_failed(self) -> None:
        """What came after the last fsync may be there or not: nobody knows what the disk has of it."""
        self.versions += self._synced

    def judge(self, pos: int, found: bytes) -> None:
        """Raise Wrong if these bytes of the image cannot be."""
        if found == self.versions[0][pos : pos + len(found)]:
            return
        for at in range(0, len(found), _SECTOR):
            part = found[at : at + _SECTOR]
            allowed = [version[pos + at : pos + at + len(part)] for version in self.versions]
            for index, byte in enumerate(part):
                if all(byte != version[index] for version in allowed):
                    raise Wrong(f"byte {pos + at + index} of the image is none that it may be")

    def settle(self, found: bytes) -> None:
        """These are the contents from now on. Raises Wrong if they cannot be."""
        if len(found) != len(self.versions[0]):
            raise Wrong(f"the image has {len(found)} bytes")
        self.judge(0, found)
        self.versions = [bytearray(found)]
        self._synced = [bytearray(found)]


class Session:
    """The script. `run` goes through it to its end, or until the mount is dead."""

    def __init__(
        self, mountpoint: Path, expectation: Expectation, *, seed: int, stream_seconds: float = HANG_SECONDS
    ) -> None:
        """`stream_seconds`: less than a hang where a fault may leave a stream that never ends."""
        self.failed: list[str] = []  # the operations that did
        self._mountpoint = mountpoint
        self._stream_seconds = stream_seconds
        self._expected = expectation
        self._random = random.Random(seed)

    def run(self) -> None:
        """Write to missing, present and zero clusters, read, fsync, stream to the end, write on."""
        try:
            fd = os.open(self._mountpoint / "disk.raw", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            self.failed.append(f"open: {exc.strerror}")
            return
        try:
            self._before_the_stream(fd)
            self._stream(fd)
            self._write(fd, (3 << 20) + 7, 9000)
            self._fsync(fd)
        finally:
            # close() asks the mount as well.
            with contextlib.suppress(OSError):
                os.close(fd)

    def _before_the_stream(self, fd: int) -> None:
        self._write(fd, 100, 300)
        self._write(fd, 2 * CLUSTER_SIZE, 2 * CLUSTER_SIZE)
        self._fsync(fd)
        self._write(fd, 2 * CLUSTER_SIZE + 1000, 2000)
        self._read(fd, 64 << 10, 4 * CLUSTER_SIZE)
        self._write(fd, BORDER - 6000, 12000)
        self._write(fd, 128 << 10, 2 * CLUSTER_SIZE, zeros=True)
        self._fsync(fd)
        self._write(fd, (64 << 10) + 5, 100)
        # Large enough to go through a thread.
        self._write(fd, 1 << 20, 200 << 10)
        self._write(fd, IMAGE_SIZE - 1000, 1000)

    def _stream(self, fd: int) -> None:
        try:
            with Client.connect(str(self._mountpoint)) as client:
                client.execute("x-qedfs-start", device="disk")
                self._write(fd, (2 << 20) + 1, 5000)
                wait_for(lambda: _state(client) in ENDS, "the end of the stream", self._stream_seconds)
                if (state := _state(client)) != "complete":
                    self.failed.append(f"stream: {state}")
        except (QedfsError, OSError) as exc:  # TimeoutError is one
            self.failed.append(f"stream: {exc}")

    def _write(self, fd: int, pos: int, size: int, *, zeros: bool = False) -> None:
        data = bytes(size) if zeros else self._random.randbytes(size)
        try:
            count = os.pwrite(fd, data, pos)
        except OSError as exc:
            self.failed.append(f"write: {exc.strerror}")
            self._expected.may_have_written(pos, data)
            return
        self._expected.wrote(pos, data[:count])
        if count < len(data):
            self._expected.may_have_written(pos + count, data[count:])

    def _read(self, fd: int, pos: int, size: int) -> None:
        try:
            found = os.pread(fd, size, pos)
        except OSError as exc:
            self.failed.append(f"read: {exc.strerror}")
            return
        self._expected.judge(pos, found)

    def _fsync(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            os.fsync(fd)
            self._expected.synced()
            return
        self.failed.append("fsync")


def _state(client: Client) -> str:
    (image,) = client.execute("x-qedfs-status")["images"]
    state: str = image["state"]
    return state
