"""The reader of write logs, against a log that QEMU has written and against what is none."""

from __future__ import annotations

import struct

import pytest

from tests.fakes.storage import BarrierBegun, BarrierEnded, Entry, Written
from tests.overlay.conftest import Qemu
from tests.overlay.writelog import FLUSH, MAGIC, VERSION, read_log

DISCARD = 4


@pytest.fixture(params=[512, 4096])
def log(request: pytest.FixtureRequest, qemu: Qemu) -> bytes:
    """What QEMU logs of four writes, one of them of zeros, and two flushes, in sectors of two sizes."""
    (qemu.folder / "disk.raw").write_bytes(bytes(65536))
    (qemu.folder / "log").touch()
    options = "driver=blklogwrites,file.driver=file,file.filename=disk.raw,log.driver=file,log.filename=log"
    commands = ["write -P 1 0 8192", "write -z 8192 16384", "flush", "write -P 2 4096 4096", "write -P 3 0 4096"]
    words = [word for command in (*commands, "flush") for word in ("-c", command)]
    qemu.run("qemu-io", "-t", "writeback", *words, "--image-opts", f"{options},log-sector-size={request.param}")
    return (qemu.folder / "log").read_bytes()


def test_a_log_of_qemu_is_read_as_it_was_written(log: bytes) -> None:
    assert without_numbers(list(read_log(log))) == [
        Written(0, b"\1" * 8192),
        Written(8192, bytes(16384)),
        *(BarrierBegun, BarrierEnded),
        Written(4096, b"\2" * 4096),
        Written(0, b"\3" * 4096),
        *(BarrierBegun, BarrierEnded),
    ]


def without_numbers(entries: list[Entry]) -> list[object]:
    """The entries, and of barriers the kind: the number says only which end belongs to which beginning."""
    barriers = [entry for entry in entries if isinstance(entry, BarrierBegun | BarrierEnded)]
    for begun, ended in zip(barriers[::2], barriers[1::2], strict=True):
        assert begun.number == ended.number
    return [entry if isinstance(entry, Written) else type(entry) for entry in entries]


def test_a_log_that_ends_early_is_refused(log: bytes) -> None:
    for length in range(0, len(log) - 4096, 512):
        with pytest.raises(ValueError, match="the write log ends"):
            list(read_log(log[:length]))


def made(*, magic: int = MAGIC, version: int = VERSION, flags: int = FLUSH) -> bytes:
    """A log of one entry without data."""
    superblock = struct.pack("<QQQI", magic, version, 1, 512).ljust(512, b"\0")
    return superblock + struct.pack("<QQQQ", 0, 0, flags, 0).ljust(512, b"\0")


def test_what_is_no_log_of_writes_and_flushes_is_refused() -> None:
    assert len(list(read_log(made()))) == 2
    for other in (made(magic=MAGIC + 1), made(version=2)):
        with pytest.raises(ValueError, match="no write log"):
            list(read_log(other))
    with pytest.raises(ValueError, match="entry 0 of the write log has flags 0x4"):
        list(read_log(made(flags=DISCARD)))
