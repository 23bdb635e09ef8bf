"""The file of a backing that is about to be written: what it must be, and who may have it open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfs.errors import Inaccessible, InUse, Refused, SourceError, UsageError
from qedfs.image.backing_file import check_unused, find_file, open_raw, open_to_look
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location


async def test_a_raw_file_is_found_through_a_link_opened_and_locked(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"x" * 4096)
    (tmp_path / "link").symlink_to("base")
    location = parse_location(str(tmp_path / "link"))
    found = await find_file(location, Policy((str(tmp_path),)), probes=True)
    assert (found.path, found.qed) == (str(tmp_path / "base"), False)
    await check_unused(location, found)
    target = await open_raw(location, found)
    assert target.size == 4096
    with pytest.raises(InUse):
        await open_raw(location, found)
    with pytest.raises(InUse, match="another program has it open"):
        await check_unused(location, found)
    await target.close()
    await check_unused(location, found)
    os.replace(tmp_path / "base", tmp_path / "old")
    (tmp_path / "base").write_bytes(b"y" * 4096)
    with pytest.raises(InUse, match="was replaced by another file meanwhile"):
        await open_raw(location, found)


async def test_what_is_not_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "qed").write_bytes(b"QED\0".ljust(4096, b"\0"))
    (tmp_path / "qcow2").write_bytes(b"QFI\xfb\0\0\0\3".ljust(4096, b"\0"))
    policy = Policy((str(tmp_path),))
    assert (await find_file(parse_location(str(tmp_path / "qed")), policy, probes=True)).qed
    assert not (await find_file(parse_location(str(tmp_path / "qed")), policy, probes=False)).qed
    with pytest.raises(SourceError, match="is a qcow2 image"):
        await find_file(parse_location(str(tmp_path / "qcow2")), policy, probes=True)
    with pytest.raises(SourceError, match="No such file"):
        await find_file(parse_location(str(tmp_path / "none")), policy, probes=True)
    with pytest.raises(UsageError, match="not a regular file"):
        await find_file(parse_location(str(tmp_path)), policy, probes=True)
    with pytest.raises(Refused):
        await find_file(parse_location("/etc/hostname"), policy, probes=True)


async def test_a_look_is_refused_what_a_commit_would_be_and_leaves_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "base"
    path.write_bytes(b"x" * 4096)
    before = path.stat()
    location = parse_location(str(path))
    found = await find_file(location, Policy((str(tmp_path),)), probes=True)
    with path.open("rb"):  # as the image that is about to be committed has it
        target = await open_to_look(location, found)
        assert (await target.store(0, memoryview(b"y" * 4096)), path.read_bytes()) == (4096, b"x" * 4096)
        await target.close()
    assert (path.stat().st_mtime_ns, path.stat().st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    with path.open("r+b"), pytest.raises(InUse, match="another program has it open"):
        await open_to_look(location, found)
    writing = await open_raw(location, found)  # with QEMU's locks
    with pytest.raises(InUse):
        await open_to_look(location, found)
    await writing.close()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write to any file
    with pytest.raises(Inaccessible, match="cannot be opened for writing"):
        await open_to_look(location, found)
