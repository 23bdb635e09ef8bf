"""Kills of a mount at random moments, in the middle of writes and stream, and what has to be there afterwards.

In one round a writer process with a seed of its own writes through the mount and tells each write that has returned;
the mount is killed; the image must then be the origin with exactly these writes. A write that was under way may be
there in whole, in part or not at all. Half of the zeros are written by punching holes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import first_difference, qemu_check
from tests.harness.mounts import Mount, mounted
from tests.harness.process import wait_for

from .support import Writer, make_hole

# How soon after its start the writer is killed: from "hardly begun" to "the stream is done".
LONGEST_LIFE_SECONDS = 1.2


class Overlay(NamedTuple):
    """What is being tortured: the overlay and the file that says what its image must read as."""

    path: Path
    expected: Path
    mountpoint: Path


class Outcome(NamedTuple):
    """What one round came to."""

    writes: int
    leaks: int
    complete: bool


class Broken(AssertionError):
    """A promise did not hold; the message says which, and with which seed."""


def no_job(_: Mount) -> contextlib.AbstractContextManager[None]:
    """Nothing runs beside the writer but the stream."""
    return contextlib.nullcontext()


def nothing_more(_: Mount) -> None:
    """Only the bytes of the image are looked at afterwards."""


def kill_once(
    overlay: Overlay,
    seed: int,
    *options: str,
    beside: Callable[[Mount], contextlib.AbstractContextManager[None]] = no_job,
    settled: Callable[[Mount], None] = nothing_more,
    again: Sequence[str] = (),
) -> Outcome:
    """Mounts, writes, kills, mounts again, compares.

    `beside`: what else is done with the mount until the kill. `settled`: looks at the next mount for what has become of
    that, and may give the expectation another length before it is compared.

    `again`: options of the second mount.

    Raises:
        Broken: the image is not what it has to be.
    """
    source = random.Random(seed)
    size = overlay.expected.stat().st_size
    with mounted(overlay.path, overlay.mountpoint, *options) as mount, beside(mount):
        told = told_of(overlay)
        with told.open("wb") as output:
            argv = [sys.executable, "-m", __name__, str(mount.path("disk.raw")), str(size), str(seed)]
            writer = subprocess.Popen(argv, stdout=output, stderr=subprocess.DEVNULL)
        try:
            # From the first write on, or some kills of a busy machine would come before it. A few do all the same.
            if source.random() < 0.9:
                wait_for(lambda: told.stat().st_size > 0 or writer.poll() is not None, "the first write")
            deadline = source.random() * LONGEST_LIFE_SECONDS + 0.1
            with contextlib.suppress(subprocess.TimeoutExpired):
                writer.wait(deadline)
            mount.kill()
            writer.wait(HANG_SECONDS)
        finally:
            writer.kill()
            writer.wait()
    done = told.read_bytes().count(b"\n")
    pending = _apply(overlay.expected, size, seed, done)
    check = qemu_check(overlay.path)
    if check.corruptions:
        raise Broken(f"seed {seed}: qemu-img check finds {check.corruptions} corruptions after the kill")
    with mounted(overlay.path, overlay.mountpoint, "--no-stream", *again) as mount:
        settled(mount)
        _compare(mount.path("disk.raw"), overlay.expected, pending, seed)
        complete = mount.image()["state"] == "complete"
        if mount.unmount() != 0:
            raise Broken(f"seed {seed}: the mount after the kill did not end well")
    after = qemu_check(overlay.path)
    if after.corruptions:
        raise Broken(f"seed {seed}: qemu-img check finds {after.corruptions} corruptions after the next mount")
    return Outcome(done, after.leaks, complete)


def told_of(overlay: Overlay) -> Path:
    """The file that has a line for each write that has returned in this round."""
    return overlay.path.with_suffix(".told")


def _apply(expected: Path, size: int, seed: int, done: int) -> tuple[int, bytes]:
    """Applies the writes that had returned to the expectation; returns the one that was under way."""
    writer = Writer(size, seed=seed)
    with expected.open("r+b") as file:
        for _ in range(done):
            pos, data = writer.next()
            os.pwrite(file.fileno(), data, pos)
    return writer.next()


def _compare(image: Path, expected: Path, pending: tuple[int, bytes], seed: int) -> None:
    """Image and expectation are equal, but where the last write may have left old bytes or new ones.

    What it has left becomes the expectation.
    """
    pos, data = pending
    with image.open("rb") as left, expected.open("r+b") as right:
        found = os.pread(left.fileno(), len(data), pos)
        old = os.pread(right.fileno(), len(data), pos)
        for index, (byte, before, new) in enumerate(zip(found, old, data, strict=True)):
            if byte not in (before, new):
                raise Broken(f"seed {seed}: byte {pos + index} is neither the old one nor that of the write under way")
        os.pwrite(right.fileno(), found, pos)
    difference = first_difference(image, expected)
    if difference is not None:
        raise Broken(f"seed {seed}: byte {difference} is not what had been written or the origin has")


def _write(path: str, size: int, seed: int) -> None:
    """The writer process: writes until the mount is gone, and tells each write that has returned by a line."""
    writer = Writer(size, seed=seed)
    fd = os.open(path, os.O_RDWR)
    for number in itertools.count():
        pos, data = writer.next()
        try:
            if not any(data) and number % 2:
                make_hole(fd, pos, len(data))
            elif os.pwrite(fd, data, pos) != len(data):
                return
            if number % 50 == 49:
                os.fsync(fd)
        except OSError:
            return
        os.write(1, b"\n")


if __name__ == "__main__":
    _write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
