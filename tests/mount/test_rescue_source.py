"""The source is gone for good: what is missing is listed, and taken from a backup, while a guest goes on writing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_check, qemu_info, random_image
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.servers import nbdkit, nginx

from .support import MIB, create, opened, read_direct
from .test_source_away import READ, away, stalled

SIZE = 16 * MIB


def missing(*place: str | Path) -> int:
    """Bytes that `map --missing` lists."""
    return sum(extent["length"] for extent in json.loads(qedfs("map", *place, "--missing", "--json").stdout))


def test_a_backup_fills_what_is_missing_while_a_guest_writes(tmp_path: Path) -> None:
    with away(tmp_path, "--on-source-error", "wait") as (mount, _, data):
        image, place = mount.path("disk.raw"), mount.mountpoint
        backup = tmp_path / "backup"
        backup.write_bytes(data)
        before = missing(place, "disk")
        assert 0 < before < SIZE
        assert missing(tmp_path / "disk.qed") >= before  # the file may be behind
        waiting = subprocess.Popen([sys.executable, "-c", READ, image, str(9 * MIB)], stdout=subprocess.PIPE, text=True)
        wait_for(lambda: stalled(mount) == 1, "a reader that waits")
        expected, done = bytearray(data), threading.Event()

        def write() -> None:
            chosen = random.Random(5)
            with opened(image) as fd:
                while not done.is_set():
                    pos = chosen.randrange(SIZE // 4096 - 16) * 4096
                    part = chosen.randbytes(chosen.choice((512, 65536)))
                    os.pwrite(fd, part, pos)
                    expected[pos : pos + len(part)] = part
                os.fsync(fd)

        guest = threading.Thread(target=write)
        guest.start()
        try:
            shown = json.loads(qedfs("populate", place, "disk", "--from", backup, "--json").stdout)
        finally:
            done.set()
            guest.join()
            out, _ = waiting.communicate(timeout=HANG_SECONDS)
        assert (shown["complete"], shown["image"]) == (True, "disk.raw")
        assert len(bytes.fromhex(out)) == 65536
        assert mount.image("disk.raw")["state"] == "complete"
        mount.wait()
        assert missing(place, "disk") == 0
        assert read_direct(image, 0, SIZE) == expected
        assert mount.unmount() == 0
    assert qemu_check(tmp_path / "disk.qed") == (0, 0)
    assert "backing-filename" not in qemu_info(tmp_path / "disk.qed")


def test_another_disk_is_refused_and_a_server_may_have_the_copy(tmp_path: Path) -> None:
    with away(tmp_path) as (mount, _, data):
        place = mount.mountpoint
        www = tmp_path / "www"
        www.mkdir()
        random_image(www / "other", SIZE, seed=99)
        (www / "short").write_bytes(data[:-MIB])
        (www / "right").write_bytes(data)
        for name, text in (
            ("other", "is not the disk that disk.raw was started from"),
            ("short", "bytes, the backing"),
        ):
            done = qedfs("populate", place, "disk", "--from", www / name, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (5, 1)
            assert text in done.stderr
        for wrong, code in ((mount.path("disk.raw"), 2), (www / "none", 4), (www, 4)):
            done = qedfs("populate", place, "disk", "--from", wrong, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert missing(place, "disk") > 0
        with nginx(www) as server:
            assert "it is complete" in qedfs("populate", place, "disk", "--from", f"{server.url}/right").stdout
        assert read_direct(mount.path("disk.raw"), 0, SIZE) == data
        # Once more: there is nothing to do, and nothing is said of the time before.
        assert "nothing is taken from" in qedfs("populate", place, "disk", "--from", www / "right").stdout
        shown = json.loads(qedfs("populate", place, "disk", "--from", www / "right", "--json").stdout)
        assert (shown["populated"], shown["complete"]) == (0, True)


@pytest.mark.parametrize("options", [["--read-only"], []])
def test_nothing_is_populated_that_cannot_be_kept(tmp_path: Path, options: list[str]) -> None:
    raw = random_image(tmp_path / "disk", MIB)
    with nbdkit("file", raw, tcp=True) as server:
        create(tmp_path / "disk.qed", server.url)
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--no-stream", *options) as mount:
            done = qedfs("populate", mount.mountpoint, "disk", "--from", raw, check=False)
            if options:
                assert done.returncode == 1
                assert "read-only" in done.stderr
            else:
                assert done.returncode == 0  # nothing was kept yet, so the size decides; the source is there, too
                assert read_direct(mount.path("disk.raw"), 0, MIB) == raw.read_bytes()
