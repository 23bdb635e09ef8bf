"""`qedfs list` tells of every mount of this user, of root's the mounts of all, dead or alive, and waits for none."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest

from qedfs.cli.commands.list import ask_all
from qedfs.cli.found_mounts import FoundMount
from qedfs.control.qmp.client import Client, Gone
from qedfs.overlay.create import create_overlay

from ..harness.namespace import Namespace, own_mounts
from ..harness.process import free_port, wait_for
from ..mount.test_options import User, user
from .support import is_running

USER = 65534  # nobody: fusermount3 asks for a name


def place(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir()
    return path


def listed(who: Namespace | User) -> list[dict[str, Any]]:
    return list(json.loads(who.qedfs("list", "--json").stdout)["mounts"])


def test_one_that_serves(tmp_path: Path) -> None:
    folder, mountpoint, copy = (place(tmp_path, name) for name in ("vms", "mnt", "copy"))
    create_overlay(str(folder / "done.qed"), image_size=3 << 20, backing=None)
    create_overlay(str(folder / "begun.qed"), image_size=1 << 20, backing=f"http://127.0.0.1:{free_port()}/x")
    with own_mounts() as inside:
        assert inside.qedfs("list").stdout == "no mounts\n"
        assert listed(inside) == []
        inside.qedfs("mount", folder, mountpoint, "--daemon", "--no-stream")
        inside.run("mount", "--bind", mountpoint, copy).check_returncode()
        (found,) = listed(inside)
        status = json.loads(inside.qedfs("status", "--json").stdout)
        assert found == {
            "mountpoint": str(mountpoint),
            "source": str(folder),
            "user": "root",
            "uid": 0,
            "copies": [str(copy)],
            "state": "served",
            "error": None,
            "pid": found["pid"],
            "socket": status["socket"],
            "image_count": 2,
            "states": {"off": 1, "complete": 1},
            "populated": 3 << 20,
            "total": 4 << 20,
        }
        assert os.readlink(f"/proc/{found['pid']}/exe") == os.path.realpath("/proc/self/exe")
        header, row, remark = inside.qedfs("list").stdout.splitlines()
        assert header.split() == ["mountpoint", "source", "images", "state", "local", "pid", "user"]
        assert row.split()[2:] == ["2", "1", "complete,", "1", "off", "75%", str(found["pid"]), "root"]
        assert remark == f"{mountpoint}: is also mounted at {copy}"
        inside.run("umount", copy).check_returncode()
        inside.qedfs("umount", mountpoint)


def test_one_that_is_dead_and_one_that_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("alive", "dead", "silent")
    for name in names:
        create_overlay(str(tmp_path / f"{name}.qed"), image_size=1 << 20, backing=None)
    with own_mounts() as inside:
        for name in names:
            inside.qedfs("mount", tmp_path / f"{name}.qed", place(tmp_path, name), "--daemon", "--no-restart")
        pids = [mount["pid"] for mount in listed(inside)]
        os.kill(pids[1], signal.SIGKILL)
        os.kill(pids[2], signal.SIGSTOP)
        try:
            wait_for(lambda: not is_running(pids[1]), "its end")
            with ThreadPoolExecutor() as threads:  # both wait for the silent one
                asked = threads.submit(listed, inside)
                shown = inside.qedfs("list").stdout
            alive, dead, silent = asked.result()
        finally:
            os.kill(pids[2], signal.SIGCONT)
        assert (alive["state"], alive["pid"], alive["error"]) == ("served", pids[0], None)
        assert (dead["state"], dead["pid"], dead["image_count"]) == ("dead", None, None)
        assert f"{tmp_path}/dead: the server has died; run: qedfs umount {tmp_path}/dead\n" in shown
        assert (silent["state"], silent["pid"], silent["image_count"]) == ("silent", pids[2], None)
        assert f"{tmp_path}/silent: the server has given no answer for 3 s" in shown
        for name in names:
            inside.qedfs("umount", tmp_path / name)
        assert listed(inside) == []


def test_each_user_has_his_own_and_root_has_all(tmp_path: Path) -> None:
    with user(USER) as they, own_mounts() as inside:
        they.through = inside.enter
        they.run("mkdir", they.folder / "mnt")
        ours = place(tmp_path, "mnt")
        for who, folder in ((they, they.folder), (inside, tmp_path)):
            who.qedfs("create", folder / "disk.qed", "--size", "1M")
            who.qedfs("mount", folder / "disk.qed", folder / "mnt", "--daemon", "--no-restart")
        (one,) = listed(they)
        assert (one["mountpoint"], one["uid"], one["user"]) == (f"{they.folder}/mnt", USER, "nobody")
        assert [(mount["state"], mount["uid"]) for mount in listed(inside)] == [("served", USER), ("served", 0)]
        # What root means without a name is a mount of his own.
        assert json.loads(inside.qedfs("status", "--json").stdout)["mountpoint"] == str(ours)
        # The kernel tells root nothing of a file system of another user, so somebody else has to ask.
        os.kill(one["pid"], signal.SIGKILL)
        wait_for(lambda: not is_running(one["pid"]), "its end")
        assert [mount["state"] for mount in listed(inside)] == ["dead", "served"]
        assert [mount["state"] for mount in listed(they)] == ["dead"]
        for mountpoint in (they.folder / "mnt", ours):
            inside.qedfs("umount", mountpoint)


def test_one_whose_server_is_elsewhere(tmp_path: Path) -> None:
    """The place is none that a server has its socket for: as in a container that was given the mount of its host."""
    overlay, mountpoint, copy = tmp_path / "disk.qed", place(tmp_path, "mnt"), place(tmp_path, "copy")
    create_overlay(str(overlay), image_size=1 << 20, backing=None)
    with own_mounts() as inside:
        inside.qedfs("mount", overlay, mountpoint, "--daemon")
        inside.run("mount", "--bind", mountpoint, copy).check_returncode()
        inside.run("umount", mountpoint).check_returncode()
        (found,) = listed(inside)
        assert (found["mountpoint"], found["state"], found["pid"]) == (str(copy), "unreachable", None)
        assert f"{copy}: the server cannot be reached from here" in inside.qedfs("list").stdout
        inside.qedfs("umount", copy)


def test_a_call_that_never_returns_costs_its_own_entry_only(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def asked(mount: FoundMount) -> dict[str, Any]:
        if mount.mountpoint == "/stuck":
            release.wait()
        return {"state": "served", "error": None}

    monkeypatch.setattr("qedfs.cli.commands.list._asked", asked)
    monkeypatch.setattr("qedfs.cli.commands.list.LATE_SECONDS", -2.0)
    found = ask_all([FoundMount(place, "/a.qed", 0, 0, ()) for place in ("/alive", "/stuck")])
    release.set()
    assert [(mount["mountpoint"], mount["state"]) for mount in found] == [("/alive", "served"), ("/stuck", "silent")]


@pytest.mark.parametrize(("between", "state"), [(True, "restarting"), (False, "ending")])
def test_a_server_that_ends_while_it_is_asked(monkeypatch: pytest.MonkeyPatch, between: bool, state: str) -> None:
    client = MagicMock(server_pid=12)
    client.__enter__.return_value = client
    client.negotiate.side_effect = Gone("the mount has ended")
    monkeypatch.setattr(Client, "reach", Mock(return_value=client))
    monkeypatch.setattr("qedfs.cli.commands.list.is_between_servers", lambda _: between)
    (found,) = ask_all([FoundMount("/mnt", "/a.qed", 0, 0, ())])
    assert (found["state"], found["pid"]) == (state, 12)
