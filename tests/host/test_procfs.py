"""The kernel's files are read by the kernel's rules: bytes, single blanks, line feeds, octal escapes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.host import procfs
from qedfs.host.procfs import (
    filesystem_type,
    held_type,
    is_denied_privileges,
    mount_number,
    mounts,
    outer_user,
    sockets,
    waits_for_disk,
)

# Each byte that Python's text files, `splitlines` or `split` would take for the end of something, and the kernel's own.
NAMES = [
    *("a\rb", "a\x0bb\x0c", "a\x1cb\x1d\x1e", "a\x85b", "a\u00a0b", "a\u2028b\u2029", "\u3000", " a ", "a\tb\nc"),
    *("a\\040b", "a#b", " - fuse.qedfs x rw", "\udcff\udcfe"),
]


def escaped(name: str) -> bytes:
    """As seq_path of the kernel writes it."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in os.fsencode(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_bytes_is_one_field(name: str) -> None:
    before = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n"
    line = b"36 35 98:0 /%b /mnt/%b rw shared:1 master:2 - fuse.x /dev/%b rw,user_id=7\n" % ((escaped(name),) * 3)
    found = list(mounts(before + line + before))
    assert [one.place for one in found] == [b"/proc", os.fsencode(f"/mnt/{name}"), b"/proc"]
    assert (found[1].number, found[1].device, found[1].kind) == (36, "98:0", "fuse.x")
    assert found[1].options == [b"rw", b"user_id=7"]


@pytest.mark.parametrize(
    "line", [b"", b"x", b"1 2 0:3 / / rw", b"1 2 0:3 / / rw -", b"1 2 0:3 / / rw - ext4", b"- - - - -"]
)
def test_a_line_of_another_form_is_passed_over(line: bytes) -> None:
    good = b"22 27 0:21 / /proc rw - proc proc rw"
    assert [one.place for one in mounts(good + b"\n" + line + b"\n" + good)] == [b"/proc", b"/proc"]


def test_this_machine_s_own_files(tmp_path: Path) -> None:
    places = {one.place: one for one in mounts()}
    assert places[b"/proc"].kind == "proc"
    assert filesystem_type("/proc") == filesystem_type("/proc/self/status") == "proc"
    assert filesystem_type(tmp_path / "missing") == ""
    with (tmp_path / "file").open("wb") as file:
        assert filesystem_type(file.fileno()) == filesystem_type(tmp_path) != ""
        assert any(one.number == mount_number(file.fileno()) for one in mounts())
    assert outer_user(os.getuid()) == os.getuid()


def test_the_type_of_a_file_system_that_is_in_use_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    table = procfs.mounts
    reads: list[str] = []

    def counted() -> Iterator[procfs.MountLine]:
        reads.append("mounts")
        return table()

    monkeypatch.setattr(procfs, "mounts", counted)
    with (tmp_path / "file").open() as file, Path("/proc/version").open() as other:
        kind, other_kind = filesystem_type(file.fileno()), filesystem_type(other.fileno())
        assert (kind != other_kind, other_kind) == (True, "proc")
        with held_type(file.fileno()):
            reads.clear()
            assert [filesystem_type(tmp_path), filesystem_type(file.fileno())] == [kind, kind]
            assert not reads
            assert filesystem_type(other.fileno()) == other_kind
        reads.clear()
        assert filesystem_type(file.fileno()) == kind
        assert reads


def test_the_path_of_a_socket_is_the_rest_of_its_line() -> None:
    head = b"Num       RefCount Protocol Flags    Type St Inode Path\n"
    lines = [
        b"0000000000000000: 00000002 00000000 00010000 0001 01   937 /run/user/7/a b\r\xa0c",
        b"ffff888100000000: 00000003 00000000 00000000 0001 03 23456 @abstract",
        b"0000000000000000: 00000003 00000000 00000000 0001 03 23457",
        b"0000000000000000: 00000002 00000000 00010000 0001 01 1234567 /tmp/x",
    ]
    assert list(sockets(head + b"\n".join(lines) + b"\n")) == [b"/run/user/7/a b\r\xa0c", b"/tmp/x"]


@pytest.mark.parametrize(
    ("uid", "outer"), [(0, 1000), (1, 100000), (65536, 165535), (65537, -1), (65534, 165533), (4294967295, -1)]
)
def test_the_number_outside_of_a_user_namespace(uid: int, outer: int) -> None:
    assert outer_user(uid, b"         0       1000          1\n         1     100000      65536\n") == outer
    assert outer_user(uid, b"         0          0 4294967295\n") == (uid if uid < 4294967295 else -1)


def test_whether_setuid_programs_get_privileges() -> None:
    assert is_denied_privileges(b"Name:\tx NoNewPrivs:\t1\nCapEff:\t0\nNoNewPrivs:\t1\nSeccomp:\t2\n")
    assert not is_denied_privileges(b"Name:\tNoNewPrivs:\t1\nNoNewPrivs:\t0\nSeccomp:\t2\n")
    assert not is_denied_privileges(b"Name:\told kernel\n")


def test_whether_a_process_waits_for_a_disk() -> None:
    assert not waits_for_disk(os.getpid())  # it runs
    assert not waits_for_disk(1 << 30)  # there is no such process
