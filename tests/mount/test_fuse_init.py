"""The answer to the kernel's first request: how much may be in flight for a mount, with fusectl and without."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from qedfs.mount import fuse_init
from qedfs.mount.fuse_init import MAX_BACKGROUND, Handshake, background_limit, can_resend, with_limits
from tests.harness.fusectl import fusectl
from tests.harness.images import qemu_create
from tests.harness.mounts import mounted

from .support import MIB

# fuse_out_header and fuse_init_out of <linux/fuse.h>, as far as they matter here.
INIT_OUT = struct.Struct("=IiQ IIIIHHIIHHI7I")
REQUEST = struct.pack("=IIQ", 64, 26, 7) + bytes(48)  # fuse_in_header of FUSE_INIT
ANSWER = INIT_OUT.pack(INIT_OUT.size, 0, 7, 7, 38, 131072, 1, 12, 9, 1 << 20, 1, 256, 0, 0, *([0] * 7))


def test_the_limits_are_changed_and_nothing_else() -> None:
    fields = list(INIT_OUT.unpack(ANSWER))
    fields[7:9] = [MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4]
    assert INIT_OUT.unpack(with_limits(ANSWER)) == tuple(fields)


@pytest.mark.parametrize("answer", [b"", ANSWER[:24], struct.pack("=IiQ", 16, -71, 7) + bytes(64)])
def test_an_answer_without_limits_is_left_alone(answer: bytes) -> None:
    assert with_limits(answer) == answer


def test_request_and_answer_pass_through(tmp_path: Path) -> None:
    # A FIFO in both directions stands for /dev/fuse: what is written there can be read there.
    os.mkfifo(tmp_path / "fuse")
    fd = os.open(tmp_path / "fuse", os.O_RDWR)
    try:
        os.write(fd, REQUEST)
        kernel = os.fstat(fd).st_ino
        exchange = Handshake(fd)
        assert os.read(fd, 100) == REQUEST
        assert os.fstat(fd).st_ino != kernel
        os.write(fd, ANSWER)
        exchange.finish()
        assert os.fstat(fd).st_ino == kernel
        assert not os.get_inheritable(fd)
        assert os.read(fd, 4096) == with_limits(ANSWER)
    finally:
        os.close(fd)


@pytest.mark.parametrize("request_", [struct.pack("=IIQ", 64, 1, 7) + bytes(48), b"short"])
def test_the_answer_to_another_request_is_left_alone(tmp_path: Path, request_: bytes) -> None:
    """A libfuse that has had the exchange with the kernel while it mounted: its first request is anybody's."""
    os.mkfifo(tmp_path / "fuse")
    fd = os.open(tmp_path / "fuse", os.O_RDWR)
    try:
        os.write(fd, request_)
        exchange = Handshake(fd)
        assert os.read(fd, 100) == request_
        os.write(fd, ANSWER)
        exchange.finish()
        assert os.read(fd, 4096) == ANSWER
    finally:
        os.close(fd)


def test_without_an_answer_the_kernel_gets_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fuse")
    fd = os.open(tmp_path / "fuse", os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(fd, b"request")
        exchange = Handshake(fd)
        os.read(fd, 100)
        exchange.finish()
        with pytest.raises(BlockingIOError):
            os.read(fd, 100)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("uid", "ids", "limit", "expected"),
    [
        (0, "0 0 4294967295", "300", MAX_BACKGROUND),
        (0, "0 100000 65536", "300", 300),
        (1000, "0 0 4294967295", "300", 300),
        (1000, "0 0 4294967295", "65535", MAX_BACKGROUND),
        (1000, "0 0 4294967295", "", MAX_BACKGROUND),
    ],
)
def test_what_a_user_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, ids: str, limit: str, expected: int
) -> None:
    for name, text in (("_OWN_IDS", ids), ("_OWN_LIMIT", limit)):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(fuse_init, name, tmp_path / name)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert background_limit() == expected


def test_the_kernel_has_taken_it(tmp_path: Path) -> None:
    qemu_create(tmp_path / "disk.qed", size=MIB)
    with fusectl() as connections, mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount:
        connection = connections / str(os.minor(mount.mountpoint.stat().st_dev))
        assert int((connection / "max_background").read_text()) == background_limit()
        assert mount.unmount() == 0


@pytest.mark.parametrize(("flags", "expected"), [(1 << 7, True), (1 << 6, False)])
def test_the_kernel_tells_whether_it_repeats_requests(flags: int, expected: bool) -> None:
    request = struct.pack("=IIQ", 104, 26, 2) + bytes(24) + struct.pack("=IIIII", 7, 45, 0, 0, flags) + bytes(44)
    assert can_resend(request) is expected
    assert not can_resend(request[:56])  # of a kernel that has no second word of flags
