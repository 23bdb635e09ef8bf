"""Random reads and writes during the stream, across unmounts: fio verifies its own, a model verifies ours."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.harness.require import require

from .support import MIB, Writer, assert_same, assert_whole, mounted_over, opened, origin

CYCLES = 3


def fio(image: Path, size: int, cycle: int, *options: str, seconds: float = 100) -> None:
    """One job of mixed blocks that verifies what it has written, with checksums in each block."""
    argv = [require("fio"), "--name=mixed", f"--filename={image}", f"--size={size}", "--allow_file_create=0"]
    argv += ["--rw=randrw", "--bsrange=4k-128k", "--ba=4k", "--ioengine=libaio", "--iodepth=16"]
    argv += [
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_backlog=64",
        f"--randseed={cycle}",
        "--output-format=terse",
    ]
    argv += ["--fsync=64", "--fallocate=none", "--overwrite=1", *options]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=image.parents[1],
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def verified_during_the_stream(folder: Path, size: int, limit: str, io_size: int) -> None:
    """Three mounts; in each, fio writes and verifies on one half while the stream fills all, and a model the other."""
    half = size // 2
    with origin(folder, size) as source:
        expected = bytearray(source.data())
        model = folder / "model"
        writer = Writer(half, seed=5)
        for cycle in range(CYCLES):
            with mounted_over(folder, source.url, "--limit", limit) as mount:
                image = mount.path("disk.raw")
                stop = threading.Event()
                ours = threading.Thread(target=_write, args=(image, half, writer, expected, stop))
                ours.start()
                try:
                    fio(image, half, cycle, f"--direct={cycle % 2}", f"--io_size={io_size}")
                finally:
                    stop.set()
                    ours.join()
                with opened(image, os.O_RDONLY) as fd:
                    # fio has verified its half; what it has left there is compared with the file below.
                    expected[:half] = os.pread(fd, half, 0)
                model.write_bytes(expected)
                assert_same(image, model)
                assert mount.unmount() == 0
        with mounted_over(folder, source.url) as mount:
            assert_same(mount.path("disk.raw"), model)
            mount.wait()
            assert mount.unmount() == 0
    assert_whole(folder / "disk.qed", model)


def _write(image: Path, start: int, writer: Writer, expected: bytearray, stop: threading.Event) -> None:
    """Our own writes to the half from `start` on, as many as there is time for, but some."""
    with opened(image) as fd:
        for number in range(100_000):
            if stop.is_set() and number >= 20:
                return
            time.sleep(0.002)  # the processors are fio's and the mount's
            pos, data = writer.next()
            assert os.pwrite(fd, data, start + pos) == len(data)
            expected[start + pos : start + pos + len(data)] = data


def test_fio_and_a_model_across_three_mounts(tmp_path: Path) -> None:
    verified_during_the_stream(tmp_path, 32 * MIB, "6M", 8 * MIB)


@pytest.mark.slow
def test_fio_and_a_model_across_three_mounts_of_a_gibibyte(tmp_path: Path) -> None:
    verified_during_the_stream(tmp_path, 1 << 30, "40M", 600 * MIB)
