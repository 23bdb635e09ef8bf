"""Mounts with a holder of users other than root: fusermount3 mounts and unmounts for them, and root may not look in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.process import wait_for
from tests.harness.require import require

from .support import MIB, origin
from .test_options import NOBODY, User, user

# Writes through one descriptor, which outlives three servers.
SCRIPT = """
exec 3<>"$1/disk.raw"
printf first >&3
kill -KILL "$2"
printf second >&3
"$3" -m qedfs upgrade "$1" >&2
printf third >&3
exec 3>&-
exec head -c 16 "$1/disk.raw"
"""


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[User]:
    """A user with an overlay and a place for its mount."""
    with user(NOBODY) as found, origin(tmp_path, MIB) as source:
        found.run("mkdir", found.folder / "mnt")
        found.qedfs("create", found.folder / "disk.qed", "--backing", source.url)
        yield found


def mount(nobody: User, *options: str) -> Path:
    """Mount with a holder. Returns the mountpoint."""
    place = nobody.folder / "mnt"
    nobody.qedfs("mount", nobody.folder / "disk.qed", place, "--daemon", "--restart", "--no-stream", *options)
    return place


def server(nobody: User) -> str:
    """The pid of the one server that this user has."""
    (found,) = json.loads(nobody.qedfs("list", "--json").stdout)["mounts"]
    return str(found["pid"])


def is_in_table(place: Path) -> bool:
    return f" {place} " in Path("/proc/self/mountinfo").read_text()


def test_a_user_outlives_a_kill_and_an_upgrade(nobody: User) -> None:
    place = mount(nobody)
    done = nobody.run("sh", "-ec", SCRIPT, "sh", place, server(nobody), nobody.python)
    assert done.stdout == "firstsecondthird"
    assert json.loads(nobody.qedfs("status", place, "--json").stdout)["restarts"] == 2
    nobody.qedfs("umount", place)
    assert not is_in_table(place)


def test_the_holder_of_a_user_takes_a_mount_away_that_cannot_go_on(nobody: User) -> None:
    place = mount(nobody, "--most-deaths", "1")
    nobody.run("kill", "-KILL", server(nobody))
    wait_for(lambda: not is_in_table(place), "the end of the mount")


def test_a_user_who_may_get_no_privileges_is_told_so(nobody: User) -> None:
    place = mount(nobody)
    nobody.inside = (require("setpriv"), "--no-new-privs")
    done = nobody.qedfs("umount", place, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{place}: cannot be unmounted: fusermount3 gets no privileges here (NoNewPrivs" in done.stderr
    nobody.inside = ()
    nobody.qedfs("umount", place)
    nobody.inside = (require("setpriv"), "--no-new-privs")
    done = nobody.qedfs("mount", nobody.folder / "disk.qed", place, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"cannot mount on {place}: fusermount3 gets no privileges here (NoNewPrivs" in done.stderr
