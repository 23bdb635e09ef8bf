"""Each way in which FUSE can be unusable, and what `qedfs doctor` says of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qedfs.cli.doctor import fuse_checks
from qedfs.cli.doctor.finding import Finding, Verdict

ROOT, USER = 0, 1000
ALL, NONE = "000001ffffffffff", "00000000a80425fb"  # the second one is Docker's
MODULE = "modprobe fuse"
CONTAINER = "--device /dev/fuse --cap-add SYS_ADMIN"


def seen(finding: Finding) -> tuple[str, str]:
    """Verdict and way out."""
    return finding.verdict.value, finding.way_out or ""


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOENT, MODULE),
        (errno.ENODEV, MODULE),
        (errno.EACCES, "chmod 666 /dev/fuse"),
        (errno.EPERM, CONTAINER),
    ],
)
def test_a_device_that_cannot_be_opened(number: int, way_out: str) -> None:
    found = fuse_checks.device(OSError(number, os.strerror(number)))
    assert found.verdict is Verdict.FAIL
    assert os.strerror(number) in found.found
    assert way_out in (found.way_out or "")


def test_a_device_that_can_be_opened() -> None:
    assert seen(fuse_checks.device(None)) == ("ok", "")


@pytest.mark.parametrize(
    ("effective", "bounds", "no_new", "user", "verdict", "way_out"),
    [
        (ALL, ALL, 0, ROOT, "ok", ""),
        (NONE, ALL, 0, ROOT, "fail", CONTAINER),
        (NONE, ALL, 0, USER, "ok", ""),
        (NONE, ALL, 1, USER, "fail", "NoNewPrivileges=no"),
        (NONE, NONE, 0, USER, "fail", CONTAINER),
    ],
)
def test_privileges(effective: str, bounds: str, no_new: int, user: int, verdict: str, way_out: str) -> None:
    status = f"Name:\tqedfs: odd\nCapEff:\t{effective}\nCapBnd:\t{bounds}\nNoNewPrivs:\t{no_new}\n"
    found = seen(fuse_checks.privileges(status, user))
    assert found[0] == verdict
    assert way_out in found[1]


@pytest.mark.parametrize(("user", "verdict"), [(ROOT, "warn"), (USER, "fail")])
def test_only_root_can_do_without_fusermount3(user: int, verdict: str) -> None:
    found = seen(fuse_checks.fusermount(None, user))
    assert found[0] == verdict
    assert "install fuse3" in found[1]


def test_a_fusermount3_that_belongs_to_somebody_is_of_no_use(tmp_path: Path) -> None:
    program = tmp_path / "fusermount3"
    program.write_text("#!/bin/sh\necho fusermount3 version: 3.99.1\n")
    program.chmod(0o755)
    found = fuse_checks.fusermount(str(program), USER)
    assert found.verdict is Verdict.FAIL
    assert found.found.startswith(f"3.99.1, {program}, ")


@pytest.mark.parametrize(
    ("mode", "owner", "nosuid", "why"),
    [
        (0o104755, 0, False, None),
        (0o100755, 0, False, ("not setuid", "as root: chmod u+s it")),
        (0o104755, 0, True, ("on a file system that is mounted nosuid", "mount that file system without nosuid")),
        (0o104755, 7, False, ("belongs to user 7, not to root", "install fuse3 (apt, dnf and pacman call it that)")),
    ],
)
def test_when_a_program_becomes_root(mode: int, owner: int, nosuid: bool, why: tuple[str, str] | None) -> None:
    assert fuse_checks.why_not_privileged(mode, owner, nosuid=nosuid) == why


@pytest.mark.parametrize(
    ("configuration", "user", "verdict"),
    [
        ("#user_allow_other\n", USER, "warn"),
        ("# mine\n  user_allow_other \n", USER, "ok"),
        ("", USER, "warn"),
        (None, USER, "warn"),
        ("", ROOT, "ok"),
    ],
)
def test_allow_other(configuration: str | None, user: int, verdict: str) -> None:
    found = seen(fuse_checks.allow_other(configuration, user))
    assert found[0] == verdict
    assert ("user_allow_other" in found[1]) is (verdict == "warn")


@pytest.mark.parametrize(
    ("most", "default", "verdict"),
    [(None, None, "ok"), (0, 0, "ok"), (0, 20, "warn"), (30, 0, "warn"), (600, 90, "ok"), (20, 600, "warn")],
)
def test_a_kernel_that_ends_slow_mounts(most: int | None, default: int | None, verdict: str) -> None:
    found = seen(fuse_checks.time_limit(most, default))
    assert found[0] == verdict
    assert ("fs.fuse.max_request_timeout=0" in found[1]) is (verdict == "warn")


@pytest.mark.parametrize(("pages", "verdict"), [(None, "ok"), (256, "ok"), (32, "warn")])
def test_a_kernel_with_small_requests(pages: int | None, verdict: str) -> None:
    assert fuse_checks.request_size(pages).verdict.value == verdict


def test_this_machine_is_looked_at() -> None:
    assert {examine().check for _, examine in fuse_checks.checks()} == {name for name, _ in fuse_checks.checks()}
