"""Nobody waits any more for what a killed reader has asked for: neither its process nor `umount` waits for the source.

The deadline of the source is ten minutes, longer than any test may wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.host.device import device_of
from qedfs.mount.abandoned_reads import LOOK_SECONDS, held_by_the_dying, holders, is_dying
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import Mount, mounted
from tests.harness.process import wait_for
from tests.harness.require import require, require_root
from tests.harness.servers import black_hole

from .support import MIB, create

MAPPED = "import mmap, os, sys; print(mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ)[5])"
MANY = """
import mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
threads = [threading.Thread(target=os.preadv, args=(fd, [mmap.mmap(-1, 4096)], at << 16)) for at in range(20)]
for thread in threads:
    thread.start()
"""
AIO = "--name=x --ioengine=libaio --iodepth=8 --direct=1 --rw=randread --readonly --bs=4k --thread"


def commands(image: Path) -> dict[str, list[str]]:
    """Programs that wait for an image, each in another place of the kernel."""
    return {
        "buffered": ["dd", f"if={image}", "of=/dev/null"],
        "direct": ["dd", f"if={image}", "of=/dev/null", "iflag=direct", "bs=4k"],
        "mapped": [sys.executable, "-c", MAPPED, str(image)],
        "threads": [sys.executable, "-c", MANY, str(image)],
        "asynchronous": [require("fio"), *AIO.split(), f"--filename={image}"],
        "write": ["dd", "if=/dev/zero", f"of={image}", "bs=512", "count=1", "conv=notrunc"],
    }


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with black_hole() as url:
        create(tmp_path / "disk.qed", url, "--offline", "--size", str(16 * MIB))
        options = ("--no-stream", "--source-timeout", "10m")
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt", *options) as mount:
            yield mount


def start(mount: Mount, kind: str, *, waiting: int = 1) -> subprocess.Popen[bytes]:
    """Such a program, when so many requests wait for the source."""
    process = subprocess.Popen(commands(mount.path("disk.raw"))[kind], stdout=subprocess.DEVNULL)
    wait_for(lambda: readers(mount) >= waiting, "the reader")
    return process


def readers(mount: Mount) -> int:
    count: int = sum(source["readers"] for source in mount.status()["sources"])
    return count


@pytest.mark.parametrize("kind", ["buffered", "direct", "mapped", "threads", "asynchronous", "write"])
def test_a_killed_reader_ends(mount: Mount, kind: str) -> None:
    process = start(mount, kind)
    process.kill()
    process.wait(HANG_SECONDS)
    assert mount.unmount() == 0


def test_a_reader_who_lives_is_not_given_up(mount: Mount) -> None:
    killed = start(mount, "direct")
    living = start(mount, "buffered", waiting=2)
    try:
        killed.kill()
        time.sleep(3 * LOOK_SECONDS)  # looks that must change nothing
        assert living.poll() is None
        assert readers(mount) >= 2
    finally:
        living.kill()
    for process in (killed, living):
        process.wait(HANG_SECONDS)


def test_a_reader_who_lives_on_a_mount_that_was_taken_away_lazily_is_not_given_up(mount: Mount) -> None:
    living = start(mount, "direct")
    try:
        argv = [require("umount"), "-l"] if os.geteuid() == 0 else [require("fusermount3"), "-u", "-z"]
        subprocess.run([*argv, mount.mountpoint], check=True)
        time.sleep(3 * LOOK_SECONDS)  # looks that must change nothing
        assert living.poll() is None
        os.kill(mount.pid, signal.SIGTERM)
        assert mount.wait_exit() == 0
    finally:
        living.kill()
    living.wait(HANG_SECONDS)


# Who is dying.


def task(folder: Path, *, pending: int = 0, flags: int = 0x400040, name: str = "dd") -> Path:
    """A task as /proc tells of it."""
    folder.mkdir()
    (folder / "status").write_text(
        f"Name:\t{name}\nState:\tD (disk sleep)\nSigPnd:\t{0:016x}\nShdPnd:\t{pending:016x}\n"
    )
    (folder / "stat").write_text(f"7 ({name}) D 1 7 7 0 -1 {flags} 1 0 0\n")
    return folder


@pytest.mark.parametrize(
    ("pending", "flags", "dying"),
    [(0, 0x400040, False), (1 << 14, 0x400040, False), (1 << 8, 0x400040, True), (0, 0x400044, True)],
)
def test_who_is_dying(tmp_path: Path, pending: int, flags: int, dying: bool) -> None:
    assert is_dying(task(tmp_path / "7", pending=pending, flags=flags, name="a) R 4 b")) is dying


def test_who_is_gone_is_dying(tmp_path: Path) -> None:
    assert is_dying(tmp_path / "7")


def test_what_a_living_process_has_open_is_not_deserted(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with file.open():
        assert held_by_the_dying({str(file): 1}) == set()
    # What nobody that can be seen has open, somebody else may have.
    assert held_by_the_dying({str(file): 1}) == set()
    assert held_by_the_dying({str(file): 0}) == set()


IN_ANOTHER_NAMESPACE = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"


def test_who_has_a_name_open_is_told_by_its_inode_and_its_file_system(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    inode, device = file.stat().st_ino, device_of(str(file))
    with file.open():
        assert holders({"file": inode}, device) == ({"file"}, {})
        assert holders({"file": inode + 1}, device) == (set(), {})
        assert holders({"other": inode}, device) == (set(), {})
        # Another mount of ours may have the same name and inode: the first image of each has the same number.
        assert holders({"file": inode}, "0:0") == (set(), {})
        assert holders({"file": inode}, "") == ({"file"}, {})  # if that is not known
    assert holders({"file": inode}, device) == (set(), {})


def test_who_has_a_name_open_in_another_mount_namespace_is_told_by_its_file_system(tmp_path: Path) -> None:
    require_root()
    file = tmp_path / "file"
    file.touch()
    inode = file.stat().st_ino
    words = [require("unshare"), "-m", sys.executable, "-ISc", IN_ANOTHER_NAMESPACE, str(file)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert holders({"file": inode}, device_of(str(file))) == ({"file"}, {})
        assert holders({"file": inode}, "0:0") == (set(), {})
        process.communicate()
