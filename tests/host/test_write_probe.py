"""The probe for writes that would wait. What it says of a frozen file system: `tests/faults/test_frozen_disk.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.host import write_probe
from qedfs.host.procfs import filesystem_type
from qedfs.host.write_probe import PROBED_TYPES, WriteProbe
from tests.harness.require import unavailable


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """An open file of a type that can be probed."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if filesystem_type(fd) not in PROBED_TYPES:
            unavailable("the folder of the tests is on no ext4, XFS or btrfs")
        os.write(fd, b"content")
        yield fd
    finally:
        os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_probe_changes_nothing(file: int) -> None:
    before = os.fstat(file)
    probe = WriteProbe(file, filesystem_type(file))
    if probe.blind:
        unavailable("io_uring is not allowed here")
    assert [probe.would_wait() for _ in range(10)] == [False] * 10
    after = os.fstat(file)
    assert (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
    assert os.pread(file, 100, 0) == b"content"
    probe.close()
    assert not probe.would_wait()


def test_it_has_one_descriptor_until_it_is_closed(file: int) -> None:
    WriteProbe(file, filesystem_type(file)).close()  # the first one in a process sets io_uring up
    before = descriptors()
    probe = WriteProbe(file, filesystem_type(file))
    assert descriptors() == before + (not probe.blind)
    probe.close()
    probe.close()
    assert descriptors() == before


def test_it_is_blind_where_it_cannot_know(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    other = WriteProbe(file, "nfs")
    assert other.blind
    assert not other.would_wait()
    monkeypatch.setattr(write_probe, "_rings", [None])  # the kernel refuses io_uring
    refused = WriteProbe(file, filesystem_type(file))
    assert refused.blind
    assert not refused.would_wait()


def test_what_the_kernel_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Refused:
        def __init__(self) -> None:
            asked.append(1)
            raise PermissionError

    monkeypatch.setattr(write_probe, "_rings", [])
    monkeypatch.setattr(write_probe, "_Ring", Refused)
    assert write_probe._ring() is None
    assert write_probe._ring() is None
    assert asked == [1]
