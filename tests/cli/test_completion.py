"""What TAB offers for mountpoints and images: of real mounts, of dead ones, and of servers that do not answer."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import click
import pytest

from qedfs.cli import completion
from qedfs.cli.found_mounts import FoundMount
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import QEDFS
from tests.mount.support import MIB, create, origin

IMAGES = ("one.raw", "two.raw")


def offered(*words: str | Path, cwd: Path | None = None) -> list[str]:
    """What the shell is told for the last of these words; nothing may be printed beside it."""
    line = ["qedfs", *map(str, words)]
    done = subprocess.run(
        QEDFS,
        env={
            **os.environ,
            "_QEDFS_COMPLETE": "bash_complete",
            "COMP_WORDS": "\n".join(line),
            "COMP_CWORD": str(len(line) - 1),
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


def test_mountpoints_and_images_of_a_mount(tmp_path: Path) -> None:
    with origin(tmp_path, MIB) as source:
        (tmp_path / "vms").mkdir()
        for name in ("one", "two"):
            create(tmp_path / "vms" / f"{name}.qed", source.url)
        mountpoint = tmp_path / "mnt"
        with mounted(tmp_path / "vms", mountpoint):
            for command in ("status", "wait", "umount", "profile"):
                assert offered(command, f"{tmp_path}/m") == [f"plain,{mountpoint}"]
            assert offered("stream", "pause", "m", cwd=tmp_path) == ["plain,mnt"]
            assert offered("wait", mountpoint, "") == ["plain,one.raw", "plain,two.raw"]
            assert offered("wait", "mnt", "t", cwd=tmp_path) == ["plain,two.raw"]
            for command in ("pause", "limit"):
                assert offered("stream", command, mountpoint, "o") == ["plain,one.raw"]
            assert offered("profile", mountpoint, "tw") == ["plain,two.raw"]
            assert offered("map", mountpoint, "tw") == ["plain,two.raw"]
            assert offered("source", "on-error", mountpoint, "") == [f"plain,{n}" for n in ("eio", "wait", *IMAGES)]
            assert offered("source", "on-error", mountpoint, "two", "w") == ["plain,wait"]
            assert offered("migrate", "old.qmp", "new.qmp", "m", cwd=tmp_path) == ["plain,mnt"]


def test_no_mount_no_name() -> None:
    """A folder may be typed all the same: the shell completes it."""
    assert offered("umount", "/no/such/place") == ["dir,/no/such/place"]
    assert offered("wait", "/no/such/place", "") == []


def test_files_and_rules_need_no_mount() -> None:
    assert offered("populate", "mnt", "disk", "--from", "back") == ["file,back"]
    assert offered("migrate", "ol") == ["file,ol"]
    assert offered("mount", "--on-source-error", "") == ["plain,eio", "plain,wait"]
    assert offered("create", "--on-source-error", "w") == ["plain,wait"]


def test_a_server_that_does_not_answer_has_no_names(tmp_path: Path) -> None:
    with origin(tmp_path, MIB) as source, mounted(create(tmp_path / "disk.qed", source.url), tmp_path / "mnt") as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            assert offered("status", f"{tmp_path}/m") == [f"plain,{mount.mountpoint}"]
            assert offered("wait", mount.mountpoint, "d") == []
        finally:
            os.kill(mount.pid, signal.SIGCONT)


def test_a_mount_whose_server_has_died_can_be_named(tmp_path: Path) -> None:
    """`qedfs umount` removes it."""
    with origin(tmp_path, MIB) as source, mounted(create(tmp_path / "disk.qed", source.url), tmp_path / "mnt") as mount:
        os.kill(mount.pid, signal.SIGKILL)
        mount.wait_exit()
        assert offered("umount", f"{tmp_path}/m") == [f"plain,{mount.mountpoint}"]
        assert offered("wait", mount.mountpoint, "d") == []
        qedfs("umount", mount.mountpoint)


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("", ["srv/a b", "/mnt"]),
        ("s", ["srv/a b"]),
        ("srv/", ["srv/a b"]),
        ("./s", ["./srv/a b"]),
        ("../", ["../data/srv/a b"]),
        ("/m", ["/mnt"]),
        ("/top/data/srv", ["/top/data/srv/a b"]),
    ],
)
def test_a_mountpoint_continues_what_is_typed(monkeypatch: pytest.MonkeyPatch, typed: str, names: list[str]) -> None:
    places = ["/top/data/srv/a b", "/mnt", "/new\nline"]
    monkeypatch.setattr(completion, "qedfs_mounts", lambda: [FoundMount(place, "", 0, 0, ()) for place in places])
    monkeypatch.setattr(os, "getcwd", lambda: "/top/data")
    context = click.Context(click.Command("status"))
    assert completion.mountpoints(context, click.Argument(["mountpoint"]), typed) == names
